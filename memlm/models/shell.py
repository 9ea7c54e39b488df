"""A model of transformers with its layers stepped over: what enters them, and what each is told beside the stream.

Positions, masks and whatever else a family of models gives to its layers then come from its own code.

Shapes: R rows, L tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn


class Told(NamedTuple):
    """What a base tells a layer beside the stream."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def of(self, n_row: int, pick: Callable[[Tensor], Tensor]) -> Told:
        """The same for some rows: ``pick`` is applied to all tensors of ``n_row`` rows."""
        return self.map(lambda value: pick(value) if value.dim() and len(value) == n_row else value)

    def map(self, function: Callable[[Tensor], Tensor]) -> Told:
        """The same with ``function(tensor)`` in place of every tensor."""

        def mapped(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, tuple | list):
                return type(value)(mapped(part) for part in value)
            return value

        return Told(mapped(self.args), {name: mapped(value) for name, value in self.kwargs.items()})


class _Note(nn.Module):
    """Stands in the place of a layer: notes what it is told, and steps over it."""

    def __init__(self, layer: nn.Module, notes: list[tuple[Tensor, Told]]) -> None:
        super().__init__()
        self._layer, self._notes = (layer,), notes  # a tuple, so that it is no part of this

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer[0], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The stream as it is."""
        self._notes.append((hidden_states, Told(args, kwargs)))
        return hidden_states


class Shell(nn.Module):
    """A model of transformers without its layers: embedding, positions, norm, head.

    Args:
        causal: The model, which loses its layers.
        n_begin: Tokens that begin every text of it.

    Attributes:
        taken: The layers.
    """

    def __init__(self, causal: Any, n_begin: int = 0) -> None:
        super().__init__()
        self.causal, self.n_begin = causal, n_begin
        self._notes: list[tuple[Tensor, Told]] = []
        name, layers = layers_of(causal)
        self.taken = tuple(layers)
        setattr(decoder_of(causal), name, nn.ModuleList(_Note(layer, self._notes) for layer in layers))
        parts = [part for part, _ in decoder_of(causal).named_children() if "norm" in part or part.startswith("ln")]
        if not parts:
            raise ValueError("its decoder has no norm behind its layers")
        self._norm = parts[-1]

    @property
    def norm(self) -> Any:
        """The norm behind the last layer."""
        return getattr(decoder_of(self.causal), self._norm)

    def tell(self, embeddings: Tensor, places: Tensor) -> tuple[Tensor, list[Told]]:
        """What enters the first layer, (R, L, D), and what each is told, of embeddings (R, L, D) at places (R, L)."""
        try:
            decoder_of(self.causal)(inputs_embeds=embeddings, position_ids=places, use_cache=False)
            return self._notes[0][0], [told for _, told in self._notes]
        finally:
            self._notes.clear()


def decoder_of(causal: Any) -> Any:
    """The part of a model of transformers that has the layers."""
    return causal.get_decoder()


def layers_of(causal: Any) -> tuple[str, nn.ModuleList]:
    """The layers of a model of transformers, and under which name its decoder has them.

    Raises:
        ValueError: If it has no such list.
    """
    number = getattr(causal.config, "num_hidden_layers", None)
    for name, part in decoder_of(causal).named_children():
        if isinstance(part, nn.ModuleList) and len(part) == number:
            return name, part
    raise ValueError("its decoder has no list of layers")
