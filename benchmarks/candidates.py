"""What the benchmarks of training compare: our models and their peers, by size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from benchmarks.base import (
    Peer,
    peer_library,
)
from memlm.compose import compose, to_dict
from memlm.config import ConfigError, validate

if TYPE_CHECKING:
    from torch import Tensor, nn


_SEED = ["recipe=lmcode_seed", "~memory.stm"]  # the recipe is for dual

# Overrides of configs/train.yaml that make a size.
SIZES: dict[str, list[str]] = {
    "seed": _SEED,
    "default": [],
    "124m": [*_SEED, "model.n_layer=12", "model.n_head=12", "model.d_model=768", "model.segment_len=1024"],
}


# What a candidate's speed is given as a share of.
PEERS: dict[str, list[str]] = {
    "gpt2": [],
    "nanogpt": [],
    "none": ["gpt2", "nanogpt"],
    **{name: ["none", "gpt2", "nanogpt"] for name in ("ltm", "delta", "titans")},
}


GPT2 = Peer("transformers", "GPT-2 needs the library transformers", "GPT-2 out with candidates=[nanogpt,none,ltm]")


_CLIP = 1.0  # largest norm of the gradient


def size_config(size: str, overrides: Sequence[str], memories: Sequence[str] = ()) -> dict[str, Any]:
    """The composed configuration of a size, with long-term memory and other ``memories``, of which one is built."""
    for override in overrides:
        if override.partition("=")[0] in ("recipe", "memory", "model"):
            raise ConfigError(f"overrides changes {override!r}, which sizes and candidates decide: leave it out.")
    config = to_dict(compose([*SIZES[size], "memory=ltm", *overrides]))
    for name in memories:
        config["memory"] |= {} if name == "ltm" else to_dict(compose([f"memory={name}"]))["memory"]
    for part in ("model", "training", "memory"):
        validate(config[part], key=part)
    return config


class Setup(NamedTuple):
    """What one candidate is built from; plain values, so that it can be sent to another process.

    Attributes:
        config: Composed configuration of the model, `configs/train.yaml`.
        n_row: Rows of text in a step.
        n_segment: Segments of each row in a step.
        device: Where it runs.
        precision: ``fp32`` or ``bf16`` (autocast).
        compile: Whether the forward pass goes through torch.compile.
        seed: Seed of weights, text and filled banks.
    """

    config: dict[str, Any]
    n_row: int
    n_segment: int
    device: str
    precision: str
    compile: bool
    seed: int

    @property
    def n_vocab(self) -> int:
        """Size of the vocabulary."""
        tokenizer = self.config["data"]["tokenizer"]
        return tokenizer["n_vocab"] or tokenizer["vocab_size"]

    @property
    def segment_len(self) -> int:
        """Tokens of a segment, which are GPT-2's context."""
        return self.config["model"]["segment_len"]

    @property
    def n_token(self) -> int:
        """Tokens of a step."""
        return self.n_row * self.n_segment * self.segment_len

    def batch(self, step: int) -> Tensor:
        """Random token ids and the one after, (B, N + 1): the same for all candidates."""
        import torch

        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        shape = (self.n_row, self.n_segment * self.segment_len + 1)
        return torch.randint(self.n_vocab, shape, generator=generator).to(self.device)


class Candidate:
    """A model that can be trained by one step after another.

    Args:
        name: One of `PEERS`, or another memory.
        setup: What it is built from.

    Attributes:
        model: The model.
        state: What is carried to the next step; None if nothing is (a GPT, or before the first step).
        last: Output of the last step.
        n_seen: Tokens that went into the last step.
    """

    def __init__(self, name: str, setup: Setup) -> None:
        import torch

        from memlm.training.module import LanguageModeling
        from memlm.training.settings import Training

        self.name, self.setup = name, setup
        torch.manual_seed(setup.seed)
        make = {"gpt2": _gpt2, "nanogpt": _nanogpt}.get(name, partial(ours, name))
        self.model: Any = make(setup).to(setup.device).train()
        self.state: Any = None
        self.last: Any = None
        self.n_seen = 0
        if name == "ltm":
            self.state = fill(self.model, setup)
        settings = {key: value for key, value in setup.config["training"].items() if key != "_target_"}
        # The peer gets the optimizer of our trainer too: decay groups, betas, implementation.
        module = LanguageModeling(cast(Any, self.model), Training(**settings), total_steps=10**6)
        self.optimizer = module.configure_optimizers()["optimizer"]
        self._call: Any = torch.compile(self.model.forward) if setup.compile else self.model

    @property
    def n_parameter(self) -> int:
        """Number of parameters; tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def step(self, text: Tensor) -> Tensor:
        """One training step on text (B, N + 1): forward, loss, backward, clip, AdamW. Returns the loss."""
        import torch

        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(text.device.type, dtype=torch.bfloat16, enabled=self.setup.precision == "bf16"):
            loss = self._peer_loss(text) if self.name in ("gpt2", "nanogpt") else self._loss(text)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
        self.optimizer.step()
        return loss.detach()

    def _peer_loss(self, text: Tensor) -> Tensor:
        ids, targets = (part.reshape(-1, self.setup.segment_len) for part in (text[:, :-1], text[:, 1:]))  # (B * S, T)
        self.n_seen = ids.numel()
        if self.name == "nanogpt":
            return self._call(ids, targets)
        return self._call(input_ids=ids, labels=ids, use_cache=False).loss

    def _loss(self, text: Tensor) -> Tensor:
        """As `memlm.training.module.LanguageModeling.training_step`, which needs a trainer."""
        import torch

        from memlm.memory import state as states
        from memlm.training.loss import linear_cross_entropy

        ids, targets = text[:, :-1], text[:, 1:]
        self.n_seen = ids.numel()
        model: Any = self.model
        out = self._call(ids, state=self.state, logits=False)
        share = torch.full(ids.shape, 1 / ids.numel(), device=ids.device)
        loss, nll = linear_cross_entropy(out.hidden, model.head_weight, targets, share, compiled=self.setup.compile)
        extra = [
            value
            for name, modules in model.memory.items()
            for value in modules[0].losses(out.trace[name], nll.mean(dim=1)).values()
        ]
        self.state = states.detach(out.state)
        self.last = out._replace(
            logits=None, state=None, reads={key: states.detach(read) for key, read in out.reads.items()}
        )
        return loss + sum(extra, torch.zeros((), device=loss.device))


def _gpt2(setup: Setup) -> nn.Module:
    """GPT-2 of transformers in the same shape."""
    transformers = peer_library(GPT2)
    shape = setup.config["model"]
    config = transformers.GPT2Config(
        vocab_size=setup.n_vocab,
        n_positions=setup.segment_len,
        n_embd=shape["d_model"],
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        n_inner=shape["d_ff"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # what it would choose by itself, with a warning
    return model


def _nanogpt(setup: Setup) -> nn.Module:
    """The small GPT in the same shape."""
    from benchmarks.nanogpt import NanoGPT

    shape = setup.config["model"]
    d_ff = shape["d_ff"] or 4 * shape["d_model"]
    return NanoGPT(setup.n_vocab, shape["n_layer"], shape["n_head"], shape["d_model"], d_ff, setup.segment_len)


def ours(name: str, setup: Setup) -> nn.Module:
    """Our model without memory, or with the one of that name, else all of the configuration."""
    from memlm.assemble import build_model

    memory = setup.config["memory"]
    memory = {} if name == "none" else {name: memory[name]} if name in memory else memory
    tokenizer: Any = SimpleNamespace(vocab_size=setup.n_vocab)  # only its size is asked for
    config = setup.config | {"memory": memory, "seed": setup.seed}
    return build_model(config, tokenizer)


def fill(model: Any, setup: Setup) -> Any:
    """A state of ``model`` whose long-term banks are full: every read searches all slots from the first step on.

    Keys and values are random unit vectors. Priorities lie below those of any new slot, so that every write of a
    segment replaces a slot for the first ``n_slot`` writes.
    """
    import torch
    from torch.nn import functional as F

    from memlm.tensors import Host

    generator = torch.Generator().manual_seed(setup.seed)

    def normal(like: Tensor) -> Tensor:
        return F.normalize(torch.randn(like.shape, generator=generator), dim=-1).to(like)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(like.shape, generator=generator)).to(like)

    def full(module: Any, bank: Any) -> Any:
        return bank._replace(
            key=normal(bank.key),
            value=normal(bank.value),
            log_gate=uniform(bank.log_gate, -1, 0),
            priority=uniform(bank.priority, -1_001, -1_000),
            record=torch.zeros_like(bank.record, memory_format=torch.contiguous_format),
            document=torch.zeros_like(bank.document, memory_format=torch.contiguous_format),
            position=uniform(bank.position, 0, 100_000),
            tokens=uniform(bank.tokens, 0, setup.n_vocab),
            n_record=torch.ones_like(bank.n_record, memory_format=torch.contiguous_format),
            n_used=Host(torch.full_like(bank.n_used.tensor, bank.key.shape[1])),
        )

    return model.map_memory(full, model.init_state(setup.n_row))
