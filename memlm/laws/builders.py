"""Small models with filled memories, on which laws are tried."""

from __future__ import annotations

import functools
import importlib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from memlm.compose import compose, config_dir
from memlm.memory.contract import Memory
from memlm.models.lmcode import LMCode
from memlm.models.segments import SegmentModel
from memlm.models.state import ModelState
from memlm.tensors import Host

Make = Callable[..., SegmentModel]


Nodes = Mapping[str, Mapping[str, Any]]


N_VOCAB = 40


T = 12  # tokens per segment


# Of any model, those of these settings that it has.
MODEL: dict[str, Any] = {"n_layer": 3, "n_head": 4, "d_model": 32, "d_ff": 48, "segment_len": T, "overlap": 4}


# Where every layer has memory two layers are enough: one reads after another has read.
ALL: dict[str, Any] = {"memory_layers": "all", "n_layer": 2}


# Small enough that a handful of segments fills and overfills every memory.
SMALL: dict[str, Any] = {
    "n_slot": 20, "n_token": 50, "n_mode": 50, "d_key": 16, "top_k": 6, "write_budget": 5, "span": 2,
    "n_working": 4, "n_stm": 8, "n_reminded_stm": 4, "n_reminded_ltm": 4, "search_depth": 2, "period": 2,
}  # fmt: skip


_TOLERANCE, _TOLERANCE_OF_16 = 1e-4, 5e-3
_tolerance: ContextVar[float] = ContextVar("tolerance", default=_TOLERANCE)


def names() -> list[str]:
    """Every memory there is."""
    return sorted(path.stem for path in (config_dir() / "memory").glob("*.yaml"))


@functools.cache
def nodes_of(name: str) -> Nodes:
    """The nodes of ``configs/memory/<name>.yaml``, its defaults included."""
    nodes = OmegaConf.to_container(compose([f"memory={name}"], "check").memory, resolve=True)
    assert isinstance(nodes, dict)
    return nodes  # type: ignore[return-value]


def class_of(node: Mapping[str, Any]) -> type[Memory]:
    """The class that a node names."""
    module, _, name = node["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def settings_of(node: Mapping[str, Any]) -> dict[str, Any]:
    """What the constructor gets."""
    return {key: value for key, value in node.items() if not key.startswith("_")}


def host_of(node: Mapping[str, Any]) -> Callable[..., SegmentModel]:
    """What makes the model that a node names, with those of its settings that laws do not choose; all of it learns."""
    settings = {key: value for key, value in settings_of(node).items() if key not in MODEL}
    made: Any = class_of(node)
    return functools.partial(made, **settings | ({"freeze": False} if "freeze" in settings else {}))


def small(cls: type[Memory], settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` with every size made small: by name where known, else counts and widths of at most 16."""
    known = inspect.signature(cls).parameters
    shrunk = {key: SMALL[key] if key in SMALL else _at_most(key, value) for key, value in settings.items()}
    return shrunk | {key: value for key, value in SMALL.items() if key in known}


def _at_most(key: str, value: Any) -> Any:
    is_size = isinstance(value, int) and not isinstance(value, bool) and key.startswith(("n_", "d_"))
    return min(value, 16) if is_size else value


def builder(nodes: Nodes, shrink: bool = True, model_class: Callable[..., SegmentModel] = LMCode) -> Make:
    """``make`` for the memories that ``nodes`` describe."""
    memories = {name: (class_of(node), settings_of(node)) for name, node in nodes.items()}
    return builder_of(memories, shrink, model_class)


def builder_of(
    memories: Mapping[str, tuple[type[Memory], dict[str, Any]]],
    shrink: bool = True,
    model_class: Callable[..., SegmentModel] = LMCode,
) -> Make:
    """``make`` for memories by name, each a class and its settings."""
    accepted = inspect.signature(model_class).parameters

    # Settings in `memory` go to each memory that has them: `n_slot`; or to those of one class: `LongTermMemory.n_slot`.
    def make(
        memory: Mapping[str, Any] | None = None, perturb: bool = True, n_vocab: int = N_VOCAB, **model: Any
    ) -> SegmentModel:
        torch.manual_seed(0)
        constructors = {}
        for name, (cls, settings) in memories.items():
            known = inspect.signature(cls).parameters
            split = [(*key.rpartition("."), value) for key, value in (memory or {}).items()]
            own = {key: value for of, _, key, value in split if key in known and of in ("", cls.__name__)}
            constructors[name] = functools.partial(cls, **((small(cls, settings) if shrink else settings) | own))
        sizes = {key: value for key, value in (MODEL | model).items() if key in accepted or key not in MODEL}
        built = model_class(n_vocab, constructors, **sizes)
        if perturb:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in built.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return built.eval()

    return make


def takes(make: Make, setting: str) -> bool:
    """Whether a memory of the model has a constructor parameter of this name."""
    modules = (parts[0] for parts in make().memory.values())
    return any(setting in inspect.signature(type(module)).parameters for module in modules)


def text(n_row: int, n_token: int, seed: int = 0, low: int = 0, high: int = N_VOCAB) -> Tensor:
    """Random token ids, (n_row, n_token)."""
    return torch.randint(low, high, (n_row, n_token), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def filled(model: SegmentModel, n_row: int = 3, n_open: int = 0, n_segment: int = 7) -> ModelState:
    """A state that holds ``n_segment`` segments, and ``n_open`` tokens of the next."""
    ids = text(n_row, n_segment * model.segment_len + n_open, seed=9)
    return model(ids.to(model.embedding.weight.device), logits=False).state


@torch.no_grad()
def logits(model: SegmentModel, ids: Tensor, state: ModelState | None, **options: Any) -> Tensor:
    """Logits of one call."""
    return model(ids, state=state, **options).logits


@contextmanager
def rounding(make: Make) -> Iterator[None]:
    """Judge by what rounding does to memories of these models: of a slot that is held in 16 bits it changes more."""
    types = {part.dtype for _, part in named_tensors(make().init_state(1).memory) if part.is_floating_point()}
    before = _tolerance.set(_TOLERANCE if types <= {torch.float32} else _TOLERANCE_OF_16)
    try:
        yield
    finally:
        _tolerance.reset(before)


def close(a: Tensor, b: Tensor, what: str, scale: float = 1.0) -> None:
    """Equal up to rounding, of fp32 if they do not say otherwise; see `rounding`. ``scale`` is that of the numbers."""
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    if not a.numel():
        return
    error = (a - b).abs().max().item()
    tolerance = _tolerance.get() * scale
    if a.dtype == torch.bfloat16:  # that of the numbers themselves
        tolerance = max(tolerance, 2 * torch.finfo(a.dtype).eps * b.abs().max().item())
    assert error <= tolerance, f"{what}: differ by {error:.3g}"  # false for NaN as well


def named_tensors(state: Any, prefix: str = "", host: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a state with its path; without each `Host` if ``host`` is false."""
    if isinstance(state, Host):
        state = state.tensor if host else None
    if isinstance(state, Tensor):
        yield prefix, state
    elif state is not None:
        parts = state._asdict() if hasattr(state, "_asdict") else state
        for key, value in parts.items() if isinstance(parts, dict) else enumerate(parts):
            yield from named_tensors(value, f"{prefix}.{key}" if prefix else str(key), host)


def same_memory(a: ModelState, b: ModelState, what: str) -> None:
    """Equal memory states, up to fp32 rounding. A `Host` may be a bound, which depends on the calls made."""
    pairs = zip(named_tensors(a.memory, host=False), named_tensors(b.memory, host=False), strict=True)
    for (name, left), (_, right) in pairs:
        if left.is_floating_point():
            close(left, right, f"{what}: {name}")
        else:
            assert torch.equal(left, right), f"{what}: {name} differs"


@contextmanager
def windows_of(n_segment: int, model: SegmentModel) -> Iterator[None]:
    """Run so many segments after the other through all layers; one by one is the definition."""
    model.n_together = n_segment
    try:
        yield
    finally:
        model.n_together = None


@contextmanager
def slow_scan(model: SegmentModel) -> Iterator[None]:
    """Read and write segment by segment within each layer, by `Memory.scan`."""
    modules = [module for parts in model.memory.values() for module in parts if not module.within]
    for module in modules:
        module.scan = types.MethodType(Memory.scan, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.scan


def windows_of_documents(n_row: int = 3, n_segment: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, reset by segment and mask of a window with documents that begin and end (padded) in its middle."""
    ids = text(n_row, n_segment * T, seed=4)
    reset = torch.zeros(n_row, n_segment, dtype=torch.bool)
    mask = torch.ones(n_row, n_segment, T, dtype=torch.bool)
    reset[0, 3] = reset[1, 0] = reset[1, 2] = reset[1, 5] = True
    mask[0, 2, 5:] = mask[1, 1, 1:] = mask[1, 4, T - 1 :] = False  # the ends of documents
    mask[2, -1, 4:] = False  # a document that ends with the window
    return ids, reset, mask.flatten(1)
