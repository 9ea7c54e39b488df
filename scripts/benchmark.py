"""Measure speed: `python scripts/benchmark.py train [key=value ...]`, or another name below.

Each benchmark is a function of this file with settings of the same names in `configs/benchmark/<name>.yaml`; it returns
a `Result`. What is measured and why is told in `docs/benchmarks.md`.

Shapes: B rows, S segments, T tokens per segment, N = S * T, V vocabulary.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from memlm.config import ConfigError, cli, compose, did_you_mean, to_dict, validate

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor, nn

    from experiments.base import Result

# Overrides of configs/train.yaml that make a size.
SIZES: dict[str, list[str]] = {"seed": ["recipe=lmcode_seed"], "default": []}
# What a candidate's speed is given as a share of.
PEERS: dict[str, list[str]] = {"gpt2": [], "none": ["gpt2"], "ltm": ["none", "gpt2"]}
_CLIP = 1.0  # largest norm of the gradient
_LIBRARIES = ("torch", "transformers", "memoria-pytorch", "faiss-cpu")  # whose versions a result names
_SHIFT = 41  # tokens by which a further reading of a text begins later
_MEMORY_STEPS = 2  # the second step also holds the optimizer's moments and a carried state


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


class Peer(NamedTuple):
    """A library that is compared with.

    Attributes:
        module: What is imported.
        needs: What a comparison needs it for, in words.
        without: How to do without.
    """

    module: str
    needs: str
    without: str


GPT2 = Peer("transformers", "GPT-2 needs the library transformers", "GPT-2 out with candidates=[none,ltm]")
MEMORIA_PEER = "memoria-pytorch"
FAISS = Peer("faiss", "faiss needs the library faiss-cpu", "faiss out with candidates=[exact,inverted,torch]")
MEMORIA = Peer("memoria", f"{MEMORIA_PEER} needs it", f"{MEMORIA_PEER} out of candidates")


def peer_library(peer: Peer) -> Any:
    """The library of a peer.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        return importlib.import_module(peer.module)
    except ImportError as error:
        raise ConfigError(
            f"The comparison with {peer.needs}: install it with pip install 'memlm[bench]' "
            f"(in a checkout: pip install -e '.[bench]'), or leave {peer.without}."
        ) from error


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
            host_used=torch.full_like(bank.host_used, bank.key.shape[1], memory_format=torch.contiguous_format),
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


def train(
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
    least = {"n_row": 1, "n_segment": 2, "warmup": 1, "rounds": 1, "steps": 1, "threads": 1}
    given = {"n_row": n_row, "n_segment": n_segment, "warmup": warmup, "rounds": rounds, "steps": steps}
    for key, value in (given | ({} if threads is None else {"threads": threads})).items():
        if value < least[key]:
            raise ConfigError(f"{key} must be at least {least[key]}, got {value}.")
    chosen: dict[str, Sequence[str]] = {"sizes": sizes, "candidates": candidates}
    for key, names in chosen.items():
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"{key} must name at least one, and each once; got {list(names)}.")
    configs = {size: size_config(size, overrides) for size in sizes}
    if "gpt2" in candidates:
        peer_library(GPT2)
    import torch

    from experiments.base import Result

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={device} cannot be used here: {str(error).splitlines()[0]}") from error
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    metadata: dict[str, Any] = {
        "settings": {
            **given, "sizes": sizes, "candidates": candidates, "overrides": overrides, "device": device,
            "precision": precision, "compile": compile, "seed": seed,
        },
        "threads": torch.get_num_threads(),
        **surroundings(device),
        "shapes": {}, "evidence": {},
    }  # fmt: skip
    metrics: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    try:
        for size, config in configs.items():
            setup = Setup(config, n_row, n_segment, device, precision, compile, seed)
            metadata["shapes"][size] = {
                **{key: config["model"][key] for key in ("n_layer", "n_head", "d_model", "segment_len", "overlap")},
                "n_vocab": setup.n_vocab, "tokens_per_step": setup.n_token,
                "memory_layers": config["model"]["memory_layers"], "ltm": config["memory"]["ltm"],
            }  # fmt: skip
            peaks: dict[str, dict[str, float]] = {}
            if peak_memory:  # first, while this process is small
                peaks = {name: _in_own_process(peak, name, setup, torch.get_num_threads()) for name in candidates}
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
    finally:
        torch.set_num_threads(before)
    return Result("benchmark_train", metrics, tuple(rows), metadata)


def size_config(size: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The composed configuration of a size, with long-term memory."""
    for override in overrides:
        if override.partition("=")[0] in ("recipe", "memory", "model"):
            raise ConfigError(f"overrides changes {override!r}, which sizes and candidates decide: leave it out.")
    config = compose([*SIZES[size], "memory=ltm", *overrides])
    for part in ("model", "training"):
        validate(config[part], key=part)
    plain = to_dict(config)
    plain["memory"] = {"ltm": plain["memory"]["ltm"]}  # a recipe may have settings for other memories
    validate(plain["memory"], key="memory")
    return plain


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
    found = _quartiles("tokens_per_s", [setup.n_token * steps / t for t in seconds[name]])
    for peer in PEERS[name]:
        if peer in seconds:
            ratios = [theirs / ours for ours, theirs in zip(seconds[name], seconds[peer], strict=True)]
            found |= _quartiles(f"vs_{peer}", ratios)
    return found


def _quartiles(key: str, values: list[float]) -> dict[str, float]:
    """``key_low``, ``key`` and ``key_high``: lower quartile, median and upper quartile."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return dict(zip((f"{key}_low", key, f"{key}_high"), quartiles, strict=True))


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
    idle = 0.0 if cuda else _peak_rss()
    candidate = Candidate(name, setup)
    for i in range(_MEMORY_STEPS):
        candidate.step(setup.batch(i))
    most = torch.cuda.max_memory_allocated(setup.device) / 2**20 if cuda else _peak_rss()
    return {"peak_mib": most, "idle_mib": idle}


def _peak_rss() -> float:
    """Largest resident size of this process so far, in MiB; NaN where the system does not tell."""
    try:
        # Not getrusage: on Linux its value begins with the size of the process that started this one.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    except OSError:
        pass
    try:
        resource: Any = importlib.import_module("resource")
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _in_own_process(function: Callable[..., dict[str, Any]], name: Any, *arguments: Any) -> dict[str, Any]:
    """Call a function of this file in a fresh process."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, name, *arguments).result()
        except BrokenProcessPool as error:
            raise ValueError(
                f"the process that measures {name!r} was ended by the system, most likely for want of memory: "
                "lower n_row or n_segment, or leave out the largest of sizes"
            ) from error


def surroundings(device: str) -> dict[str, Any]:
    """Where and with what something was measured."""
    import torch

    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    libraries = {name: _version(name) for name in _LIBRARIES}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": None if (status := git("status", "--porcelain")) is None else bool(status),
        "processor": f"{processor}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "accelerator": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **libraries,
    }


def _version(library: str) -> str | None:
    """Version of an installed library."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def report(result: Result) -> str:
    """The tables and the conditions of a training benchmark, to print."""
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


def conditions(metadata: Mapping[str, Any]) -> list[str]:
    """Lines on where, with what and when something was measured."""
    state = {True: " with uncommitted changes", False: "", None: ""}[metadata["uncommitted_changes"]]
    libraries = ", ".join(f"{name} {metadata[name]}" for name in _LIBRARIES if metadata[name] is not None)
    return [
        f"{metadata['accelerator'] or metadata['processor']}; {metadata['threads']} threads; load before "
        f"{metadata['load_before']}",
        f"{libraries}, Python {metadata['python']}; commit {metadata['commit']}{state}; {metadata['date']}",
    ]


class EngramSteps:
    """Engrams of one candidate of `memoria`.

    Args:
        name: ``memoria-pytorch``, ``memlm``, ``memlm compiled`` or ``memlm as 1.1.0``.
        n_row: Rows.
        d_model: Width of an engram.
        settings: Of `memlm.memory.memoria.EngramGraph`.
    """

    def __init__(self, name: str, n_row: int, d_model: int, settings: Mapping[str, int]) -> None:
        import torch

        from memlm.memory.memoria import EngramGraph

        self.peer: Any = None
        if name == MEMORIA_PEER:
            self.peer = peer_library(MEMORIA).Memoria(
                num_reminded_stm=settings["n_reminded_stm"],
                stm_capacity=settings["n_stm"],
                ltm_search_depth=settings["search_depth"],
                initial_lifespan=settings["lifespan"],
                num_final_ltms=settings["n_reminded_ltm"],
            )
            return
        graph = EngramGraph(**settings, compat="1.1.0" if name == "memlm as 1.1.0" else "none")
        self.engrams: Any = graph.empty(n_row, d_model)
        self.reminded: Any = None

        def remember(engrams: Any, data: Tensor) -> Any:
            return graph.remind(graph.add(engrams, data))

        compiled = name == "memlm compiled"
        self._remember: Any = torch.compile(remember, fullgraph=True) if compiled else remember
        self._adjust: Any = torch.compile(graph.adjust, fullgraph=True) if compiled else graph.adjust

    def remember(self, data: Tensor) -> Tensor:
        """Add engrams ``data`` (B, W, D) and remind. Returns what was reminded, (B, R), -1 where none."""
        if self.peer is not None:
            self.peer.add_working_memory(data)
            _, self.reminded = self.peer.remind()
        else:
            self.engrams, self.reminded = self._remember(self.engrams, data)
        return self.reminded

    def adjust(self, gain: Tensor) -> None:
        """Pass a segment, with what ``gain`` (B, R) adds to the lives of the reminded."""
        if self.peer is not None:
            self.peer.adjust_lifespan_and_memories(self.reminded, gain)
        else:
            self.engrams = self._adjust(self.engrams, self.reminded, gain)

    @property
    def n_engram(self) -> float:
        """Engrams of a row, the mean over rows."""
        kind = self.engrams.kind if self.peer is None else self.peer.engrams.engrams_types
        return float((kind > 0).sum(dim=1).float().mean())

    @property
    def n_byte(self) -> int:
        """Bytes of the engrams and their graph."""
        from memlm.memory.state import n_byte

        if self.peer is None:
            return n_byte(self.engrams)
        held = self.peer.engrams
        return n_byte((held.data, held.induce_counts, held.engrams_types, held.lifespan))


def memoria(
    candidates: list[Literal["memoria-pytorch", "memlm", "memlm compiled", "memlm as 1.1.0"]],
    n_row: int,
    n_working: int,
    d_model: int,
    n_slot: int,
    n_stm: int,
    n_reminded_stm: int,
    n_reminded_ltm: int,
    search_depth: int,
    lifespan: int,
    extension: float,
    warmup: int,
    rounds: int,
    threads: int | None,
    seed: int,
) -> Result:
    """Milliseconds of one step of engrams, candidates side by side; for the settings see the YAML.

    All get the same random engrams. Each reminded engram gets a random share of ``extension`` times their number.

    Returns:
        Metrics ``<candidate>/<measure>``; one row per candidate and step.

    Raises:
        ConfigError: If a setting cannot work.
    """
    for key, value in {
        "n_row": n_row,
        "d_model": d_model,
        "warmup": warmup,
        "rounds": rounds,
        "threads": threads,
    }.items():
        if value is not None and value < 1:
            raise ConfigError(f"{key} must be at least 1, got {value}.")
    if not candidates or len(set(candidates)) < len(candidates):
        raise ConfigError(f"candidates must name at least one, and each once; got {list(candidates)}.")
    if MEMORIA_PEER in candidates:
        peer_library(MEMORIA)
    import torch

    from experiments.base import Result
    from memlm.memory.memoria import MemoriaMemory

    settings = {
        "n_slot": n_slot, "n_working": n_working, "n_stm": n_stm, "n_reminded_stm": n_reminded_stm,
        "n_reminded_ltm": n_reminded_ltm, "search_depth": search_depth, "lifespan": lifespan,
    }  # fmt: skip
    try:
        MemoriaMemory(
            d_model, n_slot, n_working, n_stm, n_reminded_stm, n_reminded_ltm, search_depth, lifespan, extension, 1
        )
    except ValueError as error:
        raise ConfigError(f"{error}.") from error
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    metadata: dict[str, Any] = {
        "settings": {
            **settings, "candidates": candidates, "n_row": n_row, "d_model": d_model, "extension": extension,
            "warmup": warmup, "rounds": rounds, "seed": seed,
        },
        "threads": torch.get_num_threads(),
        **surroundings("cpu"),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    built = {name: EngramSteps(name, n_row, d_model, settings) for name in candidates}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    rows: list[dict[str, Any]] = []
    try:
        with torch.no_grad():
            for i in range(warmup + rounds):
                data = 0.3 * torch.randn(n_row, n_working, d_model, generator=generator)
                luck = torch.rand(n_row, n_slot, generator=generator)
                for name, steps in built.items():
                    gc.collect()
                    start = time.perf_counter()
                    reminded = steps.remember(data)
                    between = time.perf_counter()
                    share = luck[:, : reminded.shape[1]] * (reminded >= 0)
                    total = extension * (reminded >= 0).sum(dim=1, keepdim=True)
                    gain = total * share / share.sum(dim=1, keepdim=True).clamp(min=1e-9)
                    again = time.perf_counter()
                    steps.adjust(gain)
                    spent = between - start + time.perf_counter() - again
                    if i >= warmup:
                        seconds[name].append(spent)
                        rows.append(
                            {"candidate": name, "round": i - warmup, "seconds": spent, "engrams": steps.n_engram}
                        )
    finally:
        torch.set_num_threads(before)
    metrics: dict[str, float] = {}
    for name, steps in built.items():
        metrics |= _quartiles(f"{name}/ms", [1000 * t for t in seconds[name]])
        metrics[f"{name}/engrams"] = steps.n_engram
        metrics[f"{name}/mib"] = steps.n_byte / 2**20
        if name != MEMORIA_PEER and MEMORIA_PEER in seconds:
            ratios = [theirs / ours for ours, theirs in zip(seconds[name], seconds[MEMORIA_PEER], strict=True)]
            metrics |= _quartiles(f"{name}/speedup", ratios)
    return Result("benchmark_memoria", metrics, tuple(rows), metadata)


def report_memoria(result: Result) -> str:
    """The table and the conditions of `memoria`, to print."""
    from experiments.base import table

    metrics, settings = result.metrics, result.metadata["settings"]
    lines = []
    for name in settings["candidates"]:
        of = {key.rpartition("/")[2]: value for key, value in metrics.items() if key.startswith(f"{name}/")}
        ratio = f"{of['speedup']:.1f} ({of['speedup_low']:.1f}-{of['speedup_high']:.1f})" if "speedup" in of else None
        spread = f"{of['ms_low']:,.0f}-{of['ms_high']:,.0f}"
        lines.append([name, round(of["ms"]), spread, ratio, round(of["engrams"]), round(of["mib"])])
    columns = ["candidate", "ms", "quartiles", "times as fast", "engrams", "MiB"]
    title = (
        f"{settings['n_row']} rows, {settings['n_working']} new engrams of width {settings['d_model']}, short-term "
        f"{settings['n_stm']}, reminded {settings['n_reminded_stm']}/{settings['n_reminded_ltm']}, depth "
        f"{settings['search_depth']}, lifespan {settings['lifespan']}, extension {settings['extension']:g}"
    )
    rounds = f"Median and quartiles of {settings['rounds']} steps; ratios are per step."
    return "\n\n".join([table(columns, lines, title), "\n".join([rounds, *conditions(result.metadata)])])


def exchange(
    n_process: int, overrides: list[str], n_row: int, n_segment: int, warmup: int, rounds: int, seed: int
) -> Result:
    """Share of a training step that processes spend on a shared bank which is dealt out to them; see the YAML.

    Returns:
        Metrics ``sending`` and ``waiting`` (for the slower process), as shares of a step; one row per step and process.

    Raises:
        ConfigError: If a setting cannot work.
    """
    import tempfile

    from torch import multiprocessing

    from experiments.base import Result

    least = {"n_process": 2, "n_row": n_process, "n_segment": 2, "warmup": 1, "rounds": 1}
    given = {"n_process": n_process, "n_row": n_row, "n_segment": n_segment, "warmup": warmup, "rounds": rounds}
    for key, value in given.items():
        if value < least[key]:
            raise ConfigError(f"{key} must be at least {least[key]}, got {value}.")
    config = size_config("default", ["memory.ltm.scope=shared", "memory.ltm.shard=true", *overrides])
    setup = Setup(config, n_row // n_process, n_segment, "cpu", "fp32", False, seed)
    before = surroundings("cpu")
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            _exchange_steps, (n_process, setup, warmup, rounds, folder), n_process, start_method="fork"
        )
        rows = [row for rank in range(n_process) for row in json.loads(Path(folder, f"{rank}.json").read_text())]
    shares = {key: [row[key] / row["seconds"] for row in rows] for key in ("sending", "waiting")}
    metrics = {name: value for key, parts in shares.items() for name, value in _quartiles(key, parts).items()}
    metadata = {"settings": given | {"overrides": overrides, "seed": seed}, "threads": 1, **before}
    return Result("benchmark_exchange", metrics, tuple(rows), metadata)


def _exchange_steps(rank: int, n_rank: int, setup: Setup, warmup: int, rounds: int, folder: str) -> None:
    """Train in one of several processes; what its steps took, in seconds, is written to ``folder``."""
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_rank)
    spent = {"sending": 0.0, "waiting": 0.0}

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*arguments: Any) -> Any:
            begin = time.perf_counter()
            distributed.barrier()
            between = time.perf_counter()
            result = call(*arguments)
            spent["waiting"] += between - begin
            spent["sending"] += time.perf_counter() - between
            return result

        return timed_call

    candidate = Candidate("ltm", setup)
    for module in candidate.model.memory["ltm"]:
        module.over_ranks = True
        module.deal(rank, n_rank)
    candidate.state = fill(candidate.model, setup)
    for name in ("all_gather", "all_to_all_single"):  # what `memlm.memory.ranks` sends with
        setattr(distributed, name, timed(getattr(distributed, name)))
    rows = []
    for i in range(warmup + rounds):
        spent.update(sending=0.0, waiting=0.0)
        distributed.barrier()
        begin = time.perf_counter()
        candidate.step(setup.batch(i))
        if i >= warmup:
            rows.append({"process": rank, "step": i, "seconds": time.perf_counter() - begin, **spent})
    Path(folder, f"{rank}.json").write_text(json.dumps(rows))
    distributed.destroy_process_group()


def report_exchange(result: Result) -> str:
    """The shares and the conditions of `exchange`, to print."""
    from experiments.base import table

    lines = [
        [key, *(f"{100 * result.metrics[f'{key}{part}']:.1f} %" for part in ("", "_low", "_high"))]
        for key in ("sending", "waiting")
    ]
    settings = result.metadata["settings"]
    title = (
        f"a bank dealt out to {settings['n_process']} processes: share of a training step, {settings['n_row']} rows of "
        f"{settings['n_segment']} segments"
    )
    return "\n\n".join([table(["", "median", "from", "to"], lines, title), "\n".join(conditions(result.metadata))])


def near_duplicates(
    n_slot: int, duplicates: float, similarity: float, cluster: int, d_key: int, d_value: int, seed: int
) -> tuple[Any, Any, int]:
    """A full bank in which some slots are near another one, each pair by itself, and none else is.

    Keys lie in clusters; values are random, so that slots of a cluster hold different things. Of a pair both keys and
    values have the cosine ``similarity``.

    Returns:
        The memory, its state, and the number of pairs.
    """
    import torch
    from torch.nn import functional as F

    from memlm.memory.ltm import LongTermMemory

    generator = torch.Generator().manual_seed(seed)
    memory = LongTermMemory(d_key, n_slot, d_key, d_value)

    def unit(n: int, d: int) -> Tensor:
        return F.normalize(torch.randn(n, d, generator=generator), dim=-1)

    n_pair = round(duplicates * n_slot)
    first, second = torch.randperm(n_slot, generator=generator)[: 2 * n_pair].chunk(2)

    def with_pairs(part: Tensor) -> Tensor:
        """Unit vectors (n, d), the second of each pair in place near the first."""
        noise = unit(n_pair, part.shape[1])
        across = F.normalize(noise - (noise * part[first]).sum(dim=1, keepdim=True) * part[first], dim=-1)
        part[second] = similarity * part[first] + (1 - similarity**2) ** 0.5 * across
        return part[None]

    centre = unit(max(n_slot // cluster, 1), d_key)
    key = F.normalize(
        centre[torch.randint(len(centre), (n_slot,), generator=generator)].add_(unit(n_slot, d_key), alpha=0.7), dim=-1
    )
    bank = memory.init_state(1)
    state = bank._replace(
        key=with_pairs(key),
        value=with_pairs(unit(n_slot, d_value)),
        log_gate=-torch.rand(1, n_slot, generator=generator),
        priority=-torch.rand(1, n_slot, generator=generator),
        record=torch.zeros(1, n_slot, dtype=torch.long),
        document=torch.zeros(1, n_slot, dtype=torch.long),
        position=torch.arange(n_slot)[None],
        tokens=torch.zeros_like(bank.tokens, memory_format=torch.contiguous_format),
        n_record=torch.ones(1, dtype=torch.long),
        host_used=torch.tensor([n_slot]),
    )
    return memory, state, n_pair


def consolidate_bank(
    n_slot: int,
    duplicates: float,
    similarity: float,
    cluster: int,
    passes: int,
    d_key: int,
    d_value: int,
    threads: int,
    seed: int,
) -> dict[str, Any]:
    """Consolidate one bank in turns, to be called in a fresh process.

    Returns:
        ``turns``: seconds and merged slots of each; ``pairs``; ``n_turn`` of a pass; ``bank_mib``; ``peak_mib``, by how
        much the process grew beyond the bank and what was there before (NaN where the system does not tell).
    """
    import torch

    from memlm.memory.state import n_byte

    torch.set_num_threads(threads)
    memory, state, n_pair = near_duplicates(n_slot, duplicates, similarity, cluster, d_key, d_value, seed)
    gc.collect()
    before = _forget_peak_rss()
    turns: list[list[float]] = []
    for turn in range(passes * memory.n_turn):
        start = time.perf_counter()
        state, report = memory.consolidate(state, turn=turn)
        turns.append([time.perf_counter() - start, report["merged"]])
    return {
        "turns": turns,
        "pairs": n_pair,
        "n_turn": memory.n_turn,
        "bank_mib": n_byte(state) / 2**20,
        "peak_mib": _peak_rss() - before,
    }


def _forget_peak_rss() -> float:
    """Resident size of this process in MiB, from which `_peak_rss` counts on; NaN where the system does not let it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan")
    return _peak_rss()


def consolidate(
    sizes: list[int],
    duplicates: float,
    similarity: float,
    cluster: int,
    passes: int,
    d_key: int,
    d_value: int,
    threads: int | None,
    seed: int,
) -> Result:
    """Seconds, memory and finds of consolidating large banks; for the settings see the YAML.

    Returns:
        Metrics ``<slots>/<measure>``; one row per size and turn.

    Raises:
        ConfigError: If a setting cannot work.
    """
    for name, value in {"cluster": cluster, "passes": passes, "d_key": d_key, "d_value": d_value,
                        "threads": threads}.items():  # fmt: skip
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}.")
    if not sizes or len(set(sizes)) < len(sizes) or min(sizes) < 100 or max(sizes) >= 2**22:
        raise ConfigError(f"sizes must name at least one, each once, and each in 100..{2**22 - 1}; got {list(sizes)}.")
    if not 0 < duplicates <= 0.5:
        raise ConfigError(f"duplicates must be in (0, 0.5], as each is near another slot, got {duplicates}.")
    if not 0.9 < similarity <= 1:
        raise ConfigError(
            f"similarity must be in (0.9, 1]: slots that differ by more are not merged, got {similarity}."
        )
    import torch

    from experiments.base import Result

    settings = {"duplicates": duplicates, "similarity": similarity, "cluster": cluster, "passes": passes,
                "d_key": d_key, "d_value": d_value}  # fmt: skip
    n_thread = torch.get_num_threads() if threads is None else threads
    metadata = {"settings": settings | {"sizes": sizes, "seed": seed}, "threads": n_thread, **surroundings("cpu")}
    metrics: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for n_slot in sizes:
        found = _in_own_process(consolidate_bank, n_slot, *settings.values(), n_thread, seed)
        seconds = [turn[0] for turn in found["turns"]]
        metrics |= {f"{n_slot}/{key}": value for key, value in _quartiles("seconds", seconds).items()}
        metrics |= {f"{n_slot}/{key}": found[key] for key in ("pairs", "n_turn", "bank_mib", "peak_mib")}
        total = 0
        for i, (spent, merged) in enumerate(found["turns"]):
            total += merged
            rows.append({"slots": n_slot, "turn": i, "seconds": spent, "merged": merged})
            if (i + 1) % found["n_turn"] == 0:
                metrics[f"{n_slot}/found_{(i + 1) // found['n_turn']}"] = total / found["pairs"]
    return Result("benchmark_consolidate", metrics, tuple(rows), metadata)


def report_consolidate(result: Result) -> str:
    """The table and the conditions of `consolidate`, to print."""
    from experiments.base import table

    metrics, settings = result.metrics, result.metadata["settings"]
    lines = []
    for n_slot in settings["sizes"]:
        of = {key.rpartition("/")[2]: value for key, value in metrics.items() if key.startswith(f"{n_slot}/")}
        shares = [f"{100 * of[f'found_{i + 1}']:.1f} %" for i in range(settings["passes"])]
        spread = f"{of['seconds_low']:.2f}-{of['seconds_high']:.2f}"
        most = None if of["peak_mib"] != of["peak_mib"] else round(of["peak_mib"])
        lines.append([n_slot, round(of["seconds"], 2), spread, int(of["n_turn"]), most, round(of["bank_mib"]), *shares])
    columns = ["slots", "s per turn", "quartiles", "turns of a pass", "peak MiB beside bank", "bank MiB"]
    columns += [f"found in {i + 1}" for i in range(settings["passes"])]
    title = (
        f"{100 * settings['duplicates']:g} % of the slots near another one (cosine {settings['similarity']:g}); keys "
        f"of {settings['d_key']}, values of {settings['d_value']}, clusters of {settings['cluster']}"
    )
    return "\n\n".join([table(columns, lines, title), "\n".join(conditions(result.metadata))])


class Keys(NamedTuple):
    """What is searched, and for what.

    Attributes:
        key: Unit keys, (M, d_key).
        bias: What each slot adds to its score, (M,).
        query: Unit queries, (N, d_key), made from other text than the keys.
        temperature: Inverse temperature of the scores.
    """

    key: Tensor
    bias: Tensor
    query: Tensor
    temperature: float


def made_keys(n_key: int, n_query: int, d_key: int, clusters: bool, seed: int) -> Keys:
    """Random unit keys without bias; with ``clusters`` around as many random centres as half the root of ``n_key``."""
    import torch
    from torch.nn import functional as F

    generator = torch.Generator().manual_seed(seed)

    def normal(n: int) -> Tensor:
        return F.normalize(torch.randn(n, d_key, generator=generator), dim=1)

    parts = normal(n_key), normal(n_query)
    if clusters:
        centre = normal(max(1, math.isqrt(n_key) // 2))
        parts = tuple(  # type: ignore[assignment]
            F.normalize(centre[torch.randint(len(centre), (len(part),), generator=generator)] + 0.5 * part, dim=1)
            for part in parts
        )
    return Keys(parts[0], torch.zeros(n_key), parts[1], 12.0)


def trained_keys(checkpoint: str, n_key: int, n_query: int, cache: str | None) -> Keys:
    """Keys and biases that a trained model writes of its training text, and queries that it makes of held-out text.

    All tokens are written, and nothing is read. Each further reading of the text begins `_SHIFT` tokens later in its
    segment, so that no segment comes twice.

    Raises:
        ConfigError: If the model has no long-term memory, or the held-out text is too short for the queries.
    """
    import numpy as np
    import torch

    from memlm.checkpoint import load_run, read_plain
    from memlm.training.module import memory_settings

    if cache and Path(cache).exists():
        kept = Keys(**read_plain(Path(cache)))
        if len(kept.key) < n_key or len(kept.query) < n_query:
            raise ConfigError(
                f"{cache} has {len(kept.key):,} keys and {len(kept.query):,} queries, but {n_key:,} and {n_query:,} "
                "are needed: remove it, or name another cache"
            )
        return kept
    loaded, data = load_run(checkpoint)
    model: Any = loaded
    if "ltm" not in model.memory:
        raise ConfigError(f"checkpoint must name a model with memory=ltm; {checkpoint} has {', '.join(model.memory)}")
    module, n_row, n_token = model.memory["ltm"][0], 8, 16 * model.segment_len

    def written(split: str, n: int) -> tuple[Tensor, Tensor]:
        ids = torch.from_numpy(np.asarray(data.tokens(split).tokens, dtype=np.int64))
        found: list[tuple[Tensor, Tensor]] = []
        for reading in range(model.segment_len):
            rows = ids[reading * _SHIFT % model.segment_len :]
            rows = rows[: len(rows) // n_row * n_row].view(n_row, -1)
            state = None
            for text in rows.split(n_token, dim=1):
                state = model(text, state=None if state is None else model.wipe(state), read=False, logits=False).state
                bank = state.memory["ltm"][0]
                used = module.filled(bank)
                found.append((bank.key[used], module.bias(bank.log_gate[used])))
                if sum(len(key) for key, _ in found) >= n:
                    return torch.cat([key for key, _ in found])[:n], torch.cat([bias for _, bias in found])[:n]
        raise ConfigError(
            f"the {split} text gives {sum(len(key) for key, _ in found):,} keys, but {n:,} are needed: give a "
            "checkpoint that was trained on more text, or lower sizes and n_query"
        )

    with torch.no_grad(), memory_settings(model, {"ltm.write_budget": None, "ltm.n_slot": n_token + model.segment_len}):
        key, bias = written("train", n_key)
        query, _ = written("val", n_query)
        temperature = float(module.log_temperature.exp() * module.temperature_scale)
    keys = Keys(key, bias, query, temperature)
    if cache:
        torch.save(keys._asdict(), cache)
    return keys


class Searcher:
    """A candidate of `retrieval` over one set of keys.

    Args:
        name: ``exact``, ``inverted``, ``torch``, ``faiss flat``, ``faiss ivf`` or ``faiss hnsw``.
        keys: What is searched.
        top_k: Slots that a query finds.
        n_list: Lists; None for the default of ``memory=ltm``.
        n_probe: Lists that a query searches; None for the default of ``memory=ltm``.
    """

    def __init__(self, name: str, keys: Keys, top_k: int, n_list: int | None, n_probe: int | None) -> None:
        import torch

        from memlm.retrieval.exact import Pool
        from memlm.retrieval.inverted import InvertedFile

        self.name, self.keys, self.top_k = name, keys, top_k
        self.temperature = torch.tensor(keys.temperature)
        visible = torch.ones(1, 1, len(keys.key), dtype=torch.bool)
        self.pool = Pool(keys.key[None], keys.key[None], keys.bias[None], visible)
        file = InvertedFile(len(keys.key), keys.key.shape[1], n_list, n_probe)
        self._find: Any = None
        if name == "inverted":
            lists = file.rebuild(file.empty(1, keys.key.device), self.pool.key, visible[0], torch.ones(1).bool())
            self._find = lambda *arguments: file.search(lists, *arguments)
        elif name.startswith("faiss"):
            faiss = peer_library(FAISS)
            n, width = len(keys.key), keys.key.shape[1] + 1
            if name == "faiss ivf":
                flat = faiss.IndexFlatIP(width)
                self.peer = faiss.IndexIVFFlat(flat, width, min(file.n_list, n), faiss.METRIC_INNER_PRODUCT)
                self.peer.nprobe = file.n_probe
            elif name == "faiss hnsw":
                self.peer = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
                self.peer.hnsw.efSearch = 4 * top_k
            else:
                self.peer = faiss.IndexFlatIP(width)
            # The bias is one number more of a key, and 1 / temperature one of a query: the order of scores is the same.
            wide = torch.cat([keys.key, keys.bias[:, None] / keys.temperature], dim=1).numpy()
            self.peer.train(wide)
            self.peer.add(wide)

    def search(self, query: Tensor) -> Tensor:
        """The best slots of each query (N, d_key), (N, k), in any order."""
        import torch
        from torch.nn import functional as F

        from memlm.retrieval import exact

        if self.name == "torch":
            return torch.addmm(self.keys.bias, query * self.temperature, self.keys.key.T).topk(self.top_k).indices
        if self.name.startswith("faiss"):
            return torch.from_numpy(self.peer.search(F.pad(query, (0, 1), value=1.0).numpy(), self.top_k)[1])
        find = self._find or exact.search
        return find(query[None], self.temperature, -1.0, self.top_k, self.pool)[1][0]

    def learn(self, query: Tensor) -> None:
        """A whole read of the values, softmax and all, and its backward pass; not for faiss."""
        import torch

        from memlm.retrieval.exact import attend

        query, temperature = query.clone().requires_grad_(), self.temperature.clone().requires_grad_()
        if self.name == "torch":
            score, index = torch.addmm(self.keys.bias, query * temperature, self.keys.key.T).topk(self.top_k)
            read = (score.softmax(dim=1)[..., None] * self.keys.key[index]).sum(dim=1)
        else:
            null = torch.zeros(())
            read = attend(query[None], temperature, null, -1.0, self.top_k, self.pool, None, find=self._find)[0]
        read.sum().backward()


def retrieval(
    candidates: list[Literal["exact", "inverted", "torch", "faiss flat", "faiss ivf", "faiss hnsw"]],
    keys: list[Literal["trained", "clustered", "random"]],
    checkpoint: str | None,
    cache: str | None,
    sizes: list[int],
    d_key: int,
    n_query: int,
    top_k: int,
    n_list: int | None,
    n_probe: int | None,
    hnsw_most: int,
    rounds: int,
    threads: int | None,
    seed: int,
) -> Result:
    """Milliseconds and recall of searches, candidates side by side; for the settings see the YAML.

    Returns:
        Metrics ``<keys>/<slots>/<candidate>/<measure>`` and, by the slope of log time over log slots,
        ``<keys>/<candidate>/exponent``; one row per keys, slots, candidate, round and what was done.

    Raises:
        ConfigError: If a setting cannot work.
    """
    for key, value in {
        "n_query": n_query, "top_k": top_k, "d_key": d_key, "rounds": rounds, "threads": threads, "n_list": n_list,
        "n_probe": n_probe,
    }.items():  # fmt: skip
        if value is not None and value < 1:
            raise ConfigError(f"{key} must be at least 1, got {value}.")
    chosen: dict[str, Sequence[Any]] = {"candidates": candidates, "keys": keys, "sizes": sizes}
    for key, values in chosen.items():
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{key} must name at least one, and each once; got {list(values)}.")
    if min(sizes) < max(top_k, n_list or 1):
        raise ConfigError(f"sizes must be at least top_k ({top_k}) and n_list ({n_list}), got {min(sizes)}.")
    faiss = peer_library(FAISS) if any(name.startswith("faiss") for name in candidates) else None
    import torch

    from experiments.base import Result

    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    if faiss is not None:
        faiss.omp_set_num_threads(torch.get_num_threads())
    metadata: dict[str, Any] = {
        "settings": {
            "candidates": candidates, "keys": keys, "checkpoint": checkpoint, "sizes": sizes, "n_query": n_query,
            "top_k": top_k, "n_list": n_list, "n_probe": n_probe, "rounds": rounds, "seed": seed,
        },
        "threads": torch.get_num_threads(),
        **surroundings("cpu"),
    }  # fmt: skip
    metrics: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    try:
        for source in dict.fromkeys("clustered" if k == "trained" and checkpoint is None else k for k in keys):
            if source == "trained":
                every = trained_keys(str(checkpoint), max(sizes), n_query * rounds, cache)
            else:
                every = made_keys(max(sizes), n_query * rounds, d_key, source == "clustered", seed)
            for size in sizes:
                some = every._replace(key=every.key[:size], bias=every.bias[:size])
                names = [name for name in candidates if name != "faiss hnsw" or size <= hnsw_most]
                found, timed = _search_in_turn(names, some, top_k, n_list, n_probe, n_query, rounds)
                metrics |= {f"{source}/{size}/{name}": value for name, value in found.items()}
                rows += [{"keys": source, "slots": size, **row} for row in timed]
            for name in candidates:
                known = [size for size in sizes if f"{source}/{size}/{name}/ms" in metrics]
                if len(known) > 1:
                    times = [math.log(metrics[f"{source}/{size}/{name}/ms"]) for size in known]
                    slope = statistics.linear_regression([math.log(size) for size in known], times).slope
                    metrics[f"{source}/{name}/exponent"] = slope
    finally:
        torch.set_num_threads(before)
    return Result("benchmark_retrieval", metrics, tuple(rows), metadata)


def _search_in_turn(
    names: Sequence[str],
    keys: Keys,
    top_k: int,
    n_list: int | None,
    n_probe: int | None,
    n_query: int,
    rounds: int,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics ``<candidate>/<measure>`` of searches of the same keys, and a row for each measurement."""
    import torch

    metrics: dict[str, float] = {}
    built: dict[str, Searcher] = {}
    for name in names:
        start = time.perf_counter()
        built[name] = Searcher(name, keys, top_k, n_list, n_probe)
        metrics[f"{name}/build_s"] = time.perf_counter() - start
    true = Searcher("exact", keys, top_k, None, None)
    seconds: dict[str, list[float]] = {}
    rows: list[dict[str, Any]] = []
    recalls: dict[str, list[float]] = {name: [] for name in names}

    def measure_one(name: str, what: str, run: Callable[[Tensor], Any], query: Tensor) -> Any:
        start = time.perf_counter()
        done = run(query)
        spent = time.perf_counter() - start
        seconds.setdefault(f"{name}/{what}", []).append(spent)
        rows.append({"candidate": name, "what": what, "round": len(seconds[f"{name}/{what}"]) - 1, "seconds": spent})
        return done

    for searcher in built.values():
        searcher.search(keys.query[:n_query])  # warm-up
    for query in keys.query[: n_query * rounds].split(n_query):
        best = true.search(query)
        gc.collect()
        for name, searcher in built.items():
            with torch.no_grad():
                index = measure_one(name, "ms", searcher.search, query)
            hit = (index[:, :, None] == best[:, None]).any(dim=1)
            recalls[name].append(float(hit.float().mean()))
            if not name.startswith("faiss"):
                measure_one(name, "learn_ms", searcher.learn, query)
    for key, times in seconds.items():
        metrics |= _quartiles(key, [1000 * t for t in times])
    for name in names:
        metrics[f"{name}/recall"] = statistics.fmean(recalls[name])
        for peer in ("exact", "faiss flat"):
            if peer in built and peer != name:
                for what, against in (("ms", "vs"), ("learn_ms", "learn_vs")):
                    if mine := seconds.get(f"{name}/{what}"):
                        ratios = [theirs / own for own, theirs in zip(mine, seconds[f"{peer}/ms"], strict=True)]
                        metrics |= _quartiles(f"{name}/{against}_{peer.replace(' ', '_')}", ratios)
    return metrics, rows


def report_retrieval(result: Result) -> str:
    """The tables and the conditions of `retrieval`, to print."""
    from experiments.base import table

    metrics, settings = result.metrics, result.metadata["settings"]
    texts = []
    for source in dict.fromkeys(key.split("/")[0] for key in metrics):
        lines: list[list[Any]] = []
        for size in settings["sizes"]:
            for name in settings["candidates"]:
                here = f"{source}/{size}/{name}/"
                of = {key.removeprefix(here): value for key, value in metrics.items() if key.startswith(here)}
                if not of:
                    continue
                ratios = [
                    f"{of[key]:.2f} ({of[f'{key}_low']:.2f}-{of[f'{key}_high']:.2f})" if key in of else None
                    for key in ("vs_exact", "vs_faiss_flat", "learn_vs_faiss_flat")
                ]
                learn = f"{of['learn_ms']:,.1f}" if "learn_ms" in of else None
                spread = f"{of['ms_low']:,.1f}-{of['ms_high']:,.1f}"
                lines.append(
                    [f"{size:,}", name, f"{of['ms']:,.1f}", spread, f"{of['recall']:.3f}", *ratios[:2], learn,
                     ratios[2], f"{of['build_s']:,.1f}"]
                )  # fmt: skip
        columns = ["slots", "candidate", "ms", "quartiles", "recall", "x exact", "x faiss flat", "learn ms",
                   "learn x faiss flat", "build s"]  # fmt: skip
        what = {
            "trained": f"keys that {settings['checkpoint']} wrote",
            "clustered": "made keys around random centres (no checkpoint was given)",
            "random": "random unit keys",
        }[source]
        title = f"{what}: {settings['n_query']} queries at a time, best {settings['top_k']}"
        growth = ", ".join(
            f"{name} {metrics[key]:.2f}"
            for name in settings["candidates"]
            if (key := f"{source}/{name}/exponent") in metrics
        )
        texts.append(
            table(columns, lines, title) + (f"\ntime grows with slots to the power of: {growth}" if growth else "")
        )
    notes = [
        f"Median and quartiles of {settings['rounds']} batches, candidates in turn; ratios are per batch.",
        "learn: a whole read with softmax and values, and its backward pass, against the bare search of the peer.",
    ]
    return "\n\n".join([*texts, "\n".join([*notes, *conditions(result.metadata)])])


BENCHMARKS: dict[str, tuple[Callable[..., Result], Callable[[Result], str]]] = {
    "train": (train, report),
    "memoria": (memoria, report_memoria),
    "retrieval": (retrieval, report_retrieval),
    "consolidate": (consolidate, report_consolidate),
    "exchange": (exchange, report_exchange),
}
"""By name, what measures and what makes the text to print."""


def name_command(arguments: list[str]) -> list[str]:
    """Put ``benchmark=<name>`` in place of the name of a benchmark, the first word of the command line.

    Raises:
        ConfigError: If there is no such benchmark.
    """
    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        return arguments
    name = arguments[0]
    if name not in BENCHMARKS:
        raise ConfigError(
            f"There is no benchmark {name!r}.{did_you_mean(name, BENCHMARKS)} There are: {', '.join(BENCHMARKS)}."
        )
    return [f"benchmark={name}", *arguments[1:]]


def run(config: Mapping[str, Any]) -> tuple[Result, str]:
    """Run the benchmark of a composed `configs/benchmark.yaml`.

    Returns:
        The result and the text to print.
    """
    settings = {key: value for key, value in config.items() if key not in ("benchmark", "out", "paths")}
    measuring, reporting = BENCHMARKS[config["benchmark"]]
    validate({"_target_": f"scripts.benchmark.{measuring.__name__}", **settings})
    result = measuring(**settings)
    return result, reporting(result)


@cli("benchmark")
def main(cfg: DictConfig) -> None:
    """Measure, print, write."""
    config = to_dict(cfg)
    result, text = run(config)
    print(text)
    from experiments.base import emit

    written = emit(result, {}, config["out"])
    print("\nWritten:", *(f"  {path}" for path in written), sep="\n")


if __name__ == "__main__":
    try:
        sys.argv[1:] = name_command(sys.argv[1:])
    except ConfigError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None
    main()
