"""A pretrained decoder of Hugging Face transformers, with memories between its layers.

How text is cut into segments: `memlm.models.segments`. Each segment is a plain input of the base: what its tokenizer
puts before a text (``<s>``), the ``overlap`` last tokens of the segment before, taken in again, then the segment, with
places from 0 on. Memory reads where the segment's own tokens stand, so without it logits are those of the base on these
tokens. The open segment keeps the keys and values of all that.

How a layer is run: `memlm.models.decoder`. Where the base comes from: `memlm.models.hf_base`.

Shapes: B rows, S segments of the grid, R = B * S, T tokens per segment, Q columns computed, F tokens before a segment
that are taken in again, D model width, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from memlm.config import ConfigError
from memlm.data.tokenizer import Tokenizer
from memlm.memory.contract import Memory
from memlm.memory.state import State
from memlm.models import hf_base
from memlm.models.decoder import ATTENTION, Before, DecoderLayer, Keys, Step, again_seen, register
from memlm.models.grid import Grid
from memlm.models.segments import SegmentModel
from memlm.models.shell import Shell, Told, layers_of

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Pretrained(SegmentModel):
    """A decoder of transformers with memory.

    What is read is let in by a gate for each place, which begins at zero: a memory that only reads leaves the base as
    it is until it is trained. The gate is a part of the stream's own size, so it means the same in every base.

    Args:
        n_vocab: Ids of the tokenizer; at most those of the base.
        memories: By name, a constructor of one memory module, called with ``d_model``.
        path: Folder of the base, or its name on the hub, of which it is in the cache.
        revision: Branch, tag or commit of a base of the hub; None for the newest in the cache.
        sha256: Hash of the weights of the base, see `memlm.models.hf_base.hash_of`; None for any. A run keeps it.
        freeze: Whether the weights of the base stay as they are.
        lora: Adapters of low rank beside them, which are trained: what `peft.LoraConfig` takes, such as ``r``; None for
            none.
        distill: Share of the loss of text that is the distance from what the bare base predicts with all its places,
            in 0..1: adapters and memory learn to do with a segment what it does with its whole context. Needs ``lora``.
        dtype: Type of the base's numbers; those of memories are float32.
        segment_len: Tokens per segment.
        overlap: Tokens of the segment before that are taken in again.
        memory_layers: Layers with memory: ``middle``, ``all``, or a list of indices from 0.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.

    Attributes:
        begin: Ids that stand before every segment; see `LanguageModel` for the others.

    Raises:
        ValueError: If a setting cannot work; the message names it.
        ConfigError: If there is no such base, or it cannot be taken.
    """

    bare_when_empty = True

    def __init__(
        self,
        n_vocab: int,
        memories: Mapping[str, Callable[..., Memory]],
        path: str | None = None,
        revision: str | None = None,
        sha256: str | None = None,
        freeze: bool = True,
        lora: dict[str, Any] | None = None,
        distill: float = 0.0,
        dtype: Literal["float32", "bfloat16"] = "float32",
        segment_len: int = 128,
        overlap: int = 16,
        memory_layers: Literal["middle", "all"] | list[int] = "middle",
        gradient_checkpointing: bool = False,
    ) -> None:
        if lora is not None and not freeze:
            raise ValueError("model.lora stands beside weights that are frozen: set model.freeze=true, or lora=null")
        if not 0 <= distill <= 1:
            raise ValueError(f"model.distill must be in 0..1, got {distill}")
        if distill and lora is None:
            raise ValueError(
                f"model.distill={distill} needs adapters beside a frozen base: set model.lora, or leave it 0"
            )
        if dtype not in _DTYPES:
            raise ValueError(f"model.dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        folder = hf_base.folder_of(path, revision)
        hf_base.check_hash(folder, sha256)
        causal = hf_base.load_base(folder, _DTYPES[dtype], not freeze)
        config = causal.config
        super().__init__(
            config.vocab_size,
            self.stacked(config.num_hidden_layers),
            config.hidden_size,
            segment_len,
            overlap,
            memory_layers,
            gradient_checkpointing,
        )
        if n_vocab > config.vocab_size:
            raise ValueError(
                f"model.path: the tokenizer has {n_vocab} ids, and the base knows {config.vocab_size}: it is another "
                "tokenizer; leave data.tokenizer.path and n_vocab null"
            )
        self.base_folder, self.begin = folder, hf_base.begin_of(folder)
        self.ends, self.chat_template = hf_base.ends_of(folder), hf_base.chat_template_of(folder)
        self.start = self.begin[-1] if self.begin else hf_base.start_of(folder)
        self.freeze, self.n_again, self.distill = freeze, overlap, distill
        n_again, most = len(self.begin) + overlap, getattr(config, "max_position_embeddings", None)
        if most is not None and n_again + segment_len > most:
            raise ValueError(
                f"model.segment_len ({segment_len}), overlap ({overlap}) and what begins a text ({len(self.begin)}) "
                f"are more than the {most} places that the base knows: set model.segment_len to at most "
                f"{max(most - n_again, 0)}"
            )
        self.bare_len = (sys.maxsize if most is None else most) - len(self.begin)
        known = _known(causal.eval())
        if lora is not None:
            hf_base.add_lora(causal, lora)
        attention = "sdpa" if config._attn_implementation == "sdpa" else "eager"
        register()
        try:
            causal.set_attn_implementation(ATTENTION)
            layers = list(layers_of(causal)[1])
            self.base = Shell(causal, len(self.begin))
            rms = float(self.embedding.weight.detach()[:1000].float().square().mean().sqrt()) if known else 1.0
            self.scale = 2.0 ** -round(math.log2(rms)) if rms > 0 else 1.0  # a power of two, which rounds nothing
            self.lay(layers, (self.base, attention, n_again, segment_len))
            if known is not None:
                self._check(*known)
        except (ValueError, TypeError, KeyError) as error:  # of code that is not ours, on a base it was not made for
            raise ConfigError(
                f"model.path: memory cannot be attached to {config.model_type} in {path}: {error}"
            ) from error
        self.train()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.trains(name))
        self.attach(memories)
        places = {name: len(self.memory_layers) for name, parts in self.memory.items() if parts[0].reads_beside}
        self.gates = nn.ParameterDict({name: nn.Parameter(torch.zeros(n)) for name, n in places.items()})
        self._check_widths()
        self.register_state_dict_post_hook(_without_base)
        self.register_load_state_dict_pre_hook(_with_base)

    # --- what another model of a base does otherwise -----------------------------------------------------------------

    def stacked(self, n_layer: int) -> int:
        """How many layers the model has on a base of ``n_layer``."""
        return n_layer

    def lay(self, layers: Sequence[nn.Module], how: tuple[Shell, str, int, int]) -> None:
        """Make the layers of those of the base.

        Args:
            layers: Those of the base.
            how: What `DecoderLayer` takes between a layer and its scale.
        """
        self.layers = nn.ModuleList(
            DecoderLayer(i, layer, *how, 1.0 if i else self.scale) for i, layer in enumerate(layers)
        )

    def trains(self, name: str) -> bool:
        """Whether a parameter is trained that is no part of a memory."""
        return not self.freeze or "lora_" in name

    def through(self, x: Tensor, told: Sequence[Told], mask: Tensor | None) -> tuple[Tensor, list[Keys]]:
        """All layers without memory: the stream (R, L, D) behind them, and their keys and values (R, L, G, E).

        Args:
            x: What enters them.
            told: What each layer of the base is told.
            mask: What each token sees, (R, 1, L, L); None for all before it.
        """
        keys = []
        for layer, one in zip(self.layers, told, strict=True):
            x, kept = layer.again(x * layer.scale, one, mask)
            keys.append(kept)
        return x, keys

    # --- the base ----------------------------------------------------------------------------------------------------

    @classmethod
    def settled(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """See `LanguageModel.settled`: with the base's place, revision and hash."""
        return hf_base.settled(settings)

    @classmethod
    def own_tokenizer(cls, settings: Mapping[str, Any]) -> Tokenizer:
        """See `LanguageModel.own_tokenizer`: that of the base."""
        folder = hf_base.folder_of(settings["path"], settings.get("revision"))
        return Tokenizer.from_json(hf_base.tokenizer_of(folder)).bare()

    @property
    def embedding(self) -> Any:  # type: ignore[override]
        """Token embeddings of the base."""
        return self.base.causal.get_input_embeddings()

    @property
    def norm(self) -> Any:  # type: ignore[override]
        """The norm behind the last layer."""
        return self.base.norm

    @property
    def head_weight(self) -> Tensor:
        """See `LanguageModel.head_weight`."""
        return self.base.causal.get_output_embeddings().weight

    def opening(self) -> Tensor | None:
        """See `LanguageModel.opening`: behind what begins a text."""
        if not self.begin:
            return None
        ids = torch.tensor([self.begin], device=self.embedding.weight.device)
        return self.norm(self._again(ids, torch.ones_like(ids, dtype=torch.bool))[0])[0, -1]

    @torch.no_grad()
    def bare(self, ids: Tensor) -> Tensor:
        """See `LanguageModel.bare`: behind what begins a text, without adapters."""
        begin = torch.tensor(self.begin, dtype=torch.long, device=ids.device).expand(len(ids), -1)
        whole = torch.cat([begin, ids], dim=1)
        with hf_base.without_lora(self.base.causal, self.layers):
            return self.norm(self._again(whole, torch.ones_like(whole, dtype=torch.bool))[0])[:, begin.shape[1] :]

    def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """See `LanguageModel.chat`."""
        if self.chat_template is None or self.base_folder is None:
            return super().chat(messages, add_generation_prompt)
        return hf_base.chat_of(self.base_folder, messages, add_generation_prompt)

    def held_back(self) -> dict[str, Tensor]:
        """Weights of the base that are not trained, by name: they are no part of a checkpoint."""
        if not self.freeze:
            return {}
        trained = {name for name, parameter in self.named_parameters() if self.trains(name)}
        parts = self.base.state_dict(prefix="base.") | self.layers.state_dict(prefix="layers.")
        parts |= self.below.state_dict(prefix="below.")
        return {name: part for name, part in parts.items() if name not in trained}

    def _check(self, ids: Tensor, expected: Tensor) -> None:
        """Refuse a base whose logits come out otherwise when its layers are called one by one."""
        stream, _ = self._again(ids, torch.ones_like(ids, dtype=torch.bool))
        found = self.head(self.norm(stream)).float()
        most = 0.1 if self.embedding.weight.dtype == torch.bfloat16 else 1e-3
        if not torch.allclose(found, expected, atol=most * float(expected.std().clamp(min=1e-3)), rtol=most):
            raise ValueError(
                "its logits are more than layers, a norm and a linear head make of the stream (as with soft caps, a "
                "scaled head or a bias in it)"
            )

    def _check_widths(self) -> None:
        """Refuse memories of heads where these are not as wide as memories take them to be."""
        layer: Any = self.layers[0]
        if layer.width * layer.n_head == self.d_model:
            return
        for name, modules in self.memory.items():
            if modules[0].needs.heads:
                raise ValueError(
                    f"memory {name!r} needs heads of width d_model / n_head, and those of this base are {layer.width} "
                    f"wide ({layer.n_head} of them, d_model {self.d_model}): choose another memory"
                )

    # --- the forward pass --------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings of about unit variance, (..., D)."""
        return self.embedding(ids) * self.scale

    def ready(self, grid: Grid, ids: Tensor, below: Sequence[State]) -> Grid:
        """See `Stack.ready`: places, what layers are told, and keys of what each segment takes in again."""
        continues, device = grid.flags.continues, ids.device
        n_begin, n_row, n_segment = len(self.begin), *grid.new.shape[:2]
        n_again, segment_len = n_begin + self.overlap, grid.segment_len
        first = n_begin + self.overlap * continues[..., None]  # place of a segment's first cell, (B, S, 1)
        cell = torch.arange(segment_len, device=device)
        again = torch.arange(n_again, device=device).expand(n_row, n_segment, -1)
        cells = torch.cat([again, first + cell], dim=2)  # (B, S, F + T)
        columns = first + cell[grid.columns]  # (B, S, Q)
        before = again_seen(continues, n_begin, n_again)
        seen = torch.cat(
            [
                before[:, :, None].expand(-1, -1, grid.n_column, -1),
                (cell <= cell[grid.columns, None]).expand(n_row, n_segment, -1, -1),
            ],
            dim=3,
        )
        if not grid.n_column:
            nothing = self.embedding.weight.new_zeros(n_row, n_segment, 0, self.d_model)
            return grid._replace(before=Before(nothing, [], None, columns, cells, seen))
        own = ids[:, ids.shape[1] - n_segment * segment_len :].unflatten(1, (n_segment, -1))[..., grid.columns]
        entered, told = self.base.tell(self.embedding(own).flatten(0, 1), columns.flatten(0, 1))
        keys = None
        if n_again and (n_segment > 1 or not all(grid.opened)):
            keys = self._keys_again(ids, before)
        return grid._replace(before=Before(entered.unflatten(0, (n_row, n_segment)), told, keys, columns, cells, seen))

    def begin_step(self, ids: Tensor, place: Tensor, continues: Tensor, most: int) -> tuple[Tensor, Step]:
        """See `Stack.begin_step`."""
        n_begin, n_again = len(self.begin), len(self.begin) + self.overlap
        first = n_begin + self.overlap * continues  # place of the segment's first cell, (B,)
        columns, cell = (first + place)[:, None], torch.arange(most, device=ids.device)
        again = torch.arange(n_again, device=ids.device).expand(len(ids), -1)
        cells = torch.cat([again, first[:, None] + cell], dim=1)
        seen = torch.cat([again_seen(continues, n_begin, n_again), cell <= place[:, None]], dim=1)
        entered, told = self.base.tell(self.embedding(ids)[:, None], columns)
        before = Before(entered[:, None], told, None, columns[:, None], cells[:, None], seen[:, None, None])
        return entered[:, 0] * self.scale, Step(before, n_again + place, bool(seen.all()))

    def entered(self, embeddings: Tensor, grid: Grid) -> Tensor:
        """See `Stack.entered`; in units of the memories."""
        return grid.before.entered * self.scale

    def let_in(self, name: str, place: int, value: Tensor, y: Tensor) -> Tensor:
        """See `Stack.let_in`."""
        size = y.detach().square().mean(dim=-1, keepdim=True).sqrt()
        return value * (self.gates[name][place] * size)

    def _keys_again(self, ids: Tensor, seen: Tensor) -> list[Keys]:
        """By layer, keys and values of what each segment takes in again, (B, S, F, G, E), by the base alone.

        Args:
            ids: Those of the lookback and of the grid.
            seen: Which of them are seen, (B, S, F).
        """
        n_row, n_segment = seen.shape[:2]
        start = torch.tensor(self.begin, dtype=torch.long, device=ids.device)
        again = start.expand(n_row, n_segment, -1)
        if self.overlap:
            ends = ids[:, ids.shape[1] - n_segment * self.segment_len - self.overlap :]
            again = torch.cat([again, ends.unfold(1, self.overlap, self.segment_len)[:, :n_segment]], dim=2)
        _, keys = self._again(again.flatten(0, 1), seen.flatten(0, 1))
        return [Keys(*(part.unflatten(0, (n_row, n_segment)) for part in layer)) for layer in keys]

    def _again(self, ids: Tensor, seen: Tensor) -> tuple[Tensor, list[Keys]]:
        """The base alone over ids (R, L), of which some are ``seen``: the stream, and keys and values by layer."""
        place = torch.arange(ids.shape[1], device=ids.device)
        causal = place <= place[:, None]
        mask = None
        if not bool(seen.all()):
            mask = (causal & (seen[:, None] | torch.eye(len(place), dtype=torch.bool, device=ids.device)))[:, None]
        x, told = self.base.tell(self.embedding(ids), place.expand(len(ids), -1))
        return self.through(x, told, mask)


def _known(causal: Any) -> tuple[Tensor, Tensor] | None:
    """Some token ids, and the logits of a base; None if it has no numbers."""
    if next(causal.parameters()).is_meta:
        return None
    ids = torch.arange(1, 15).view(2, 7) * 37 % causal.config.vocab_size
    with torch.no_grad():
        return ids, causal(input_ids=ids, use_cache=False).logits.float()


def _without_base(module: Any, state_dict: dict[str, Any], prefix: str, about: Any) -> None:
    """Leave what is known from elsewhere out of a checkpoint."""
    for name in module.held_back():
        state_dict.pop(f"{prefix}{name}", None)


def _with_base(module: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Give a checkpoint what was left out of it."""
    for name, part in module.held_back().items():
        state_dict.setdefault(f"{prefix}{name}", part)
