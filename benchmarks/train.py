"""Tokens per second of whole training steps: GPT-2 of transformers, and our model without and with a full memory.

Shapes: B rows, S segments, T tokens per segment, N = S * T, V vocabulary.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from benchmarks.base import (
    Peer,
    check_least,
    check_names,
    conditions,
    in_own_process,
    peak_rss,
    peer_library,
    quartiles,
    surroundings,
    torch_threads,
)
from memlm.cli import compose, to_dict
from memlm.config import ConfigError, validate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from experiments.base import Result

# Overrides of configs/train.yaml that make a size.
SIZES: dict[str, list[str]] = {"seed": ["recipe=lmcode_seed"], "default": []}
# What a candidate's speed is given as a share of.
PEERS: dict[str, list[str]] = {"gpt2": [], "none": ["gpt2"], "ltm": ["none", "gpt2"]}
GPT2 = Peer("transformers", "GPT-2 needs the library transformers", "GPT-2 out with candidates=[none,ltm]")
_CLIP = 1.0  # largest norm of the gradient
_MEMORY_STEPS = 2  # the second step also holds the optimizer's moments and a carried state


def run(
    sizes: list[Literal["seed", "default"]],
    candidates: list[Literal["gpt2", "none", "ltm"]],
    overrides: list[str],
    n_row: int,
    n_segment: int,
    warmup: int,
    rounds: int,
    steps: int,
    peak_memory: bool,
    device: str,
    precision: Literal["fp32", "bf16"],
    compile: bool,
    threads: int | None,
    seed: int,
) -> Result:
    """Tokens per second of whole training steps, candidates side by side; for the settings see the YAML.

    Returns:
        Metrics ``<size>/<candidate>/<measure>``; one row per measurement.

    Raises:
        ConfigError: If a setting cannot work.
    """
    given = {"n_row": n_row, "n_segment": n_segment, "warmup": warmup, "rounds": rounds, "steps": steps}
    check_least({**given, "threads": threads}, {"n_segment": 2})
    check_names(sizes=sizes, candidates=candidates)
    configs = {size: size_config(size, overrides) for size in sizes}
    if "gpt2" in candidates:
        peer_library(GPT2)
    import torch

    from experiments.base import Result

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={device} cannot be used here: {str(error).splitlines()[0]}") from error
    with torch_threads(threads) as n_thread:
        metadata: dict[str, Any] = {
            "settings": {
                **given, "sizes": sizes, "candidates": candidates, "overrides": overrides, "device": device,
                "precision": precision, "compile": compile, "seed": seed,
            },
            "threads": n_thread,
            **surroundings(device),
            "shapes": {}, "evidence": {},
        }  # fmt: skip
        metrics: dict[str, float] = {}
        rows: list[dict[str, Any]] = []
        for size, config in configs.items():
            setup = Setup(config, n_row, n_segment, device, precision, compile, seed)
            metadata["shapes"][size] = {
                **{key: config["model"][key] for key in ("n_layer", "n_head", "d_model", "segment_len", "overlap")},
                "n_vocab": setup.n_vocab, "tokens_per_step": setup.n_token,
                "memory_layers": config["model"]["memory_layers"], "ltm": config["memory"]["ltm"],
            }  # fmt: skip
            peaks: dict[str, dict[str, float]] = {}
            if peak_memory:  # first, while this process is small
                peaks = {name: in_own_process(peak, name, setup, n_thread) for name in candidates}
            built, seconds = measure(candidates, setup, warmup, rounds, steps)
            for name, candidate in built.items():
                metrics |= {
                    f"{size}/{name}/{key}": value for key, value in summarise(name, seconds, setup, steps).items()
                }
                metrics[f"{size}/{name}/parameters"] = candidate.n_parameter
                metrics |= {f"{size}/{name}/{key}": value for key, value in peaks.get(name, {}).items()}
                rows += [
                    {"size": size, "candidate": name, "round": i, "seconds": t, "tokens": steps * candidate.n_seen}
                    for i, t in enumerate(seconds[name])
                ]
                if name == "ltm":
                    metadata["evidence"][size] = evidence(candidate)
            del built, candidate
            gc.collect()
    return Result("benchmark_train", metrics, tuple(rows), metadata)


def size_config(size: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The composed configuration of a size, with long-term memory."""
    for override in overrides:
        if override.partition("=")[0] in ("recipe", "memory", "model"):
            raise ConfigError(f"overrides changes {override!r}, which sizes and candidates decide: leave it out.")
    config = to_dict(compose([*SIZES[size], "memory=ltm", *overrides]))
    config["memory"] = {"ltm": config["memory"]["ltm"]}  # a recipe may have settings for other memories
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
        name: One of `PEERS`.
        setup: What it is built from.

    Attributes:
        model: The model.
        state: What is carried to the next step; None if nothing is (GPT-2, or before the first step).
        last: Output of the last step.
        n_seen: Tokens that went into the last step.
    """

    def __init__(self, name: str, setup: Setup) -> None:
        import torch

        from memlm.training.module import LanguageModeling
        from memlm.training.settings import Training

        self.name, self.setup = name, setup
        torch.manual_seed(setup.seed)
        self.model: Any = (_gpt2(setup) if name == "gpt2" else _ours(name, setup)).to(setup.device).train()
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
            loss = self._peer_loss(text) if self.name == "gpt2" else self._loss(text)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
        self.optimizer.step()
        return loss.detach()

    def _peer_loss(self, text: Tensor) -> Tensor:
        ids = text[:, :-1].reshape(-1, self.setup.segment_len)  # (B * S, T)
        self.n_seen = ids.numel()
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


def _ours(name: str, setup: Setup) -> nn.Module:
    """`LMCode` without memory, or with long-term memory alone."""
    from memlm.build import build_model

    memory = {key: node for key, node in setup.config["memory"].items() if key == name}
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


def evidence(candidate: Candidate) -> dict[str, float]:
    """What the banks hold, and what the last step read and wrote.

    Returns:
        ``banks`` (one per row and layer that reads), ``slots`` of a bank, and over all banks, layers and tokens the
        least of: ``filled``, used slots of a bank; ``read``, slots that one token read with some weight; ``distinct``,
        different slots that the tokens of a layer read; ``written``, slots of a bank that come from steps so far.

    Raises:
        ValueError: If a bank is not full, a token read nothing, or a bank was not written: then the speed of a
            memory that does less was measured.
    """
    model: Any = candidate.model
    pairs = list(zip(model.memory["ltm"], candidate.state.memory["ltm"], strict=True))
    reads = list(candidate.last.reads.values())
    found = {
        "banks": sum(len(bank.key) for _, bank in pairs),
        "slots": min(module.n_slot for module, _ in pairs),
        "filled": min(int(module.filled(bank).sum(dim=1).min()) for module, bank in pairs),
        "read": min(int((read.weights > 0).sum(dim=-1).min()) for read in reads) if reads else 0,
        "distinct": min(int(read.slots[read.weights > 0].unique().numel()) for read in reads) if reads else 0,
        "written": min(int((bank.record > 0).sum(dim=1).min()) for _, bank in pairs),
    }
    if len(reads) != len(pairs) or found["filled"] < found["slots"] or not found["read"] or not found["written"]:
        raise ValueError(f"the long-term memory was not full, read and written in the step that was measured: {found}")
    return found


def measure(
    names: Sequence[str], setup: Setup, warmup: int, rounds: int, steps: int
) -> tuple[dict[str, Candidate], dict[str, list[float]]]:
    """Train all candidates in turn, so that what disturbs the machine meets all of them.

    Returns:
        The candidates, and the seconds of each of their measurements.

    Raises:
        ValueError: If a loss is not finite or candidates did not get the same number of tokens.
    """
    import torch

    def wait() -> None:
        if setup.device.startswith("cuda"):
            torch.cuda.synchronize(setup.device)

    built = {name: Candidate(name, setup) for name in names}
    for name, candidate in built.items():
        for i in range(warmup):
            loss = candidate.step(setup.batch(i))
            if not torch.isfinite(loss):
                raise ValueError(f"the loss of {name} is {loss.item()} in step {i} of the warm-up")
        if name == "ltm":
            evidence(candidate)
    if len(seen := {candidate.n_seen for candidate in built.values()}) > 1:
        raise ValueError(f"candidates got different numbers of tokens: {seen}")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        texts = [setup.batch(warmup + i * steps + j) for j in range(steps)]
        for name, candidate in built.items():
            gc.collect()
            wait()
            start = time.perf_counter()
            for text in texts:
                candidate.step(text)
            wait()
            seconds[name].append(time.perf_counter() - start)
    return built, seconds


def summarise(name: str, seconds: Mapping[str, list[float]], setup: Setup, steps: int) -> dict[str, float]:
    """Median and quartiles of tokens per second, and of the ratio to each peer of the same round."""
    found = quartiles("tokens_per_s", [setup.n_token * steps / t for t in seconds[name]])
    for peer in PEERS[name]:
        if peer in seconds:
            ratios = [theirs / ours for ours, theirs in zip(seconds[name], seconds[peer], strict=True)]
            found |= quartiles(f"vs_{peer}", ratios)
    return found


def peak(name: str, setup: Setup, threads: int) -> dict[str, float]:
    """Peak memory in MiB of training by a few steps, to be called in a fresh process.

    Returns:
        ``peak_mib``: of the process, or on an accelerator of what torch allocated there; ``idle_mib``: before the model
        was built. NaN where the system does not tell.
    """
    import torch

    import memlm.training.module  # noqa: F401 - what every candidate imports counts as idle

    if name == "gpt2":
        peer_library(GPT2)
    torch.set_num_threads(threads)
    cuda = setup.device.startswith("cuda")
    idle = 0.0 if cuda else peak_rss()
    candidate = Candidate(name, setup)
    for i in range(_MEMORY_STEPS):
        candidate.step(setup.batch(i))
    most = torch.cuda.max_memory_allocated(setup.device) / 2**20 if cuda else peak_rss()
    return {"peak_mib": most, "idle_mib": idle}


def report(result: Result) -> str:
    """The tables and the conditions, to print."""
    from experiments.base import table

    metadata, metrics = result.metadata, result.metrics
    settings = metadata["settings"]
    peers = [peer for peer in ("gpt2", "none") if any(f"/vs_{peer}" in key for key in metrics)]
    columns = ["candidate", "parameters", "tokens/s", "quartiles", *(f"vs {peer}" for peer in peers), "peak MiB"]
    texts = []
    for size, shape in metadata["shapes"].items():
        lines = []
        for name in settings["candidates"]:
            of = {key.rpartition("/")[2]: v for key, v in metrics.items() if key.startswith(f"{size}/{name}/")}
            ratios = [
                f"{of[f'vs_{p}']:.2f} ({of[f'vs_{p}_low']:.2f}-{of[f'vs_{p}_high']:.2f})" if f"vs_{p}" in of else None
                for p in peers
            ]
            speed = f"{of['tokens_per_s_low']:,.0f}-{of['tokens_per_s_high']:,.0f}"
            most = round(of["peak_mib"]) if of.get("peak_mib", float("nan")) > 0 else None
            lines.append([name, int(of["parameters"]), round(of["tokens_per_s"]), speed, *ratios, most])
        title = (
            f"{size}: {shape['n_layer']} layers, {shape['n_head']} heads, width {shape['d_model']}, vocabulary "
            f"{shape['n_vocab']:,}, context {shape['segment_len']}, {shape['tokens_per_step']:,} tokens per step"
        )
        texts.append(table(columns, lines, title))
        if found := metadata["evidence"].get(size):
            texts[-1] += (
                f"\nltm: {found['banks']} banks of {found['slots']:,} slots, all used; every token of every layer "
                f"searched them and read {found['read']} or more"
            )
    how = [
        f"Median and quartiles of {settings['rounds']} rounds of {settings['steps']} steps; ratios are per round.",
        f"{settings['precision']}{', compiled' if settings['compile'] else ''}",
    ]
    return "\n\n".join([*texts, "\n".join([*how, *conditions(metadata)])])
