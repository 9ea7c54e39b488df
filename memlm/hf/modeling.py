"""A language model of memlm with the interface of transformers: ``forward``, ``generate``, pipelines.

Shapes: B rows, L tokens of a call, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from memlm import checkpoint
from memlm.config import ConfigError
from memlm.hf import hub
from memlm.hf.configuration import MemlmConfig
from memlm.models.base import LanguageModel
from memlm.models.state import ModelState

# Until transformers 5.23 the past is called past_key_values, then cache.
_PAST = next(f.name for f in dataclasses.fields(CausalLMOutputWithPast) if f.name in ("cache", "past_key_values"))


class MemlmCache(Cache):
    """What a model knows of the text so far, as the past of transformers: its memories and its local context.

    A call gives a new one, and leaves that which it got as it was.

    Args:
        model: The model.
        state: Where the text stopped.
        n_token: Tokens of the text, padding included.
    """

    def __init__(self, model: Any, state: ModelState, n_token: int) -> None:
        super().__init__(layers=[])
        self._model, self.state, self.n_token = model, state, n_token

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the text, padding included."""
        return self.n_token

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """There is no end."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with rows ``beam_idx`` (N,)."""
        self.state = self._model.select_rows(self.state, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with rows ``indices`` (N,)."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Go on with each row ``repeats`` times."""
        self.reorder_cache(torch.arange(self.state.local.n_row).repeat_interleave(repeats))

    def crop(self, *args: Any) -> None:
        """Raises, as what memory was told cannot be taken back."""
        raise ConfigError("tokens cannot be taken back from a memory: go on from an earlier state")

    @property
    def is_croppable(self) -> bool:
        """No."""
        return False

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.state.local.n_row

    def new_context(self) -> MemlmCache:
        """The same memories without the text that was last said: what follows can know it from memory alone."""
        return MemlmCache(self._model, self._model.new_context(self.state), 0)


class MemlmForCausalLM(PreTrainedModel, GenerationMixin):
    """A model of memlm for transformers.

    `from_pretrained` loads an export. `of` takes a model that is at hand.

    Attributes:
        model: The model, with all that memlm offers: ``store_experience``, ``query_memory``, ...
        card: Text of the ``README.md`` that is saved with it; None for none.
    """

    config_class = MemlmConfig
    _is_stateful = True
    _supports_sdpa = True
    _no_split_modules: list[str] = []  # noqa: RUF012  # as PreTrainedModel has it

    def __init__(self, config: MemlmConfig, model: LanguageModel | None = None, card: str | None = None) -> None:
        if model is None:
            raise ConfigError("a MemlmForCausalLM is made of a model: MemlmForCausalLM.of(memlm.build(...))")
        super().__init__(config)
        self.model: Any = model
        self.card = card

    @classmethod
    def of(cls, model: LanguageModel) -> MemlmForCausalLM:
        """A model of memlm as one of transformers; the weights are the same tensors."""
        return cls(MemlmConfig(**checkpoint.config_of(model)), model).eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        base: str | None = None,
        trust: checkpoint.Trust = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        config: MemlmConfig | None = None,
        trust_remote_code: bool | None = None,
        adapter_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> MemlmForCausalLM:
        """Load an export; no code that comes with it is run.

        Args:
            pretrained_model_name_or_path: Its folder, or its name on the hub.
            base: Where the pretrained model is on which it stands, if not where the export says.
            trust: As for `memlm.load`.
            dtype: Type of the network's numbers; memories keep float32.
            torch_dtype: Its older name.
            device_map: A device for all of it, or ``auto``.
            config: What transformers read of it; it is read again.
            trust_remote_code: Without effect, as no code is run.
            adapter_kwargs: Those of `peft`, which has to be none.
            kwargs: ``revision``, ``cache_dir``, ``token``, ``local_files_only`` and ``force_download`` for a model of
                the hub.

        Raises:
            ConfigError: See `memlm.load`; or for a setting that is not known.
        """
        kwargs = {name: value for name, value in kwargs.items() if not name.startswith("_")}
        folder = hub.folder_of(pretrained_model_name_or_path, kwargs)
        model = checkpoint.load(folder, trust=trust, base=base)
        found: Any = cls(MemlmConfig.from_pretrained(folder), model, hub.card_in(folder))
        found.name_or_path = str(pretrained_model_name_or_path)
        if (folder / "generation_config.json").is_file():
            found.generation_config = GenerationConfig.from_pretrained(folder)
        dtype = torch_dtype if dtype is None else dtype
        if dtype not in (None, "auto"):
            found = found.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        if device_map is not None:
            device = device_map.get("") if isinstance(device_map, dict) and len(device_map) == 1 else device_map
            checkpoint.place(model, str(device))
        return found.eval()

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write an export: see `memlm.checkpoint.export`.

        Args:
            save_directory: Where to; it must not exist yet, or be empty.
            is_main_process: Whether this process writes.
            safe_serialization: Has to be true: weights are always safetensors.
            kwargs: What `PreTrainedModel.save_pretrained` takes beside; there is one file of weights, of any size.
        """
        if not safe_serialization:
            raise ConfigError("safe_serialization=False would write a pickle, which runs code when it is read")
        if is_main_process:
            checkpoint.export(self.model, save_directory)
            if self.card is not None:
                (Path(save_directory) / hub.CARD).write_text(self.card, encoding="utf-8")

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:  # type: ignore[override]
        """Upload an export, with its card: see `memlm.hf.hub.push`."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.push(folder, repo_id, **kwargs)

    def get_input_embeddings(self) -> Any:
        """Token embeddings."""
        return self.model.embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Raises, as a vocabulary belongs to its memories too."""
        raise ConfigError("the vocabulary of a model with memory cannot be changed")

    def _init_weights(self, module: Any) -> None:
        """Nothing: a model comes with its weights."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: the first call makes the past."""
        return False

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MemlmCache | None = None,
        cache: MemlmCache | None = None,
        use_cache: bool | None = True,
        read: bool = True,
        write: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What is new of a text, for `forward`."""
        past = past_key_values if cache is None else cache
        if past is not None:
            input_ids = input_ids[:, past.get_seq_length() :]
        told = {"attention_mask": attention_mask, "use_cache": use_cache, "read": read, "write": write}
        return {"input_ids": input_ids, _PAST: past} | told

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MemlmCache | None = None,
        cache: MemlmCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = True,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = True,
        read: bool = True,
        write: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Go on with a text.

        Args:
            input_ids: Token ids, (B, L), of what is new.
            attention_mask: Tokens that are no padding, (B, L) or with those of the past before them.
            past_key_values: What an earlier call gave as such.
            cache: Its name since transformers 5.23.
            labels: Tokens to predict, (B, L): those of ``input_ids``, with -100 where none is; they are shifted here.
            use_cache: Whether to give what the next call needs.
            logits_to_keep: From how many tokens on, counted from the end, logits are wanted; 0 for all. Or which.
            return_dict: Whether the result has names.
            read: Whether memories are read.
            write: Whether memories are written.
            kwargs: Of the loss (``num_items_in_batch``).

        Returns:
            Logits, the past, and with ``labels`` the mean loss of the tokens.
        """
        past = past_key_values if cache is None else cache
        if past is not None and not isinstance(past, MemlmCache):
            raise ConfigError(f"the past must be what a call of this model gave, got a {type(past).__name__}")
        mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :].bool()
        if mask is not None and bool(mask.all()):
            mask = None
        out = self.model(
            input_ids,
            state=None if past is None else past.state,
            mask=mask,
            read=read,
            write=write,
            logits=False,
            keep_state=bool(use_cache),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self.model.head(out.hidden if isinstance(kept, int) else out.hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        new: Any = None
        if use_cache:
            n_before = 0 if past is None else past.n_token
            new = MemlmCache(self.model, out.state, n_before + input_ids.shape[1])
        found = CausalLMOutputWithPast(loss=loss, logits=logits, **{_PAST: new})
        return found if return_dict in (True, None) else found.to_tuple()


AutoModelForCausalLM.register(MemlmConfig, MemlmForCausalLM, exist_ok=True)
