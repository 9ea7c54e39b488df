"""Settings: keys that nothing reads, values of every wrong type and size, prompts that look like something else."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.hostile.base import PRINTED, TINY, Answer, Case, Silent, command

_SOME = ("right", "sentence")
_WRONG = ("abc", -1, math.nan, 10**20, None, [1])

# Refused as soon as they are read; each is a command line.
_REFUSED = {
    "train": [
        "+lr=0.1", "++lr=0.1", "+training.learning_rate=1", "+checkpoint.evry=1", "++checkpoint.evry=1",
        "+data.batch_size=32",
        "+data.tokenizer.kid=char", "+data.path=a.txt", "+paths.rot=a", "+paths.a.b=1", "+hydra_run=1",
        "+memory.ltm.slots=1",
        "+model.layers=2", "+trainer.epochs=3", "+curriculum.phase=1", "+watch.needle.distanse=1", "+logger.csv.nam=a",
        "+needl.distance=5", "+retention.n_write=[0]",
        "+extra={_target_: memlm.data.corpora.builtin.Builtin}", "+extra.a=1",
        "lr=0.1", "sead=1", "model.n_layr=2", "memory.ltm.n_slots=2", "data.tokenizer.kid=char",
        "checkpoint=5", "checkpoint=null", "checkpoint=[1]", "checkpoint.every=0", "checkpoint.every=1.5",
        "checkpoint.every=abc", "checkpoint.keep=0", "checkpoint.keep=[1]", "~checkpoint", "~checkpoint.every", "~seed",
        "~data.tokenizer.kind", "~paths.root", "~model.segment_len", "~trainer.precision", "~name", "~n_parameter",
        "seed=abc", "seed=-1", "seed=1.5", "seed=null", "seed=99999999999999999999", "seed=[1]", "seed=true",
        "seed=nan",
        "n_parameter=abc", "n_parameter=0", "n_parameter=-5", "n_parameter=1.5", "n_parameter=9999999999999999",
        "paths.root=[a]", "paths.root=null", "paths=5", "paths=null",
        "data.n_worker=-1", "data.n_worker=1.5", "data.n_worker=abc", "data.n_worker=null", "data.n_worker=1000000",
        "data.tokenizer=5", "data.tokenizer.kind=bpee", "data.tokenizer.kind=5", "data.tokenizer.vocab_size=abc",
        "data.tokenizer.vocab_size=-1", "data.tokenizer.vocab_size=1e5", "data.tokenizer.n_vocab=0", "data.corpus=5",
        "data.corpus={_target_: memlm.data.curriculum.Curriculum, phases: []}", "data=5", "data=null",
        "memory=5", "memory=null", "++memory.x=5", "++memory.ltm=5", "++memory.ltm=null",
        "+memory.x={_target_: memlm.data.corpora.builtin.Builtin}", "+memory.x={_target_: os.system}",
        "+memory.x={_target_: nowhere.A}",
        "+memory.x={_target_: memlm.memory.ltm.LongTermMemori}", "+memory.x={_target_: 5}", "+memory.x={a: 1}",
        "model._target_=memlm.data.corpora.builtin.Builtin", "model._target_=5", "model._target_=null",
        "model._target_=builtins.dict",
        "curriculum._target_=memlm.data.corpora.builtin.Builtin",
        "training._target_=memlm.data.corpora.builtin.Builtin",
        "training._target_=builtins.dict", "replay._target_=builtins.dict", "+replay.ratio=0.5",
        "+replay={_target_: builtins.dict}", "+replay={_target_: memlm.training.replay.Replay, ratio: -1}",
        "logger={csv: 5}", "++logger.csv=5", "watch=5", "watch={needle: 5}", "++watch.needle=abc",
        "watch.needle.distance=abc", "watch.needle._target_=memlm.data.corpora.builtin.Builtin",
        "needle.distance=abc", "needle.distance=-1", "needle.distance=1000000000000",
        "needle.distance=[1000,1000000000]",
        "needle.n_fact=100000", "needle.n_fact=1.5", "needle.n_row=1000000000", "needle.seed=-1", "needle.kind=5",
        "needle.split=train", "needle.n_document=1000000000", "perplexity.limit=abc", "perplexity.n_row=0",
        "model.n_layer=0", "model.n_layer=100000", "model.n_layer=1e5", "model.n_layer=1000000000000",
        "model.d_model=7",
        "model.d_model=0", "model.d_model=1000000000000", "model.segment_len=1000000000000", "model.n_head=3",
        "model.overlap=1000", "model.memory_layers=[7]", "model.memory_layers=[a]", "model.position=sin",
        "model.dropout=1",
        "training.lr=3e38", "training.lr=0", "training.lr=-1", "training.lr=nan", "training.lr=inf", "training.lr=abc",
        "training.betas=[0.9]", "training.betas=[1,1]", "training.betas=5", "training.answer_weight=1e30",
        "training.warmup_steps=1.5", "training.consolidate_every=0",
        "trainer.max_steps=0", "trainer.max_steps=-5", "trainer.max_steps=99999999999999", "trainer.max_steps=abc",
        "trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=nan", "trainer.precision=8",
        "trainer.precision=null",
        "trainer.accelerator=5", "trainer.strategy=5", "trainer.num_nodes=0", "trainer.limit_val_batches=-1",
        "trainer.val_check_interval=0", "trainer.log_every_n_steps=0", "trainer.accumulate_grad_batches=0",
        "trainer.accumulate_grad_batches=99999999999", "trainer.check_val_every_n_epoch=0", "trainer=5",
        "trainer.strategy={a: 1}",
        "logger.csv.flush_logs_every_n_steps=0", "logger.csv.flush_logs_every_n_steps=-1",
        "curriculum.phases=5", "curriculum.phases=[]", "curriculum.phases=abc", "curriculum.phases=[5]",
        "curriculum.phases=[abc]", "curriculum.phases={a: 1}",
        "curriculum.phases=[{steps: abc, n_row: 1, n_segment: 1}]",
        "curriculum.phases=[{steps: 1, n_row: 1, n_segment: 1, task: 5}]", "curriculum.phases=[{steps: 1, n_row: 1}]",
        "curriculum.phases=[{steps: 1, n_row: 1, n_segment: 1, memory: [1]}]", "curriculum.phases=[{stepz: 1}]",
        "curriculum.phases=[{steps: 1, n_row: 1, n_segment: 1, memory: abc}]",
        "curriculum.phases=[{steps: 1, n_row: 100000000, n_segment: 1}]",
        "curriculum.phases=[{steps: 1.5, n_row: 1, n_segment: 1}]",
        "curriculum.phases=[{steps: 0, n_row: 1, n_segment: 1}]",
        "curriculum.phases=[{steps: 1, n_row: null, n_segment: 1}]", "curriculum.phases=[[1]]",
        "curriculum.phases=[{steps: 1, n_row: 1, n_segment: 1, task: {itemz: 1}}]",
        "curriculum.task=5", "++curriculum.task={a: 1}", "name=[a]", "name={a: 1}", "++name={a: 1}", "resume=[a]",
        "-m seed=range(0,1000000000)", "-m seed=range(0,inf)", "-m seed=range(0,5,0)", "-m seed=1,2,abc",
        "-m seed=range(0,200) trainer.max_steps=range(1,200)", "-m model.n_layer=1,0", "-m +lr=0.1,0.2", "seed=1,2",
        "experiment=5", "experiment=nedle", "experiment=[needle,nedle]", "experiment={a: 1}",
        "+a.b=1 +a.c=${a.b}", "model.n_layer=${nowhere}", "model.n_layer=${seed", "model=[lmcode]", "=5", "+=5", "a",
        "++", "~",
        "model..n_layer=5", "model.n_layer.x=5", "--nonsense", "--config-dir=nowhere", "--config-name=nowhere",
        "--config-path=nowhere --cfg=nonsense",
    ],
    "generate": [
        "+max_tokens=2", "+prompts=a", "checkpoint=5 checkpoint=null", "checkpoint=null", "checkpoint=[a,b]",
        "checkpoint={a: 1}",
        "max_new_tokens=abc", "max_new_tokens=1.5", "max_new_tokens=null", "max_new_tokens=-1",
        "max_new_tokens=100000000000",
        "temperature=nan", "temperature=inf", "temperature=abc", "temperature=-1", "temperature=null",
        "temperature=[1]",
        "top_k=1.5", "top_k=0", "top_k=-1", "top_k=abc", "top_p=2", "top_p=nan", "top_p=abc", "top_p=-1",
        "seed=100000000000000000000", "seed=-1", "seed=abc", "seed=null", "device=5", "device=null", "device=[cpu]",
        "prompt_file=[a]", "prompt_file=nowhere.txt", "prompt_file=.", "prompt=a prompt_file=b", "prompt=", "prompt=-",
        "memory=ltm", "lr=1", "+lr=1", "paths.root=null",
    ],
    "evaluate": [
        "+lr=2", "+sead=1", "checkpoint=null", "checkpoint=[a,b]", "seed=-1", "seed=abc", "seed=1.5", "change=5",
        "change=[a]",
        "change=abc", "device=5", "skip_inapplicable=5", "skip_inapplicable=abc", "experiment=nedle", "experiment=5",
        "needle.distance=abc", "needle.distance=1000000000000", "+needle.distanse=1", "+retention.n_write=[0]",
        "name=[a]",
        "memory=ltm", "model.n_layer=2", "logger=5", "+logger.x=5",
    ],
    "chat": ["checkpoint=null", "checkpoint=[a]", "+temperature=1", "device=5", "device=null", "prompt=a", "paths=5"],
    "export": [
        "output=null", "output=[a]", "checkpoint=null", "checkpoint=[a,b]", "+dir=a", "output=a,b output={a: 1}",
    ],
    "survival": [
        "n_kill=abc", "n_kill=0", "n_kill=-1", "n_kill=1.5", "n_kill=null", "workers=5", "workers=[abc]", "workers=[]",
        "workers=[-1]", "workers=null", "overrides=5", "overrides=null", "overrides=[5]", "overrides={a: 1}",
        "seed=abc",
        "seed=-1", "+kills=3", "out=null", "out=[a]", "overrides=[+lr=0.1]", "overrides=[model.n_layer=abc]",
    ],
    "search": [
        "+search.space={seed: abc}", "search.n_trial=0 seed=1,2", "search.n_trial=abc seed=1,2",
        "search.n_trial=null seed=1,2",
        "search.direction=up seed=1,2", "search.sampler=best seed=1,2", "search.seed=-1 seed=1,2",
        "search.seed=abc seed=1,2",
        "+search.trials=3 seed=1,2", "search.metric=5 seed=1,2", "search.metric=nothing/a seed=1,2", "search.space=5",
        "search.space=[1]", "seed=1", "seed=1,abc", "lr=1,2", "+lr=1,2", "training.lr=interval(1,0)",
        "search=5 seed=1,2",
        "search=null seed=1,2", "hparams_search=nothing", "seed=interval(0,1)",
    ],
    "benchmark": [
        "nothing", "benchmark=[]", "benchmark=5", "benchmark=null", "train sizes=5", "train rounds=abc",
        "train steps=0",
        "train device=5", "train precision=fp8", "train candidates=5", "train +sises=[default]",
        "consolidate sizes=abc",
        "consolidate d_key=-1", "consolidate passes=0", "exchange n_process=abc", "exchange overrides=5",
        "memoria rounds=-1",
        "query", "query checkpoint=5", "query n_slot=abc", "retrieval sizes=[abc]", "retrieval keys=5",
        "train seed=abc",
        "train threads=abc", "train threads=0", "train n_row=0", "train overrides=[+lr=1]",
        "retrieval candidates=[nothing]",
    ],
}  # fmt: skip

_PROMPTS = (
    "1e3", "007", "true", "null", "The end ", " two  spaces ", "${seed}", "Hello, world", "It's late", "x=3",
    "'quoted'",
    '"quoted"', "[1, 2]", "{a: 1}", "a\\", "\\", "choice(1, 2)", "~x", "two\nlines", "100 % (sure)", "a:b",
    "é 日本 \U0001f600",
    "+3", "--help", "$HOME", "a#b", "\ttab", "!!python/object", "\\${seed}", "nan", "*", "&a", "@a", "`ls`", "a=b,c=d",
)  # fmt: skip

_FILES = {  # of a recipe of somebody's own
    "typing errors": "sead: 3\ncheckpoint: {evry: 1}\ndata: {batch_size: 4, tokenizer: {kid: char}}\n",
    "unknown section": "optimizer: {lr: 3}\n",
    "a list": "- 1\n- 2\n",
    "a number": "5\n",
    "refers to itself": "seed: ${seed}\n",
    "refers in a circle": "name: ${resume}\nresume: ${name}\n",
    "holds itself": "model: &a\n  d_ff: *a\n",
    "includes itself": "defaults:\n  - mine\nseed: 3\n",
    "includes what is not there": "defaults:\n  - override /memory: nothing\n",
    "unclosed": "seed: [1\n",
    "a tab": "seed:\n\t- 1\n",
    "runs something": "seed: !!python/object/apply:os.system ['touch EXECUTED']\n",
    "a tag": "seed: !nothing 3\n",
    "twice the same key": "seed: 1\nseed: 2\n",
    "nested": f"name: {'[' * 900}{']' * 900}\n",
    "a resolver": "name: ${nothing:1}\n",
    "a wrong package": "# @package model.x.y\nseed: 3\n",
    "a null section": "data: null\n",
    "a date": "seed: 2030-01-01\n",
    "a key that is a number": "5: 3\n",
    "a key that is null": "null: 3\n",
}

_NEEDED = {"generate": "checkpoint=x prompt=a", "evaluate": "checkpoint=x", "chat": "checkpoint=x",
           "export": "checkpoint=x output=y"}  # fmt: skip


def settings() -> list[Case]:
    """All cases."""
    _model()  # before the processes are forked
    cases = [
        Case(f"{script} {line}", functools.partial(_run, script, line))
        for script, lines in _REFUSED.items()
        for line in lines
    ]
    prompts = [
        (how, text) for how in ("argument", "file", "pipe") for text in _PROMPTS[:: 1 if how == "argument" else 4]
    ]
    cases += [Case(f"prompt {text!r} as {how}", functools.partial(_prompt, text, how), ("right",))
              for how, text in prompts]  # fmt: skip
    cases += [Case(f"recipe {name}", functools.partial(_recipe, text.encode())) for name, text in _FILES.items()]
    cases += [Case(f"recipe of bytes {i}", functools.partial(_recipe, bytes(range(i, 256)))) for i in (0, 128, 255)]
    cases += [Case(name, do, wanted) for name, do, wanted in _others()]
    cases += list(_values())
    return cases


def _run(script: str, line: str) -> None:
    """A command line, in which a space stands between two arguments unless it follows a comma or a colon."""
    words = line.replace(", ", "\0").replace(": ", "\1").split(" ")
    needed = _NEEDED.get(script, "").split()
    if script == "generate":
        needed = [word for word in needed if not word.startswith("prompt=") or "prompt" not in line]
    given = [word.replace("\0", ", ").replace("\1", ": ") for word in words]
    try:
        command(script, *(given[:1] if script == "benchmark" else []), *needed, *given[script == "benchmark" :])
    finally:
        sys.stderr.flush()
        if "checkpoint at x" in Path(PRINTED).read_text(encoding="utf-8", errors="replace"):
            raise Silent("the settings were taken: it was only refused as its checkpoint is not there")


@functools.cache
def _model() -> Path:
    """A model of bytes as they come, exported."""
    from memlm.assemble import build_model, build_tokenizer
    from memlm.checkpoint import export
    from memlm.compose import compose, to_dict

    config = to_dict(compose([*TINY, "memory=none", "data.tokenizer.kind=byte"]))
    folder = Path(tempfile.mkdtemp(prefix="memlm-hostile-model-")) / "model"
    export(build_model(config, build_tokenizer(config)), folder)
    return folder


def _prompt(text: str, how: str) -> None:
    """No token is added, so that the prompt comes back."""
    line = [f"checkpoint={_model()}", "max_new_tokens=0"]
    if how == "argument":
        line.append(f"prompt={text}")
    elif how == "file":
        Path("a file, of 1=1 prompt.txt").write_text(text)
        line.append("prompt_file=a file, of 1=1 prompt.txt")
    else:
        sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode()))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        command("generate", *line)
    if printed.getvalue() != f"{text}\n":
        raise Silent(f"{printed.getvalue()!r} was continued")


def _recipe(content: bytes) -> None:
    Path("recipe").mkdir()
    Path("recipe/mine.yaml").write_bytes(b"# @package _global_\n" + content)
    command("train", f"--config-dir={Path.cwd()}", "recipe=mine", *TINY)


def _others() -> Iterator[tuple[str, Callable[[], object], tuple[Answer, ...]]]:
    deep = "{a: " * 800 + "1" + "}" * 800
    yield "nested overrides", functools.partial(command, "train", f"+extra={deep}"), ("sentence",)
    yield (
        "nested list",
        functools.partial(command, "train", f"model.memory_layers={'[' * 800}{']' * 800}"),
        ("sentence",),
    )
    yield "an int of 5,000 digits", functools.partial(command, "train", f"seed={'9' * 5000}"), ("sentence",)
    yield (
        "a name of 100,000 letters",
        functools.partial(command, "train", f"seed=abc name={'a' * 100_000}"),
        ("sentence",),
    )
    many = ",".join(map(str, range(300)))
    yield "the last of 300 values", functools.partial(command, "train", "-m", f"seed={many},abc", *TINY), ("sentence",)
    for device in ("meta", "foo", "cuda:99", "cpu:x", "", "privateuseone"):
        yield f"device={device}", functools.partial(_on, device), ("sentence",)
    for line in ("devices=abc", "devices=0", "devices=[]", "devices=-1", "accelerator=abc", "strategy=abc"):
        yield f"run with trainer.{line}", functools.partial(_trained_with, f"trainer.{line}"), ("sentence",)
    yield "a file as run directory", _run_in_a_file, ("sentence",)
    yield "a file as root", functools.partial(_run_below_a_file, "paths.root"), ("sentence",)
    yield "a file as cache", functools.partial(_run_below_a_file, "paths.cache_dir"), ("sentence",)
    for name in ("a/b", "..", "a" * 5000, "007", "true", "a, b", "It's", " x ", "new\nline", "é", "x=1", ""):
        yield f"name={name[:20]!r}", functools.partial(_names, name), ("right",)
    for path in (
        "a b.txt",
        "a=b.txt",
        "a,b.txt",
        "it's.txt",
        "(1).txt",
        "100%.txt",
        "[a].txt",
        "a;b.txt",
        "é.txt",
        "~a.txt",
    ):
        yield f"data.path={path}", functools.partial(_text, path), ("right",)
    for key in ("width=32 model.d_model=${width}", "tag=x name=${tag}", "tag=x hydra.run.dir=out/${tag}"):
        yield f"a key of one's own {key}", functools.partial(_accepted, f"+{key}"), ("right",)
    yield (
        "settings of an experiment not chosen",
        functools.partial(_accepted, "recipe=needle experiment=[]"),
        ("right",),
    )


def _on(device: str) -> None:
    command("generate", f"checkpoint={_model()}", "prompt=a", "max_new_tokens=1", f"device={device}")


def _trained_with(line: str) -> None:
    trainer = [word for word in TINY if not word.startswith("trainer=") or "accelerator" not in line]
    command("train", *trainer, "memory=none", line)


def _run_in_a_file() -> None:
    Path("out").write_text("")
    command("train", *TINY, "memory=none", "hydra.run.dir=out")


def _run_below_a_file(key: str) -> None:
    Path("out").write_text("")
    command("train", *TINY, "memory=none", f"{key}=out", *(["hydra.run.dir=run"] if "cache" in key else []))


def _names(name: str) -> None:
    from memlm.compose import compose
    from memlm.quoting import quote_texts

    if name != "${seed}" and compose(quote_texts([f"name={name}"])).name != name:
        raise Silent("another name")
    _accepted(f"name={name}", whole=True)


def _text(path: str) -> None:
    from memlm.assemble import build_corpus
    from memlm.compose import compose, to_dict
    from memlm.quoting import quote_texts

    Path(path).write_text("some text\n" * 50)
    corpus = build_corpus(to_dict(compose(["data=text", *quote_texts([f"data.path={path}"])])))
    if not corpus.documents("train"):
        raise Silent("no text")


def _accepted(line: str, whole: bool = False) -> None:
    from memlm.app import train
    from memlm.app.command_line import check_command_line
    from memlm.quoting import quote_texts

    check_command_line(quote_texts([line] if whole else line.split(" ")), check=train.check)


def _values() -> Iterator[Case]:
    """Every setting of every constructor, with values of a wrong type or size: refused, or a step is made with it."""
    groups: dict[tuple[str, ...], list[str]] = {
        ("model=lmcode", "memory=none"): ["model"],
        ("model=lstm", "memory=none"): ["model"],
        ("memory=none", "replay=reservoir"): [
            "training", "replay", "trainer", "logger.csv", "checkpoint", "data.tokenizer",
        ],
        **{(f"memory={name}",): [f"memory.{name}"] for name in ("stm", "ltm", "imm", "auto", "memoria", "adaptive")},
    }  # fmt: skip
    for choices, sections in groups.items():
        config = _composed(choices)
        for section in sections:
            for name in _at(config, section):
                for value in () if name == "_target_" else _WRONG:
                    shown = "10**20" if value == 10**20 else repr(value)
                    yield Case(f"{' '.join(choices)} {section}.{name}={shown}",
                               functools.partial(_value, choices, section, name, value), _SOME)  # fmt: skip


@functools.cache
def _composed(choices: tuple[str, ...]) -> dict[str, Any]:
    from memlm.compose import compose, to_dict

    own = {"model=", "model.n_head="} if "model=lstm" in choices else set()
    tiny = [line for line in TINY if not line.startswith(tuple(own))]
    return to_dict(compose([*choices, *(line for line in tiny if not (own and line.startswith("model=")))]))


def _at(config: dict[str, Any], section: str) -> dict[str, Any]:
    for part in section.split("."):
        config = config[part]
    return config


def _value(choices: tuple[str, ...], section: str, name: str, value: Any) -> None:
    from memlm.app import train
    from memlm.config import check_settings, validate
    from memlm.schema import Train

    config = copy.deepcopy(_composed(choices))
    _at(config, section)[name] = value
    check_settings(config, Train)
    validate(config)
    train.check(config)
    if section.startswith(("model", "memory")):
        _step(config)


def _step(config: dict[str, Any]) -> None:
    import torch

    from memlm.assemble import build_model

    tokenizer: Any = SimpleNamespace(vocab_size=50)
    model = build_model(config, tokenizer)
    ids = torch.randint(2, 50, (2, 48))
    loss = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1).float(), ids.flatten())
    loss.backward()
    if not bool(loss.isfinite()):
        raise Silent(f"the loss is {float(loss.detach())}")
