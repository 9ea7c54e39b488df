"""Costs of memory against sums by hand."""

from types import SimpleNamespace

import pytest
import torch

from memlm.analysis.efficiency import compute_memory_efficiency
from tests.experiments.tiny import T, tiny


def tokenizer(n):
    return SimpleNamespace(pad_id=0, vocab_size=n)


def test_parameters_and_bytes_by_hand():
    model = tiny(tokenizer(30), "ltm", "stm")
    found = compute_memory_efficiency(model)
    named = {name: part.numel() for name, part in model.named_parameters()}
    for name in ("ltm", "stm"):
        expected = sum(n for key, n in named.items() if key.startswith(f"memory.{name}."))
        assert found.memories[name].parameters == expected > 0
    assert found.model.parameters == sum(named.values())
    assert found.parameter_share == pytest.approx(
        sum(n for key, n in named.items() if key.startswith("memory.")) / sum(named.values())
    )
    # 200 slots of ltm: key 8, value 32, gate and priority in 4 bytes; record, document, position in 8; 4 tokens in 4
    assert found.memories["ltm"].state_bytes == 200 * (4 * (8 + 32 + 2) + 3 * 8 + 4 * 4 + 8 * 4) + 2 * 8
    assert found.memory.state_bytes == sum(cost.state_bytes for cost in found.memories.values())
    assert 0 < found.state_share < 1


def test_operations_of_the_rest_by_hand():
    with_memory, without = (compute_memory_efficiency(tiny(tokenizer(30), *names)) for names in (("ltm",), ()))
    # 2 layers of width 32: queries, keys, values, output; feed-forward as the weights say; scores and sums of
    # attention over 4 + 16 places; the head.
    model = tiny(tokenizer(30))
    linear = sum(m.weight.numel() for layer in model.layers for m in layer.modules() if isinstance(m, torch.nn.Linear))
    attention = 2 * 2 * 32 * (4 + T)  # of one layer: multiply-adds of scores and of sums, two each
    assert without.model.flops_per_token == 2 * (linear + 30 * 32) + 2 * attention
    assert with_memory.model.flops_per_token - without.model.flops_per_token == with_memory.memory.flops_per_token
    # a larger vocabulary costs a larger head and nothing else
    larger = compute_memory_efficiency(tiny(tokenizer(50)))
    assert larger.model.flops_per_token - without.model.flops_per_token == 2 * 32 * 20


def test_no_memory_costs_nothing_and_the_model_is_left_as_it_was():
    model = tiny(tokenizer(30))
    model.train()
    found = compute_memory_efficiency(model)
    assert (found.parameter_share, found.state_share, found.flops_share) == (0, 0, 0)
    assert model.training


def test_a_memory_that_looks_at_the_surprise_of_tokens_is_counted():
    """Surprise is worked out by the head without gradients, in the middle of a pass."""
    plain, found = (compute_memory_efficiency(tiny(tokenizer(30), "ltm", **more)).model.flops_per_token
                    for more in ({}, {"importance": "surprise"}))  # fmt: skip
    assert found - plain >= 2 * 30 * 32  # the head once more
