"""What memory costs against the whole model: parameters, bytes of state, floating-point operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from memlm.memory.state import n_byte
from memlm.models.base import LanguageModel


@dataclass(frozen=True)
class Cost:
    """What a part of a model costs.

    Attributes:
        parameters: Parameters.
        state_bytes: Bytes that it carries of one row of text.
        flops_per_token: Floating-point operations of one token, a multiply-add being two.
    """

    parameters: int
    state_bytes: int
    flops_per_token: int


@dataclass(frozen=True)
class Efficiency:
    """What memories cost.

    Attributes:
        memories: By name, all layers together.
        model: The whole model, memories included.
    """

    memories: dict[str, Cost]
    model: Cost

    @property
    def memory(self) -> Cost:
        """All memories together."""
        parts = self.memories.values()
        return Cost(
            sum(part.parameters for part in parts),
            sum(part.state_bytes for part in parts),
            sum(part.flops_per_token for part in parts),
        )

    @property
    def parameter_share(self) -> float:
        """Share of the parameters that belong to memories, in 0..1."""
        return self.memory.parameters / self.model.parameters

    @property
    def state_share(self) -> float:
        """Share of the carried bytes that belong to memories, in 0..1; the rest is local context."""
        return self.memory.state_bytes / self.model.state_bytes

    @property
    def flops_share(self) -> float:
        """Share of the operations of a token that belong to memories, in 0..1."""
        return self.memory.flops_per_token / self.model.flops_per_token


def compute_memory_efficiency(model: LanguageModel) -> Efficiency:
    """What the memories of a model cost, and the whole model.

    Memories tell the operations of a token themselves (`Memory.flops_per_token`): a full bank is searched whole, so the
    number does not depend on what is stored. Those of the rest, the head included, are counted by torch (matrix
    products and attention, without element-wise operations) while one segment is read with all memories switched off.

    Args:
        model: A language model; it is left as it was.
    """
    state = model.init_state(1)
    memories = {}
    for name, modules in model.memory.items():
        # A memory that all attached layers share is read in each of them, but has its parameters once.
        memories[name] = Cost(
            sum(parameter.numel() for module in modules for parameter in module.parameters()),
            sum(n_byte(part) for part in state.memory[name]),
            sum(module.flops_per_token() for module in modules),
        )
    ids = torch.zeros(1, model.segment_len, dtype=torch.long, device=model.head_weight.device)
    training = model.training
    model.eval()
    # The fused kernels of some devices are not counted; plain matrix products are, and are as many. The counter follows
    # modules by hooks for gradients, which fail where a module is called without: so nothing has a gradient.
    fixed = {name: part.detach() for name, part in (*model.named_parameters(), *model.named_buffers())}
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        functional_call(model, fixed, (ids,), {"read": False, "write": False})
    model.train(training)
    rest = round(counter.get_total_flops() / model.segment_len)
    whole = Cost(
        sum(parameter.numel() for parameter in model.parameters()),
        n_byte(state),
        rest + sum(cost.flops_per_token for cost in memories.values()),
    )
    return Efficiency(memories, whole)
