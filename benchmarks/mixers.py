"""What each memory costs beside none: tokens per second of a training step, and milliseconds per generated token.

Shapes: B rows, S segments, T tokens per segment, N = S * T.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from benchmarks.base import (
    check_device,
    check_least,
    check_names,
    conditions,
    peer_library,
    quartiles,
    spread,
    surroundings,
    torch_threads,
)
from benchmarks.candidates import Candidate, Setup
from benchmarks.mixer_peers import PEERS, PeerName, Theirs, build, installed
from memlm.compose import compose, config_dir, to_dict
from memlm.config import ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from memlm.evaluation.result import Result


def run(
    memories: list[str] | None,
    peers: list[PeerName] | None,
    n_parameter: int,
    overrides: list[str],
    n_row: int,
    n_segment: int,
    n_read: int,
    n_generate: int,
    warmup: int,
    rounds: int,
    device: str,
    precision: Literal["fp32", "bf16"],
    threads: int | None,
    seed: int,
) -> Result:
    """Speed of every memory in training and in generation, in one run; for the settings see the YAML.

    Returns:
        Metrics ``<candidate>/<measure>``; one row per measurement.

    Raises:
        ConfigError: If a setting cannot work, or a peer that is named is not installed.
    """
    given = {"n_parameter": n_parameter, "n_row": n_row, "n_segment": n_segment, "n_read": n_read}
    given |= {"n_generate": n_generate, "warmup": warmup, "rounds": rounds}
    check_least({**given, "threads": threads}, {"n_segment": 2})
    names = ["none", *(name for name in memory_names(memories) if name != "none")]
    found = [name for name in get_args(PeerName) if installed(name)] if peers is None else peers
    if found:
        check_names(peers=found)
    libraries = {name: peer_library(PEERS[name]) for name in found}
    configs = {name: memory_config(name, n_parameter, overrides) for name in names}

    from memlm.evaluation.result import Result

    check_device(device)
    with torch_threads(threads) as n_thread, tempfile.TemporaryDirectory() as folder:
        metadata: dict[str, Any] = {
            "settings": {
                **given, "memories": names, "peers": found, "overrides": overrides, "device": device,
                "precision": precision, "seed": seed,
            },
            "threads": n_thread,
            **surroundings(device),
        }  # fmt: skip
        setups = {name: Setup(cfg, n_row, n_segment, device, precision, False, seed) for name, cfg in configs.items()}
        metadata["shape"] = configs["none"]["model"] | {"n_vocab": setups["none"].n_vocab}
        built: dict[str, Any] = {name: Ours(name, setup, n_read) for name, setup in setups.items()}
        for name, library in libraries.items():
            built[name] = Theirs(build(name, library, setups["none"], folder), setups["none"])
        rows = measure(built, warmup, rounds, n_generate)
    metrics: dict[str, float] = {}
    for name, candidate in built.items():
        metrics |= {f"{name}/{key}": value for key, value in summarise(rows, name).items()}
        metrics |= {f"{name}/parameters": candidate.n_parameter, f"{name}/state_bytes": candidate.n_byte}
    return Result("benchmark_mixers", metrics, tuple(rows), metadata)


def memory_names(given: Sequence[str] | None) -> list[str]:
    """Names of the memories to measure: those of `configs/memory/`, or some of them.

    Raises:
        ConfigError: If one is not there.
    """
    known = sorted(path.stem for path in (config_dir() / "memory").glob("*.yaml"))
    if given is None:
        return known
    check_names(memories=given)
    for name in given:
        if name not in known:
            raise ConfigError(f"memories names {name!r}.{did_you_mean(name, known)} There are: {', '.join(known)}.")
    return list(given)


def memory_config(name: str, n_parameter: int, overrides: Sequence[str]) -> dict[str, Any]:
    """The composed configuration of a memory; an override of another memory's setting is left out."""
    for override in overrides:
        if override.partition("=")[0] in ("recipe", "memory", "model", "n_parameter"):
            raise ConfigError(f"overrides changes {override!r}, which memories and n_parameter decide: leave it out.")
    own = to_dict(compose([f"memory={name}"]))["memory"]
    apply = [line for line in overrides if not line.startswith("memory.") or line.split(".")[1] in own]
    return to_dict(compose([f"memory={name}", f"n_parameter={n_parameter}", *apply]))


class Ours:
    """A model with a memory that has read some text.

    Args:
        name: The memory.
        setup: What the model is built from.
        n_read: Tokens that each row has read before.

    Attributes:
        candidate: What is trained.
        state: Of one row, where generation begins.
    """

    def __init__(self, name: str, setup: Setup, n_read: int) -> None:
        import torch

        from memlm.memory import state as states

        self.candidate, self.setup = Candidate(name, setup), setup
        model: Any = self.candidate.model
        state = model.init_state(setup.n_row)
        generator = torch.Generator().manual_seed(setup.seed)
        ids = torch.randint(setup.n_vocab, (setup.n_row, n_read), generator=generator).to(setup.device)
        with torch.no_grad():
            for part in ids.split(setup.n_segment * setup.segment_len, dim=1):
                state = model(part, state=state, logits=False).state
        self.candidate.state = states.detach(state)
        self.state = model.select_rows(state, torch.zeros(1, dtype=torch.long, device=setup.device))
        self.n_parameter = self.candidate.n_parameter
        self.n_byte = states.n_byte(model.init_state(1).memory)

    def step(self, text: Tensor) -> Tensor:
        """One training step on text (B, N + 1). Returns the loss."""
        return self.candidate.step(text)

    def generate(self, prompt: Tensor, n: int) -> bool:
        """Go on with a prompt (1, L) by ``n`` tokens."""
        with self.setup_autocast():
            text = self.candidate.model.generate(prompt, max_new_tokens=n, temperature=0, state=self.state)
        return text.shape[1] == prompt.shape[1] + n

    def setup_autocast(self) -> Any:
        """The precision that is asked for."""
        import torch

        bf16 = self.setup.precision == "bf16"
        return torch.autocast(self.setup.device.partition(":")[0], dtype=torch.bfloat16, enabled=bf16)

    def check(self, name: str) -> None:
        """Check that a segment reads what is remembered, and writes.

        Raises:
            ValueError: If it does not: then the speed of a memory that does less was measured.
        """
        import torch

        from memlm.memory import state as states

        model: Any = self.candidate.model
        if not model.memory:
            return
        ids = self.setup.batch(0)[:, : 2 * self.setup.segment_len]
        with torch.no_grad():
            on, off = (model(ids, state=self.candidate.state, read=read, logits=False) for read in (True, False))
        if torch.equal(on.hidden, off.hidden):
            raise ValueError(f"{name} read nothing in the steps that were measured")
        before, after = (states.tensors(state.memory) for state in (self.candidate.state, on.state))
        if all(torch.equal(one, other) for one, other in zip(before, after, strict=True)):
            raise ValueError(f"{name} wrote nothing in the steps that were measured")


def measure(built: dict[str, Any], warmup: int, rounds: int, n_generate: int) -> list[dict[str, Any]]:
    """Train and generate with all candidates in turn, so that what disturbs the machine meets all of them.

    Returns:
        One row per candidate, what was done (``train`` or ``generate``) and round, with ``seconds`` and ``tokens``.

    Raises:
        ValueError: If a loss is not finite, or a memory was not read and written.
    """
    import torch

    setup: Setup = next(iter(built.values())).setup

    def timed(call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
        cuda = setup.device.startswith("cuda")
        gc.collect()
        if cuda:
            torch.cuda.synchronize(setup.device)
        start = time.perf_counter()
        result = call(*arguments)
        if cuda:
            torch.cuda.synchronize(setup.device)
        return time.perf_counter() - start, result

    rows: list[dict[str, Any]] = []
    for i in range(warmup + rounds):
        text = setup.batch(i)
        prompt = text[:1, : setup.segment_len]
        for name, candidate in built.items():
            spent, loss = timed(candidate.step, text)
            if not torch.isfinite(loss):
                raise ValueError(f"the loss of {name} is {loss.item()} in step {i}")
            times = {"train": (spent, text.numel() - len(text))}
            spent, done = timed(candidate.generate, prompt, n_generate)
            if done:
                times["generate"] = (spent, n_generate)
            if i >= warmup:
                rows += [
                    {"candidate": name, "what": what, "round": i - warmup, "seconds": seconds, "tokens": n}
                    for what, (seconds, n) in times.items()
                ]
    for name, candidate in built.items():
        candidate.check(name)
    return rows


def summarise(rows: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """Median and quartiles of tokens per second in training and milliseconds per generated token, and shares of none's.

    Each ratio is one of speeds in the same round: 1 is as fast as none, 0.5 half as fast.
    """
    metrics: dict[str, float] = {}
    for what, prefix in (("train", ""), ("generate", "generate_")):
        own, none = (
            {row["round"]: row for row in rows if (row["candidate"], row["what"]) == (candidate, what)}
            for candidate in (name, "none")
        )
        if not own:
            continue
        if what == "train":
            metrics |= quartiles("tokens_per_s", [row["tokens"] / row["seconds"] for row in own.values()])
        else:
            metrics |= quartiles("ms_per_token", [1000 * row["seconds"] / row["tokens"] for row in own.values()])
        metrics |= quartiles(f"{prefix}vs_none", [none[i]["seconds"] / row["seconds"] for i, row in own.items()])
    return metrics


def report(result: Result) -> str:
    """The table and the conditions, to print."""
    from memlm.evaluation.table import table

    metadata, metrics = result.metadata, result.metrics
    settings, shape = metadata["settings"], metadata["shape"]

    lines = []
    for name in [*settings["memories"], *settings["peers"]]:
        n_byte = metrics[f"{name}/state_bytes"]
        lines.append(
            [
                name, int(metrics[f"{name}/parameters"]), None if n_byte != n_byte else int(n_byte),
                spread(metrics, f"{name}/tokens_per_s", 0), spread(metrics, f"{name}/vs_none"),
                spread(metrics, f"{name}/ms_per_token"), spread(metrics, f"{name}/generate_vs_none"),
            ]
        )  # fmt: skip
    columns = ["memory", "parameters", "state bytes", "training tokens/s", "vs none", "ms per token", "speed vs none"]
    title = (
        f"{shape['n_layer']} layers, {shape['n_head']} heads, width {shape['d_model']}, vocabulary "
        f"{shape['n_vocab']:,}, segments of {shape['segment_len']}; steps of {settings['n_row']} rows of "
        f"{settings['n_segment']} segments; {settings['n_generate']} tokens generated for one row"
    )
    how = [
        f"Median and quartiles of {settings['rounds']} rounds; ratios are per round, of speeds. Each row had read "
        f"{settings['n_read']:,} tokens before.",
        *([f"Not installed, so left out: {', '.join(without)}."] if (without := _left_out(settings)) else []),
        settings["precision"],
    ]
    return "\n\n".join([table(columns, lines, title), "\n".join([*how, *conditions(metadata)])])


def _left_out(settings: dict[str, Any]) -> list[str]:
    """Peers that were not measured."""
    return [name for name in get_args(PeerName) if name not in settings["peers"]]
