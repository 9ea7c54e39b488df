"""The printed summary, and the scripts that print it."""

import functools
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import memlm.checkpoint
from experiments import needle, perplexity
from memlm.app import evaluate, generate
from memlm.app.command_line import check_command_line
from memlm.compose import compose, config_dir
from memlm.config import ConfigError
from memlm.data.tasks.makers import FactMaker
from memlm.data.tokenizer import train_tokenizer
from memlm.data.tokens import TokenizedCorpus
from memlm.evaluation import runs
from memlm.evaluation.recall.rates import CONDITIONS
from memlm.evaluation.result import Result
from memlm.evaluation.summary import summary
from memlm.memory.ltm import LongTermMemory
from memlm.models.lmcode import LMCode


def entry(label, metric, n="n", percent=True, control=False, better="higher", **bounds):
    return {
        "label": label, "metric": metric, "low": bounds.get("low"), "high": bounds.get("high"), "n": n,
        "percent": percent, "better": better, "control": control,
    }  # fmt: skip


def needle_result(conditions=CONDITIONS, distances=(100,), correct=None, straddling=True):
    rows = [
        {
            "condition": condition,
            "distance": distance,
            "kind": "random",
            "n_other": 0,
            "document": i // 4,
            "fact": i % 4,
            "straddles": None if condition == "unseen" else straddling and i % 4 == 0,
            "correct": (correct or {"on": 7}).get(condition, 0) > i,
            "nll": 1.5,
        }
        for distance in distances
        for condition in conditions
        for i in range(8)
    ]
    return Result("needle", needle.summarise(rows), tuple(rows), {"distances": list(distances)})


def perplexity_result(wiped=2.0):
    losses = {"on": [1.5, 1.25], "off": [2.0, 2.0], "wiped": [wiped, wiped]}
    rows = [
        {"condition": condition, "stream": 0, "document": i, "n_token": 1000, "nll": nll}
        for condition, values in losses.items()
        for i, nll in enumerate(values)
    ]
    return Result("perplexity", perplexity.summarise(rows), tuple(rows), {})


def lines_of(text, word):
    return [line.split() for line in text.splitlines() if line.startswith(word)]


def test_summary_shows_perplexity_recall_controls_and_intervals():
    text = summary([perplexity_result(), needle_result()])
    assert "2,000 tokens, 2 documents" in text
    assert [float(cell) for cell in lines_of(text, "reads off")[0][2:]] == pytest.approx([7.3891, 2.0], abs=1e-3)
    assert "changes the loss by -0.6250 nats per token (95 % interval " in text
    assert "Off and wiped agree" in text
    assert "Off and wiped agree" not in summary([perplexity_result(wiped=2.5)])
    recall = text[text.index("Recall of facts") :]
    assert "100 or more tokens before" in recall
    on, straddling = lines_of(recall, "memory on")
    assert on[2:6] == ["87.5", "52.9", "97.8", "8"]
    assert straddling[-3:-1] == ["100.0", "2"]
    for control in ("reads off", "memory wiped", "another document's memory", "fact never shown"):
        (line,) = lines_of(recall, control)
        assert line[-5:-1] == ["0.0", "0.0", "32.4", "8"]
    assert "right in 25 %" in recall
    told_again = Result("overwrite", needle_result().metrics)
    assert "Recall of facts told once" not in summary([told_again])
    assert summary([]) == ""
    assert summary([Result("slot_usage", {"entropy": 1.0})]) == ""


def test_summary_of_several_distances():
    text = summary([needle_result(distances=(100, 20_000))])
    lines = [line.split() for line in text.splitlines() if "memory on" in line or "reads off" in line]
    assert [(line[0], *line[-5:-1]) for line in lines if "across" not in line] == [
        (distance, *numbers)
        for distance in ("100", "20,000")
        for numbers in [("87.5", "52.9", "97.8", "8"), ("0.0", "0.0", "32.4", "8")]
    ]


def test_summary_of_several_kinds_and_numbers_of_other_facts():
    rows = [
        row | {"kind": kind, "n_other": n_other}
        for kind in ("random", "native")
        for n_other in (0, 50)
        for row in needle_result(distances=(100, 200), correct={"on": 3 if kind == "native" else 7}).rows
    ]
    settings = {"kind": ["random", "native"], "n_other": [0, 50]}
    result = Result("needle", needle.summarise(rows), (), {"distances": [100, 200], "settings": settings})
    text = summary([result])
    lines = [line.split() for line in text.splitlines() if "memory on" in line and "across" not in line]
    assert [(*line[:3], line[-5]) for line in lines] == [
        (kind, n_other, distance, rate)
        for kind, rate in (("random", "87.5"), ("native", "37.5"))
        for n_other in ("0", "50")
        for distance in ("100", "200")
    ]
    rows = [row for row in rows if (row["kind"], row["condition"]) != ("native", "swapped")]
    with pytest.raises(ValueError, match="claims recall for native/0/100 without swapped"):
        summary([Result("needle", needle.summarise(rows), (), result.metadata)])


def test_summary_tells_repeated_text_and_levels_of_paraphrases():
    rows = [row | {"level": "trained" if row["fact"] % 2 else "new_phrasing"} for row in needle_result().rows]
    metadata = {"distances": [100], "haystack_repetition": 4.24}
    text = summary([Result("needle", needle.summarise(rows), (), metadata)])
    assert "goes 4.2 times through all there is" in text
    # 7 of 8 are right, and the last one, of an odd number, is not
    lines = {line.partition("  ")[0]: line.split()[-5:-1] for line in text.splitlines() if "memory on," in line}
    assert lines["memory on, phrasing never seen in training"][::3] == ["100.0", "4"]
    assert lines["memory on, pair of phrasings seen in training"][::3] == ["75.0", "4"]
    assert "through all there is" not in summary([Result("needle", needle.summarise(rows), (), {"distances": [100]})])


@pytest.mark.parametrize("lost", CONDITIONS[1:])
def test_recall_without_a_control_is_refused(lost):
    conditions = [condition for condition in CONDITIONS if condition != lost]
    with pytest.raises(ValueError, match=rf"'needle' claims recall without {lost}.*only beside all of its controls"):
        summary([perplexity_result(), needle_result(conditions)])


def test_recall_at_one_distance_borrows_no_controls_from_another():
    whole = needle_result(distances=(100, 200))
    rows = [row for row in whole.rows if row["distance"] == 100 or row["condition"] != "off"]
    with pytest.raises(ValueError, match="claims recall at 200 tokens without off"):
        summary([Result("needle", needle.summarise(rows), tuple(rows), whole.metadata)])
    bare = {"exact_match/on": 0.99}
    with pytest.raises(ValueError, match="without on, off, wiped, swapped, unseen"):
        summary([Result("modern_facts", bare)])


def test_percentages_are_never_rounded_to_the_ends():
    rows = [
        {
            "condition": c,
            "kind": "random",
            "n_other": 0,
            "distance": 1,
            "document": 0,
            "fact": i,
            "straddles": None,
            "correct": i > 0,
            "nll": 0.0,
        }
        for c in CONDITIONS
        for i in range(3000)
    ]
    text = summary([Result("needle", needle.summarise(rows), (), {"distances": [1]})])
    assert lines_of(text, "memory on")[0][2] == "99.9"


def test_perplexities_have_four_digits_at_most():
    metrics = {"nll/on": 7.1066, "perplexity/on": 1220.1343, "perplexity/off": 97.4567, "nll/off": 4.5796}
    text = summary([Result("perplexity", metrics | {"n_token": 10, "n_document": 1})])
    assert [line[2] for line in lines_of(text, "memory on")] == ["1,220"]
    assert [line[2] for line in lines_of(text, "reads off")] == ["97"]
    metrics |= {"perplexity/on": 98765.4, "perplexity/off": math.inf}
    text = summary([Result("perplexity", metrics | {"n_token": 10, "n_document": 1})])
    assert [line[2] for line in lines_of(text, "memory on")] == ["98,770"]


# ------------------------------------------------------------------------------------------------------ headlines


def test_every_experiment_has_its_headline_in_the_summary():
    metrics = {"hit": 0.9996, "low": 0.99, "high": 1.0, "chance": 0.0625, "n": 2500, "half": 12345.678}
    lines = [
        entry("found", "hit", low="low", high="high"),
        entry("chance", "chance", n=None, control=True),
        entry("half-life", "half", percent=False),
    ]
    text = summary([Result("retention", metrics, (), {"headline": lines})])
    assert [line.split() for line in text.splitlines()[3:]] == [
        ["retention", "found", "99.9", "%", "99.0", "%", "100.0", "%", "2,500"],
        ["chance", "6.2", "%", "-", "-", "-"],
        ["half-life", "12,350", "-", "-", "2,500"],
    ]
    starts = [line.index(word) for line, word in zip(text.splitlines()[3:], ("found", "chance", "half"), strict=True)]
    assert starts[1] == starts[0] + 2 == starts[2] + 2  # controls are indented


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([entry("found", "hit")], r"claims a rate \(found\) without any control"),
        ([entry("found", "hit"), entry("off", "nothing", control=True)], "without any control"),
        ([entry("found", "hit"), entry("off", "hit", n="none", control=True)], "without any control"),
        ([entry("found", "hitt"), entry("off", "hit", control=True)], "names the metric 'hitt', which it lacks"),
        ([entry("found", "hit", low="bottom")], "names the metric 'bottom', which it lacks"),
        ([entry("found", "hit", better="more")], "calls 'more' better"),
        ([entry("found", "hit") | {"cell": "at 10"}], "has the cell 'at 10'; expected a line and a column"),
        ([{"label": "found", "metric": "hit"}], "expected keys label, metric"),
    ],
)
def test_headlines_that_claim_too_much_or_are_malformed_are_refused(lines, message):
    metrics = {"hit": 0.9, "n": 10, "none": 0, "nothing": math.nan}
    with pytest.raises(ValueError, match=message):
        summary([Result("capacity", metrics, (), {"headline": lines})])
    plain = [line | {"percent": False} for line in lines]
    if "claims" in message or "any control" in message:  # the rule is about rates
        assert "capacity" in summary([Result("capacity", metrics, (), {"headline": plain})])


# ------------------------------------------------------------------------------------------------------- scripts


def chosen(*overrides):
    cfg = compose(["checkpoint=x", *overrides], "evaluate")
    return [name for name in cfg if isinstance(name, str) and name in ("needle", "perplexity")]


def test_experiments_are_chosen_by_name():
    assert chosen() == ["perplexity", "needle"]
    assert chosen("experiment=needle") == ["needle"]
    assert chosen("experiment=[needle,perplexity]") == ["needle", "perplexity"]
    cfg = compose(["checkpoint=x", "experiment=needle", "needle.n_document=4", "needle.distance=[10,20]"], "evaluate")
    assert (cfg.needle.n_document, list(cfg.needle.distance)) == (4, [10, 20])
    assert compose(["checkpoint=x", "seed=7"], "evaluate").needle.seed == 7


def test_all_means_every_yaml_that_does_not_train_for_long():
    every = {path.stem for path in (config_dir() / "experiment").glob("*.yaml")}
    names = sorted(every - {"continual"})
    assert {"needle", "perplexity"} <= set(names) < every
    arguments = evaluate.name_all(["experiment=all", "checkpoint=x"])
    assert arguments == [f"experiment=[{','.join(names)}]", "skip_inapplicable=true", "checkpoint=x"]
    check_command_line(arguments, "evaluate")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment=needel"], "experiment has no option 'needel'. Did you mean 'needle'?"),
        (["experiment=[needle,perplexty]"], "Did you mean 'perplexity'?"),
        (["needle.n_documents=4"], "Did you mean 'n_document'?"),
        (["experiment=perplexity", "needle.n_document=4"], "There is no setting 'needle"),
        (["needle.n_document=many"], "needle.n_document must be an int"),
        (["needle.distance=[10,far]"], "needle.distance must be"),
        (["needle.split=train"], "needle.split must be 'val' or 'test'"),
    ],
)
def test_mistakes_are_told(arguments, message):
    with pytest.raises(ConfigError) as caught:
        check_command_line(["checkpoint=x", *arguments], "evaluate")
    assert message in str(caught.value)


class Data:
    def __init__(self):
        rng = np.random.default_rng(0)
        words = ["".join(rng.choice(list("abcdefghij"), size=6)) for _ in range(300)]
        text = " " + " ".join(rng.choice(words, size=3000))
        self.tokenizer = train_tokenizer("word", [text, " is"], 1000)
        tokens = np.array(self.tokenizer.encode(text), dtype=np.int32)
        self.corpus = TokenizedCorpus(tokens, np.array([0, 900, 1800, len(tokens)]))
        self.maker = FactMaker(self.tokenizer, self.corpus)

    def tokens(self, split):
        return self.corpus


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A tiny untrained run, in place of a checkpoint."""
    data = Data()
    torch.manual_seed(0)
    memories = {"ltm": functools.partial(LongTermMemory, n_slot=64, d_key=8, write_budget=8)}
    model = LMCode(data.tokenizer.vocab_size, memories, n_layer=1, n_head=2, d_model=16, segment_len=32).eval()
    model.tokenizer = data.tokenizer
    monkeypatch.setattr(memlm.checkpoint, "find", Path)
    trained = runs.Trained("x", 1, {}, None, None, None, "", None)
    monkeypatch.setattr(runs, "describe", lambda path, model: trained)
    monkeypatch.setattr(memlm.checkpoint, "load_run", lambda path, **_: (model, data))
    monkeypatch.setattr(memlm.checkpoint, "load", lambda path, **_: model)
    monkeypatch.chdir(tmp_path)
    return model


def test_evaluate_measures_writes_and_prints(run, capsys, tmp_path):
    settings = ["needle.n_document=2", "needle.n_fact=3", "needle.distance=[40,90]", "perplexity.limit=500"]
    evaluate.main(compose(["checkpoint=x", "device=cpu", *settings], "evaluate"))
    printed = capsys.readouterr().out
    assert "Perplexity of held-out text" in printed
    assert "another document's memory" in printed
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "evaluation.json",
        *(f"needle/{name}" for name in ("recall.png", "rows.csv", "result.json")),
        *(f"perplexity/{name}" for name in ("perplexity.png", "rows.csv", "result.json")),
    }
    assert all(name in printed for name in files)
    stored = Result.from_dict(json.loads((tmp_path / "needle/result.json").read_text()))
    assert stored.metadata["distances"] == [40, 90]
    assert summary([stored]).partition("\n\nMain numbers")[0] in printed
    main = printed[printed.index("Main numbers") :]
    assert [line.split()[:3] for line in main.splitlines() if "memory on" in line] == [
        ["perplexity", "perplexity,", "memory"],
        ["needle", "memory", "on"],
    ]


def test_evaluate_refuses_a_device_that_is_not_there(run):
    with pytest.raises(ConfigError, match="device=tpu-9 cannot be used here"):
        evaluate.main(compose(["checkpoint=x", "device=tpu-9"], "evaluate"))
    with pytest.raises(ConfigError, match="experiment selects nothing"):
        evaluate.main(compose(["checkpoint=x", "experiment=[]"], "evaluate"))


def test_generate_ends_a_text_and_draws_several(run, capsys):
    prompt = run.tokenizer.decode([5, 6, 7])
    given = ["checkpoint=x", f"prompt='{prompt}'", "max_new_tokens=9", "device=cpu"]

    def told(*more):
        text = generate.main(compose([*given, *more], "generate"))
        assert capsys.readouterr().out == f"{text}\n"
        return text

    greedy = told("do_sample=false")
    assert told("temperature=0") == greedy
    ids = run.tokenizer.encode(greedy)[3:]
    assert told("do_sample=false", f"eos_token_id={ids[4]}") == run.tokenizer.decode(
        [5, 6, 7, *ids[: ids.index(ids[4]) + 1]]
    )
    stop = greedy[len(prompt) :][6:9]
    stopped = told("do_sample=false", f"stop_strings=['{stop}']")
    assert len(stopped) < len(greedy)
    assert greedy.startswith(stopped)
    assert stop in stopped[len(prompt) :]
    assert told("do_sample=false", "repetition_penalty=5.0") != greedy
    several = told("num_return_sequences=3", "temperature=2.0").split("\n---\n")
    assert len(several) == 3
    assert all(text.startswith(prompt) for text in several)
    several = told("num_return_sequences=40", "temperature=2.0", "eos_token_id=5").split("\n---\n")
    assert all(5 not in run.tokenizer.encode(text)[3:-1] for text in several)
    with pytest.raises(ConfigError, match="would be copies"):
        told("num_return_sequences=3", "temperature=0")


def test_generate_continues_a_prompt(run, capsys, monkeypatch):
    prompt = run.tokenizer.decode([5, 6, 7])
    text = generate.main(compose(["checkpoint=x", f"prompt='{prompt}'", "max_new_tokens=5", "device=cpu"], "generate"))
    assert text.startswith(prompt)
    assert len(run.tokenizer.encode(text)) == 8
    assert capsys.readouterr().out == f"{text}\n"
    again = generate.main(compose(["checkpoint=x", f"prompt='{prompt}'", "max_new_tokens=5", "device=cpu"], "generate"))
    assert text == again
    for overrides, empty in (([], "standard input"), (["prompt=null"], "standard input"), (["prompt=''"], "prompt")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
        with pytest.raises(ConfigError, match=f"^{empty} is empty"):
            generate.main(compose(["checkpoint=x", *overrides], "generate"))
