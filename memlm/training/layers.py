"""Layers whose weights are dealt out to processes, under ``trainer=fsdp``.

All else (embedding, memories, last norm) is used outside of calls of modules: each process keeps a copy of it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from memlm.models.base import LanguageModel


class DealtLayers:
    """The layers of a model, dealt out to processes or not.

    Args:
        model: The model.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model: Any = model
        self._plain: list[nn.Module] = []  # without weights, of the layers that are dealt out

    @property
    def are_dealt(self) -> bool:
        """Whether they are dealt out now."""
        return bool(self._plain)

    def deal(self, mesh: Any) -> None:
        """Deal their weights out to the processes of a mesh."""
        for layer in self._model.layers:
            self._plain.append(_skeleton(layer))
            fully_shard(layer.feed_forward, mesh=mesh)
            fully_shard(layer, mesh=mesh)
            for method in ("mix", "next_cache", "heads", "attend", "attend_to", "out", "seen"):
                register_fsdp_forward_method(layer, method)

    def put_together(self, device: torch.device) -> None:
        """Make them plain again, in every process. Every process has to ask."""
        for i, layer in enumerate(self._copies(device)):
            self._model.layers[i] = layer
        self._plain = []

    @contextlib.contextmanager
    def whole(self, device: torch.device) -> Iterator[None]:
        """Hold them as a whole in each process, for what the processes do not all do alike.

        All processes have to enter: layers that are dealt out wait for all processes whenever they are called.
        """
        layers = self._model.layers
        dealt = list(layers)
        for i, layer in enumerate(self._copies(device)):
            layers[i] = layer
        try:
            yield
        finally:
            for i, layer in enumerate(dealt):
                layers[i] = layer

    def _copies(self, device: torch.device) -> list[nn.Module]:
        """Copies, with all weights, of the layers that are dealt out. Every process has to ask."""
        copies = [_skeleton(plain) for plain in self._plain]
        for i, plain in enumerate(copies):
            weights = self._model.layers[i].state_dict()
            whole = {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights.items()}
            plain.load_state_dict(whole, assign=True)
            plain.to(device)  # tables that are not among the weights
        return copies


def average_gradients(parameters: Iterable[nn.Parameter], n_rank: int) -> None:
    """Average the gradients of what every process has a copy of beside layers that are dealt out."""
    grads = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    joined = torch.cat([grad.flatten() for grad in grads])
    torch.distributed.all_reduce(joined)
    joined /= n_rank
    for grad, mean in zip(grads, joined.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def clip_gradients(parameters: Iterable[nn.Parameter], most: float, by_value: bool) -> None:
    """Clip gradients of which only some are dealt out.

    Args:
        parameters: What is trained.
        most: Largest norm of all together, or largest number.
        by_value: Whether numbers are clipped one by one.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if by_value:
        for grad in grads:
            own = grad.to_local() if isinstance(grad, DTensor) else grad
            own.clamp_(-most, most)
        return
    norms: list[Tensor] = [torch.linalg.vector_norm(grad) for grad in grads]
    total = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    scale = (most / (total + 1e-6)).clamp(max=1)
    for grad in grads:
        grad.mul_(scale)


def _skeleton(layer: nn.Module) -> nn.Module:
    """A copy of a layer whose weights take no memory."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in layer.parameters()}
    return copy.deepcopy(layer, memo)
