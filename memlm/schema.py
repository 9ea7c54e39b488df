"""The settings that belong to no `_target_`: of `train.py` and of each script, by the name of its primary config.

`configs/` has their values, this file what they may be: an annotation for each key that code reads, a class for each
section. Other keys are refused (`memlm.app.cli`), but for those that another setting refers to, as `${data.path}`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from memlm.annotations import Node, Range

Seed = Annotated[int, Range(0, 2**31 - 1)]
Count = Annotated[int, Range(1)]
Id = Annotated[int, Range(0, 10**8)]


class Paths:
    """Where things are written."""

    root: str
    run_dir: str
    cache_dir: str | None


class Tokenizer:
    """See `memlm.data.tokenizer.get_tokenizer`."""

    kind: Literal["char", "byte", "word", "bpe"]
    vocab_size: Annotated[int, Range(1, 10**7)]
    path: str | None
    n_vocab: Annotated[int, Range(1, 10**8)] | None


class Data:
    """What is trained on."""

    corpus: Node
    tokenizer: Tokenizer
    n_worker: Annotated[int, Range(0, 1024)]


class Checkpoint:
    """When checkpoints are written."""

    every: Count
    keep: Count | None


class Train:
    """`train.py`."""

    logger: dict[str, Node] | None = None
    model: Node
    memory: dict[str, Node]
    data: Data
    curriculum: Node
    training: Node
    replay: dict[str, Any]
    trainer: Node
    paths: Paths
    name: str | None
    n_parameter: Annotated[int, Range(1, 10**12)] | None
    state_bytes: Annotated[int, Range(1, 10**12)] | None
    n_token: Annotated[int, Range(1, 10**15)] | None
    seed: Seed
    optimized_metric: str
    resume: str | None
    checkpoint: Checkpoint
    watch: dict[str, Node | None] | None


class Space:
    """What is searched over, and how."""

    n_trial: Count
    direction: Literal["maximize", "minimize"]
    sampler: Literal["tpe", "random"]
    seed: Seed
    space: dict[str, str]


class Search(Train):
    """`scripts/search.py`."""

    search: Space


class Moved:
    """Where the text of a run is now."""

    path: str | None


class Evaluate:
    """`scripts/evaluate.py`."""

    logger: dict[str, Node] | None = None
    paths: Paths
    data: Moved
    checkpoint: str
    trust: list[str] | str | None
    name: str | None
    seed: Seed
    change: dict[str, Any] | None
    device: str
    skip_inapplicable: bool


class Generate:
    """`scripts/generate.py`."""

    paths: Paths
    checkpoint: str
    trust: list[str] | str | None
    prompt: str | None
    prompt_file: str | None
    max_new_tokens: Annotated[int, Range(0, 10**6)]
    temperature: Annotated[float, Range(0, 1000)]
    top_k: Count | None
    top_p: Annotated[float, Range(0, 1)] | None
    do_sample: bool
    repetition_penalty: Annotated[float, Range(0, 1000)]
    num_return_sequences: Annotated[int, Range(1, 10**6)]
    eos_token_id: list[Id] | Id | None
    stop_strings: list[str] | str | None
    compile: bool
    seed: Seed
    device: str


class Chat:
    """`scripts/chat.py`."""

    paths: Paths
    model: Node | None = None
    memory: dict[str, Node] | None = None
    checkpoint: str | None
    trust: list[str] | str | None
    recall: int
    device: str


class Export:
    """`scripts/export.py`."""

    paths: Paths
    checkpoint: str
    trust: list[str] | str | None
    output: str
    push: str | None
    private: bool | None


class Survival:
    """`scripts/survival.py`."""

    paths: Paths
    n_kill: Count
    workers: list[Annotated[int, Range(0, 1024)]]
    seed: Seed
    overrides: list[str]
    out: str


class Benchmark:
    """`scripts/benchmark.py`, whose other settings are the arguments of the benchmark's `run`."""

    paths: Paths
    benchmark: str
    out: str


SCHEMAS: dict[str, type] = {
    schema.__name__.lower(): schema for schema in (Train, Search, Evaluate, Generate, Chat, Export, Survival)
}
