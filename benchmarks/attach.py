"""What attaching costs: a pretrained base in memlm, without and with a memory, beside the bare model of transformers.

Shapes: B rows, L tokens.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from benchmarks.base import (
    Peer,
    check_least,
    check_names,
    conditions,
    in_own_process,
    peak_rss,
    peer_library,
    quartiles,
    spread,
    surroundings,
    torch_threads,
)
from memlm.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from memlm.evaluation.result import Result

BARE = "transformers"
"""Name of the bare model among candidates."""

WORK = {"read": "reading", "generate": "generating"}
"""What is measured, and how it is called."""

_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_PEER = Peer("transformers", "the bare model needs the library transformers", "this benchmark out")
_NEAR = {"float32": 1e-3, "bfloat16": 0.25}  # logits may differ by so much of their spread


class Setup(NamedTuple):
    """What all candidates have in common; plain values, so that it can be sent to another process.

    Attributes:
        path: The base.
        candidates: Settings of each.
        n_row: Rows of text.
        n_token: Tokens of a text that is read.
        n_before: Tokens that memories were told before.
        prompt_len: Tokens of a prompt.
        n_generate: Tokens that are added to it.
        dtype: Type of the base's numbers.
        seed: Seed of the texts.
    """

    path: str
    candidates: dict[str, list[str]]
    n_row: int
    n_token: int
    n_before: int
    prompt_len: int
    n_generate: int
    dtype: str
    seed: int


def run(
    path: str | None,
    candidates: dict[str, list[str]],
    n_row: int,
    n_token: int,
    n_before: int,
    prompt_len: int,
    n_generate: int,
    dtype: Literal["float32", "bfloat16"],
    warmup: int,
    rounds: int,
    peak_memory: bool,
    clock: Literal["wall", "cpu"],
    threads: int | None,
    seed: int,
) -> Result:
    """Tokens per second and peak memory, with the bare model as peer; for the settings see the YAML.

    Returns:
        Metrics ``<candidate>/<measure>``; one row per measurement.

    Raises:
        ConfigError: If a setting cannot work.
    """
    given = {
        "n_row": n_row, "n_token": n_token, "n_before": n_before, "prompt_len": prompt_len, "n_generate": n_generate,
        "warmup": warmup, "rounds": rounds,
    }  # fmt: skip
    check_least({**given, "threads": threads}, {"n_before": n_token, "warmup": 0})
    check_names(candidates=list(candidates))
    if path is None or BARE in candidates:
        what = "path is missing" if path is None else f"candidates has {BARE}, which is measured anyway"
        raise ConfigError(f"{what}: give the folder of a model as path, and settings by another name as candidates")
    if n_token < prompt_len + n_generate:
        raise ConfigError(
            f"n_token must hold a prompt and what is added, {prompt_len + n_generate} tokens, got {n_token}"
        )
    peer_library(_PEER)

    from memlm.evaluation.result import Result

    setup = Setup(path, candidates, n_row, n_token, n_before, prompt_len, n_generate, dtype, seed)
    names = [BARE, *candidates]
    with torch_threads(threads) as n_thread:
        metadata: dict[str, Any] = {
            "settings": {
                **given, "candidates": candidates, "dtype": dtype, "peak_memory": peak_memory, "clock": clock,
                "seed": seed,
            },
            "threads": n_thread,
            **surroundings("cpu"),
        }  # fmt: skip
        # First, while this process is small.
        peaks = {name: in_own_process(peak, name, setup, n_thread) for name in names} if peak_memory else {}
        built = {name: Candidate(name, setup) for name in names}
        metadata["base"] = built[BARE].about
        check_same(built, setup)
        rows = measure(built, setup, warmup, rounds, clock)
    metrics: dict[str, float] = {}
    for name in names:
        found = summarise(rows, name) | {"state_bytes": built[name].state_bytes} | peaks.get(name, {})
        if peaks:
            found["beyond_mib"] = peaks[name]["peak_mib"] - peaks[BARE]["peak_mib"]
        metrics |= {f"{name}/{key}": value for key, value in found.items()}
    return Result("benchmark_attach", metrics, tuple(rows), metadata)


def texts(setup: Setup, n_vocab: int, number: int, length: int) -> Tensor:
    """Random token ids (B, L), the same for all candidates."""
    import torch

    generator = torch.Generator().manual_seed(setup.seed * 1_000_003 + number)
    return torch.randint(n_vocab, (setup.n_row, length), generator=generator)


class Candidate:
    """A base that reads and generates.

    Args:
        name: `BARE`, or one of the candidates.
        setup: What all have in common.

    Attributes:
        about: Sizes of the base.
        begin: Ids that begin every text of the base, which the bare model has to be given.
        state: What its memory was told; None if it has none.
        state_bytes: Bytes of that.

    Raises:
        ValueError: If its memory holds nothing that was told.
    """

    def __init__(self, name: str, setup: Setup) -> None:
        import torch

        from memlm.models.hf_base import begin_of, folder_of

        self.state: Any = None
        self.state_bytes, self.bare, self.setup = 0, name == BARE, setup
        with torch.no_grad():
            self.model: Any = (_bare(setup) if self.bare else _attached(name, setup)).eval()
            base = self.model.config if self.bare else self.model.base.causal.config
            self.n_vocab: int = base.vocab_size
            self.begin = torch.tensor(begin_of(folder_of(setup.path)), dtype=torch.long)
            if not self.bare and self.model.memory:
                self._tell()
        self.about: dict[str, Any] = {
            "model": base.model_type, "layers": base.num_hidden_layers, "width": base.hidden_size,
            "vocabulary": self.n_vocab,
        }  # fmt: skip

    def _tell(self) -> None:
        """Tell its memory a text."""
        from memlm.memory.state import n_byte

        fresh = self.model.init_state(self.setup.n_row)
        state = self.model.absorb(texts(self.setup, self.n_vocab, 0, self.setup.n_before), fresh)
        self.state = self.model.new_context(state)
        self.state_bytes = sum(n_byte(part) for parts in self.state.memory.values() for part in parts)
        ids = texts(self.setup, self.n_vocab, 1, self.setup.n_token)
        told, untold = (self.model(ids, state=state, write=False).reads for state in (self.state, fresh))
        if told or untold:
            nothing = [read for read in told.values() if read.weights is not None and not bool(read.weights.any())]
        else:  # what a memory reads in the softmax of attention it does not tell
            a, b = (self.model(ids, state=state, write=False).logits for state in (self.state, fresh))
            nothing = [a] if bool((a == b).all()) else []
        if nothing:
            raise ValueError("a memory was told a text and reads nothing of it: its speed would tell nothing")

    def read(self, ids: Tensor) -> Tensor:
        """Logits of a text (B, L), which begins a context."""
        if self.bare:
            return self.model(input_ids=self._begun(ids), use_cache=False).logits[:, len(self.begin) :]
        return self.model(ids, state=self.state).logits

    def generate(self, ids: Tensor) -> Tensor:
        """A prompt (B, L) and what is added to it."""
        n = self.setup.n_generate
        if not self.bare:
            return self.model.generate(ids, n, do_sample=False, state=self.state)
        ids = self._begun(ids)
        found = self.model.generate(
            ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=n, do_sample=False, use_cache=True,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return found[:, len(self.begin) :]

    def _begun(self, ids: Tensor) -> Tensor:
        """A text (B, L) behind what begins it."""
        import torch

        return torch.cat([self.begin.expand(len(ids), -1), ids], dim=1)


def _bare(setup: Setup) -> Any:
    """The model as transformers alone has it."""
    import torch
    from transformers import AutoModelForCausalLM

    from memlm.models.hf_base import folder_of

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[setup.dtype]
    folder = folder_of(setup.path)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True)


def _attached(name: str, setup: Setup) -> Any:
    """The model in memlm: a text that is read is one segment."""
    import memlm

    common = {"path": setup.path, "dtype": setup.dtype, "segment_len": setup.n_token, "overlap": 0}
    settings = [f"model.{key}={value}" for key, value in common.items()]
    return memlm.build("model=pretrained", *setup.candidates[name], *settings)


def check_same(built: Mapping[str, Candidate], setup: Setup) -> None:
    """Check that candidates without a memory say what the bare model says.

    Raises:
        ValueError: If one does not.
    """
    import torch

    with torch.no_grad():
        ids = texts(setup, built[BARE].n_vocab, 2, setup.n_token)
        expected = built[BARE].read(ids).float()
        for name, candidate in built.items():
            if candidate.state is not None:
                continue
            most = float((candidate.read(ids).float() - expected).abs().max() / expected.std())
            if most > _NEAR[setup.dtype]:
                raise ValueError(
                    f"{name} does not say what the bare model says: logits differ by {most:.2g} of their spread"
                )


def measure(built: Mapping[str, Candidate], setup: Setup, warmup: int, rounds: int, clock: str) -> list[dict[str, Any]]:
    """Let all candidates read and generate in turn, so that what disturbs the machine meets all: a row per call."""
    import torch

    rows = []
    n_vocab = built[BARE].n_vocab
    for i in range(warmup + rounds):
        given = {
            "read": texts(setup, n_vocab, 3 + i, setup.n_token),
            "generate": texts(setup, n_vocab, 3 + i, setup.prompt_len),
        }
        new = {"read": setup.n_token, "generate": setup.n_generate}
        for work, ids in given.items():
            for name, candidate in built.items():
                call: Callable[[Tensor], Tensor] = getattr(candidate, work)
                gc.collect()
                with torch.no_grad():
                    start = _CLOCKS[clock]()
                    found = call(ids)
                    spent = _CLOCKS[clock]() - start
                if found.shape[:2] != (setup.n_row, ids.shape[1] + (work == "generate") * new[work]):
                    raise ValueError(f"{name} gave {tuple(found.shape)} of {tuple(ids.shape)} in {work}")
                if i >= warmup:
                    n_token = setup.n_row * new[work]
                    rows.append(
                        {"candidate": name, "work": work, "round": i - warmup, "seconds": spent, "tokens": n_token}
                    )
    return rows


def summarise(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    """Median and quartiles of tokens per second, and of the ratio to the bare model of the same round."""
    found: dict[str, float] = {}
    for work in WORK:
        seconds: dict[str, list[float]] = {}
        for row in rows:
            if row["work"] == work:
                seconds.setdefault(row["candidate"], []).append(row["seconds"] / row["tokens"])
        found |= quartiles(f"{work}/tokens_per_s", [1 / t for t in seconds[name]])
        ratios = [theirs / ours for ours, theirs in zip(seconds[name], seconds[BARE], strict=True)]
        found |= quartiles(f"{work}/vs_{BARE}", ratios) if name != BARE else {}
    return found


def peak(name: str, setup: Setup, threads: int) -> dict[str, float]:
    """Peak memory in MiB of loading, of being told a text and of reading one, to be called in a fresh process.

    Returns:
        ``peak_mib``: of the process; ``idle_mib``: before the model was loaded. NaN where the system does not tell.
    """
    import torch
    import transformers.models.auto.modeling_auto  # noqa: F401 - what every candidate imports counts as idle

    import memlm.models.pretrained  # noqa: F401

    torch.set_num_threads(threads)
    idle = peak_rss()
    candidate = Candidate(name, setup)
    with torch.no_grad():
        candidate.read(texts(setup, candidate.n_vocab, 2, setup.n_token))
    return {"peak_mib": peak_rss(), "idle_mib": idle}


def report(result: Result) -> str:
    """The table and the conditions, to print."""
    from memlm.evaluation.table import table

    metadata, metrics = result.metadata, result.metrics
    settings, base = metadata["settings"], metadata["base"]

    lines = []
    for name in [BARE, *settings["candidates"]]:
        line: list[Any] = [name]
        for work in WORK:
            line += [round(metrics[f"{name}/{work}/tokens_per_s"], 1), spread(metrics, f"{name}/{work}/vs_{BARE}")]
        memory = [metrics.get(f"{name}/{key}", float("nan")) for key in ("peak_mib", "beyond_mib")]
        state = metrics[f"{name}/state_bytes"] / 2**20
        lines.append([*line, *(None if number != number else round(number) for number in memory), round(state, 1)])
    columns = ["candidate"]
    for word in WORK.values():
        columns += [f"{word}, tokens/s", f"vs {BARE}"]
    title = (
        f"{base['model']}: {base['layers']} layers, width {base['width']}, vocabulary {base['vocabulary']:,}; "
        f"{settings['n_row']} row(s): texts of {settings['n_token']} tokens, prompts of {settings['prompt_len']} and "
        f"{settings['n_generate']} more; memories were told {settings['n_before']:,} tokens"
    )
    time_of = {"wall": "time", "cpu": "processor time"}[settings["clock"]]
    how = [
        f"Median and quartiles of {settings['rounds']} rounds, of {time_of}; ratios are per round, of speeds.",
        "Peak memory: loading, being told and reading a text; beyond: of that of the bare model.",
        str(settings["dtype"]),
    ]
    columns += ["peak MiB", "beyond", "state MiB"]
    return "\n\n".join([table(columns, lines, title), "\n".join([*how, *conditions(metadata)])])
