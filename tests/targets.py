"""Classes for `_target_` nodes to name, and the sentence of a refusal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import pytest

from memlm.config import ConfigError

if TYPE_CHECKING:
    from decimal import Decimal

HERE = __name__


class Model:
    def __init__(
        self,
        n_layer: int,
        d_model: int = 64,
        dropout: float = 0.0,
        norm: Literal["rms", "layer"] = "rms",
        tied: bool = True,
        name: str | None = None,
        layers: list[int] | Literal["all"] = "all",
        betas: tuple[float, float] = (0.9, 0.95),
        act: Any = None,
    ) -> None:
        self.n_layer = n_layer


class Ltm:
    def __init__(self, d_model: int, n_slot: int = 100, top_k: Optional[int] = 4) -> None:  # noqa: UP045 - on purpose
        self.n_slot = n_slot


class PartlyTyped:
    def __init__(self, price: Decimal, count: Annotated[int, "items"] = 1, paths: Sequence[str] = ()) -> None:
        self.count = count


class Anything:
    def __init__(self, n: int = 1, **kwargs: Any) -> None:
        self.n = n

    @classmethod
    def make(cls, n: int, sizes: dict[str, int] | None = None) -> Anything:
        return cls(n)


def error(function: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message
