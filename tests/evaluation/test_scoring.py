"""Scores and continuations, against the bare base; and the adapter to lm-evaluation-harness where that is installed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from memlm.config import ConfigError
from memlm.evaluation.scoring import Scorer
from memlm.models.sampling import Sampling
from tests.experiments.tiny import MEMORIES
from tests.models import bases

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

PAIRS = [("a cat sat on", " a box."), ("", "it ran."), ("a dog ran to the red", " house"), ("the", " e")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bases.with_tokenizer(bases.make_base("llama", tmp_path_factory.mktemp("bases")))


@pytest.fixture(scope="module")
def bare(llama: Path) -> Any:
    return bases.attached(llama, {}, segment_len=40)


@pytest.fixture(scope="module")
def remembers(llama: Path) -> Any:
    return bases.attached(llama, {"cache": MEMORIES["cache"] | {"n_token": 40}})


def pairs_of(model: Any) -> list[tuple[list[int], list[int]]]:
    encode = model.tokenizer.encode
    return [(encode(context) if context else [], encode(text)) for context, text in PAIRS]


@torch.no_grad()
def by_base(llama: Path, model: Any, context: list[int], text: list[int]) -> tuple[float, bool]:
    logits = bases.loaded(llama)(torch.tensor([[*model.begin, *context, *text]])).logits[0, -len(text) - 1 : -1]
    targets = torch.tensor(text)
    likely = logits.log_softmax(dim=-1).gather(1, targets[:, None]).sum()
    return float(likely), bool((logits.argmax(dim=-1) == targets).all())


@pytest.mark.parametrize("n_row", [1, 3])
def test_scores_are_those_of_the_base(n_row: int, llama: Path, bare: Any) -> None:
    pairs = pairs_of(bare)
    likeliest = int(bare(torch.tensor([pairs[0][0]])).logits[0, -1].argmax())
    pairs.append((pairs[0][0], [likeliest]))
    found = Scorer(bare, n_row).score(pairs)
    expected = [by_base(llama, bare, *pair) for pair in pairs]
    assert [score.greedy for score in found] == [greedy for _, greedy in expected]
    assert found[-1].greedy
    assert [score.log_likelihood for score in found] == pytest.approx([likely for likely, _ in expected], abs=1e-4)


def test_what_is_not_in_view_is_known_from_memory_alone(bare: Any, remembers: Any) -> None:
    told, near, text = ([3, 4, 5] * 9, [7, 8, 9, 10], [11, 12])
    other = [20, 21, 22] * 9
    for n_row in (1, 2):
        alone, *rest = Scorer(bare, n_row, local=4).score([(near, text), (told + near, text), (other + near, text)])
        assert all(score.log_likelihood == pytest.approx(alone.log_likelihood, abs=1e-5) for score in rest)
        scorer = Scorer(remembers, n_row, local=4)
        found = [score.log_likelihood for score in scorer.score([(told + near, text), (other + near, text)])]
        state = remembers.new_context(remembers.absorb(torch.tensor([told])))
        logits = remembers(torch.tensor([near + text]), state=state).logits[0, 3:5].log_softmax(dim=-1)
        assert found[0] == pytest.approx(float(logits[0, 11] + logits[1, 12]), abs=1e-4)
        assert found[0] != pytest.approx(found[1], abs=1e-3)
        without = Scorer(remembers, n_row, local=4, read=False).score([(told + near, text), (other + near, text)])
        assert without[0].log_likelihood == pytest.approx(without[1].log_likelihood, abs=1e-5)


def test_continuations_end_where_they_should(remembers: Any) -> None:
    contexts = [[3, 4, 5] * 8, [6, 7], [8, 9, 10] * 3]
    how = Sampling(12, do_sample=False)
    whole = [remembers.generate(torch.tensor([ids]), 12, do_sample=False)[0, len(ids) :].tolist() for ids in contexts]
    for n_row in (1, 3):
        assert Scorer(remembers, n_row).generate(contexts, how) == whole
    end = whole[0][4]
    found = Scorer(remembers, 3).generate(contexts, how._replace(eos_token_id=end))
    cut = [ids[: ids.index(end) + 1] if end in ids else ids for ids in whole]
    assert found == cut


def test_a_model_that_begins_no_text_leaves_the_first_token_out(llama: Path, bare: Any) -> None:
    bare_of_all = bases.attached(llama, {}, segment_len=40)
    bare_of_all.begin = []
    assert bare_of_all.opening() is None
    assert Scorer(bare_of_all).score([([], [5])]) == [(0.0, True)]


def test_numbers_out_of_range_are_refused(bare: Any) -> None:
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        Scorer(bare, 0)
    with pytest.raises(ConfigError, match="local must be at least 1 token"):
        Scorer(bare, 1, 0)


def test_a_chat_is_written_as_the_base_writes_it(bare: Any) -> None:
    assert bare.chat([{"role": "user", "content": "hi"}]) == "<|u|hi\n<|a|"
    assert bare.ends == [2]  # of the base's config.json
    assert bare.start == bare.begin[0]


# --- lm-evaluation-harness -------------------------------------------------------------------------------------------


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, parts, i) for i, parts in enumerate(arguments)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def harness(llama: Path) -> Any:
    pytest.importorskip("lm_eval")
    from lm_eval.api.registry import get_model

    from memlm.evaluation import harness as module

    assert get_model("memlm") is module.MemlmLM
    given = f"model=pretrained,model.path={llama},memory=none,model.segment_len=40,model.overlap=4"
    return module.MemlmLM.create_from_arg_string(given, {"batch_size": 2, "device": "cpu"})


def test_the_harness_is_told_what_the_base_says(harness: Any, llama: Path) -> None:
    found = harness.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    expected = [by_base(llama, harness.model, *pair) for pair in pairs_of(harness.model)]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    (rolling,) = harness.loglikelihood_rolling(instances("loglikelihood_rolling", [("a cat ran",)]))
    text = harness.model.tokenizer.encode("a cat ran")
    assert rolling == pytest.approx(by_base(llama, harness.model, [], text)[0], abs=1e-4)


def test_the_harness_gets_answers_without_what_ends_them(harness: Any) -> None:
    how = {"until": [], "max_gen_toks": 8, "do_sample": False}
    whole = harness.generate_until(instances("generate_until", [("a cat", how), ("a red dog", how)]))
    assert all(whole)
    stop = whole[0][3]
    asked = [("a cat", how | {"until": [stop]}), ("a red dog", how)]
    found = harness.generate_until(instances("generate_until", asked))
    assert found == [whole[0].partition(stop)[0], whole[1]]
    with pytest.raises(ConfigError, match="asks to generate with num_beams"):
        harness.generate_until(instances("generate_until", [("a cat", how | {"num_beams": 3})]))
    assert harness.apply_chat_template([{"role": "user", "content": "hi"}]) == "<|u|hi\n<|a|"


def test_arguments_of_the_harness_that_name_no_model_are_refused(harness: Any) -> None:
    for arguments, message in (
        ({}, "model_args must have checkpoint=RUN, or settings of a model"),
        ({"checkpoint": "x", "memory": None}, "and both"),
        ({"checkpoint": "x", "batch_size": "auto"}, "batch_size must be a whole number, got auto"),
        ({"model": "lmcode", "memory": "ltm"}, "a model that is not pretrained says nothing before it is trained"),
        ({"model": "lmcode", "base": "x"}, "base says where the base of a checkpoint is"),
        ({"checkpoint": "x", "local": "many"}, "local must be a whole number of at least 1, got 'many'"),
        ({"checkpoint": "x", "read": "no"}, "read must be true or false, got 'no'"),
    ):
        with pytest.raises(ConfigError, match=message):
            type(harness)(**arguments)


def test_a_local_task_scores_as_the_harness_scores_the_base(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from memlm.evaluation import harness as module

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    page = (Path(module.__file__).parents[2] / "docs/hugging_face.md").read_text(encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    task = page.split("```yaml\n")[1].split("```")[0]  # as the page gives it
    (tmp_path / "tasks/lambada_local.yaml").write_text(task, encoding="utf-8")
    texts = ("a cat sat on a red box", "the dog ran home to the house", "it is big and red")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "lambada-test.jsonl").write_text(lines, encoding="utf-8")
    of_base = {"model": "pretrained", "model.path": str(llama), "memory": None, "model.segment_len": 40}
    found = []
    for model, arguments in (("hf", {"pretrained": str(llama), "dtype": "float32"}), ("memlm", of_base)):
        manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
        result = lm_eval.simple_evaluate(
            model, model_args=arguments, tasks=["lambada_local"], task_manager=manager, bootstrap_iters=0,
            log_samples=True, device="cpu", batch_size=2,
        )  # fmt: skip
        samples = sorted(result["samples"]["lambada_local"], key=lambda sample: sample["doc_id"])
        found.append([sample["filtered_resps"][0] for sample in samples])
    (base, ours) = found
    assert len(base) == 3
    assert [float(likely) for likely, _ in ours] == pytest.approx([float(likely) for likely, _ in base], abs=1e-4)
    assert [str(greedy) for _, greedy in ours] == [str(greedy) for _, greedy in base]
