"""What every language model offers; any of them takes any memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from memlm.config import ConfigError
from memlm.memory.contract import Memory, Sizes

if TYPE_CHECKING:
    from memlm.data.tokenizer import Tokenizer


class Placed(NamedTuple):
    """A memory module and where it stands.

    Attributes:
        label: ``name/layer``; ``name`` if it serves all attached layers or stands around the stack.
        name: Name of the memory.
        number: Number of the module, and of its state, among those of the memory.
        reads: Names of its reads in the output of a call.
        module: The module.
    """

    label: str
    name: str
    number: int
    reads: list[str]
    module: Memory


class LanguageModel(nn.Module):
    """A causal language model with memories.

    Subclasses define ``forward`` and what is not implemented here as `memlm.models.segments.SegmentModel` does. The
    ``memory`` of their states holds, by name, one state per module.

    Attributes:
        memory: By name, the `Memory` modules of each memory: one per layer with memory, or one for all of them.
        memory_layers: Indices of the layers with memory.
        segment_len: Tokens per segment.
        lookback: Tokens before a segment that its state carries, as writes need them.
        sizes: What memories are told of the model.
        tokenizer: What encodes and decodes text; set by `memlm.build`.
        config: The plain configuration the model was built from; set by `memlm.build`.
        base_folder: Where the pretrained model is that it stands on; None if it was trained from scratch.
        begin: Ids that the model itself puts before texts.
        start: Id after which a text begins, for a text of which the first token is to be predicted too; None if no
            token is known for that.
        ends: Ids that end a text, as the pretrained model has learned it.
        chat_template: How its tokenizer writes a chat, in Jinja; None if it has no way.
        distill: Share of the loss of text that is the distance from the bare base; see `bare`.
        bare_len: Tokens that `bare` takes at most.
    """

    memory: Any  # nn.ModuleDict of nn.ModuleList of Memory, whose items torch types as bare modules
    memory_layers: list[int]
    segment_len: int
    lookback: int
    sizes: Sizes
    tokenizer: Tokenizer
    config: dict[str, Any]
    base_folder: Path | None = None
    begin: Sequence[int] = ()
    start: int | None = None
    ends: Sequence[int] = ()
    chat_template: str | None = None
    distill: float = 0.0
    bare_len: int = 0

    @classmethod
    def settled(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of a model as a run keeps them: with all that tells apart what they name.

        Args:
            settings: Settings of the model, ``_target_`` included.
        """
        return dict(settings)

    @classmethod
    def own_tokenizer(cls, settings: Mapping[str, Any]) -> Tokenizer | None:
        """The tokenizer that a model comes with; None if it takes any.

        Args:
            settings: Settings of the model, ``_target_`` included.
        """
        return None

    @property
    def head_weight(self) -> Tensor:
        """Weights of the language-model head, (V, D)."""
        raise NotImplementedError

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of last hidden states (..., D)."""
        return nn.functional.linear(hidden, self.head_weight)

    def opening(self) -> Tensor | None:
        """The last hidden state before any text, (D,), from which the first token is predicted; None if nothing is."""
        return None

    def bare(self, ids: Tensor) -> Tensor:
        """Last hidden states (R, L, D) of texts (R, L) by the pretrained model as it was, without gradients."""
        raise NotImplementedError

    def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat, as the tokenizer of the base writes it.

        Args:
            messages: Each with its ``role`` (``system``, ``user``, ``assistant``) and ``content``.
            add_generation_prompt: Whether what begins an answer stands at the end.

        Raises:
            ConfigError: If it has no way to write one.
        """
        raise ConfigError("the tokenizer of this model has no chat template: give it plain text")

    def init_state(self, n_row: int) -> Any:
        """State before any text."""
        raise NotImplementedError

    def bank_state(self) -> Any:
        """A state of one row without context whose memories are the persistent banks themselves: to be read only."""
        raise NotImplementedError

    def new_context(self, state: Any, write: bool = True, donate: bool = False) -> Any:
        """``state`` without its local context; memories are kept."""
        raise NotImplementedError

    def absorb(
        self,
        ids: Tensor,
        state: Any = None,
        read: bool = True,
        mask: Tensor | None = None,
        breaks: Tensor | None = None,
        donate: bool = False,
    ) -> Any:
        """Go on with text that is only to be remembered.

        Args:
            ids: Token ids, (B, L), any L.
            state: Where the text stopped; None for the beginning.
            read: Whether memories are read.
            mask: As in ``forward``.
            breaks: As in ``forward``.
            donate: Whether ``state`` is given away, as in ``forward``: the cost is then that of what is written, and
                not of what is held.

        Returns:
            The state after the text, to absorb more or for `new_context`. Its local context may be incomplete:
            ``forward`` then refuses to go on from it.
        """
        return self(ids, state=state, read=read, mask=mask, breaks=breaks, logits=False, donate=donate).state

    def places(self, state: Any) -> list[Tensor]:
        """Places in the document of the tokens that memories hold, (B, n_slot) each: see `Slots.places`."""
        return []

    def map_memory(self, function: Callable[[Any, Any], Any], state: Any) -> Any:
        """``state`` with ``function(module, memory_state)`` in place of every memory state."""
        raise NotImplementedError

    def wipe(self, state: Any) -> Any:
        """``state`` with all memories as new."""
        raise NotImplementedError

    def with_memory(self, state: Any, other: Any) -> Any:
        """``state`` with the memories of ``other``; the local context stays."""
        raise NotImplementedError

    def select_rows(self, state: Any, index: Tensor) -> Any:
        """Rows ``index`` (N,) of ``state``."""
        raise NotImplementedError


def placed(model: Any) -> list[Placed]:
    """Every memory module of a language model and where it stands."""
    found = []
    for name, modules in model.memory.items():
        layers = [f"{name}/{layer}" for layer in model.memory_layers]
        if modules[0].around == "layer":
            found += [Placed(label, name, i, [label], modules[i]) for i, label in enumerate(layers)]
        else:
            reads = layers if modules[0].around == "layers" else [name]
            found.append(Placed(name, name, 0, reads, modules[0]))
    return found
