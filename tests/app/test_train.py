"""The script itself; each of the five processes started here takes seconds."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import memlm.assemble
from memlm import threads
from memlm.analysis.run_log import read_history
from memlm.app.command_line import check_command_line
from memlm.app.train import check, main
from memlm.checkpoint import checkpoints, load_run, read
from memlm.compose import compose, config_dir, to_dict
from memlm.config import ConfigError
from memlm.evaluation import runner
from memlm.training.logged import history_files
from memlm.training.replay import Replay, build_replay
from memlm.training.settings import Training, build_training, plan_steps
from tests.models import bases
from tests.training.small import config, curve, fit, overrides, write_text
from tests.training.test_fit import records

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
FACTS = "curriculum.phases=[{steps:9,n_row:2,n_segment:2,task:{items:2},n_window:3}]"
QUICK = ["perplexity.limit=200", "needle.n_document=2", "needle.n_fact=2", "needle.distance=32", FACTS]


def lines(folder: Path, memory: str = "ltm") -> list[str]:
    """Overrides of a tiny run that is measured at the end."""
    return [*overrides(folder, memory), *QUICK]


def start(*arguments: str, cwd: Path, **settings: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


def test_a_directory_that_holds_a_run_is_refused_before_text_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a/checkpoints").mkdir(parents=True)
    (tmp_path / "a/checkpoints/step=3.ckpt").write_bytes(b"")
    monkeypatch.setattr("memlm.assemble.build_corpus", lambda config: pytest.fail("text is read"))
    with pytest.raises(ConfigError, match=r"a holds a run already: give another hydra.run.dir, or .* resume="):
        main(config(tmp_path, "a"))


@pytest.mark.parametrize(
    ("arguments", "code", "told", "unused"),
    [
        (["--help"], 0, "memlm train model=lmcode memory=ltm", {"torch", "lightning", "wandb", "datasets"}),
        (["training.lr=fast"], 2, "error: training.lr must be", {"lightning", "wandb", "datasets"}),
    ],
)
def test_help_and_mistakes_answer_before_what_they_do_not_need_is_imported(
    arguments: list[str], code: int, told: str, unused: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    out, err = finish(start(*arguments, cwd=tmp_path), code)
    imports = re.findall(r"^import time:.*\| +(\S+)\n", err, re.M)
    assert "memlm" in imports
    assert not unused & set(imports)
    err = re.sub(r"^import time:.*\n", "", err, flags=re.M)
    assert told in out + err
    assert "Traceback" not in err
    assert code == 0 or err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_killed_and_resumed_from_the_command_line(tmp_path: Path) -> None:
    more = ["trainer.max_steps=60", "checkpoint.every=10"]
    process = start(*lines(tmp_path), *more, "trainer.enable_progress_bar=true", cwd=tmp_path)
    deadline = time.monotonic() + 100
    while not list(tmp_path.rglob("checkpoints/step=20.ckpt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (killed,) = (tmp_path / "lmcode-ltm").iterdir()
    step = read(checkpoints(killed)[-1])["global_step"]
    assert 20 <= step < 60

    out, err = finish(start(*lines(tmp_path), *more, "resume=auto", "trainer.enable_progress_bar=true", cwd=tmp_path))
    assert f"going on after step {step} of {checkpoints(killed)[-1]}" in out
    (resumed,) = set((tmp_path / "lmcode-ltm").iterdir()) - {killed}
    # tidy: one line about the text, lines of progress, tables, files
    assert err == ""
    assert out.count("corpus ") == 1
    assert "step 60 of 60: loss " in out
    assert out.count("Perplexity of held-out text") == out.count("Recall of facts told once") == 1
    for noise in ("Tip", "GPU", "Warning", "wandb:", "it/s"):
        assert noise not in out
    shown = [line.strip() for line in out.partition("Written:")[2].splitlines() if line.strip()]
    assert all(Path(path).is_file() for path in shown)
    assert {"step=60.ckpt", "loss.png", "result.json"} <= {Path(path).name for path in shown}

    # the same as the run that was never stopped, up to the last bit but for the last step before the kill
    settings = plan_steps(to_dict(compose([*lines(tmp_path), *more, f"paths.run_dir={tmp_path / 'whole'}"])))
    whole = curve(fit(settings)[2])
    found = curve([row for file in history_files(resumed) for row in read_history(file)])
    assert set(whole) - set(found) <= {step - 1}  # logged right after its checkpoint is written
    assert all(found[i] == whole[i] for i in found)


def test_a_sweep_makes_a_run_of_each_job(tmp_path: Path) -> None:
    common = [line for line in lines(tmp_path) if not line.startswith(("memory", "logger="))]
    out, err = finish(start("-m", *common, "trainer.max_steps=2", "memory=none,stm", "seed=1", cwd=tmp_path))
    assert err == ""
    assert out.count("Perplexity of held-out text") == 2
    (sweep,) = (tmp_path / "multirun").iterdir()
    jobs = sorted(path for path in sweep.iterdir() if path.is_dir())
    assert [named(job) for job in jobs] == ["0-lmcode-none-seed1", "1-lmcode-stm-seed1"]
    found = [next(record.run for record in records(job) if record.HasField("run")) for job in jobs]
    assert {run.run_group for run in found} == {sweep.name}
    assert [run.display_name for run in found] == ["lmcode-none", "lmcode-stm"]
    assert found[0].run_id != found[1].run_id
    assert [sorted(memlm.load(job).memory) for job in jobs] == [[], ["stm"]]


def named(job: Path) -> str:
    """The name of the directory of a job, without the digest of its overrides."""
    name, _, digest = job.name.rpartition("-")
    assert re.fullmatch(r"[0-9a-f]{6}", digest)
    return name


def sweep(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of a sweep in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *arguments])
    try:
        main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_a_sweep_that_is_repeated_runs_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = [line for line in lines(tmp_path) if not line.startswith("memory")]
    common += ["memory=none", "trainer.max_steps=4", "hydra.sweep.dir=jobs"]
    assert sweep(monkeypatch, *common, f"data.path={tmp_path / 'text.txt'},/nowhere.txt", "seed=1") == 2
    out, err = capsys.readouterr()
    assert re.search(r"jobs/1-lmcode-none-seed1-\w{6}: text file '/nowhere.txt' does not exist", err)
    assert out.count("Perplexity of held-out text") == 1
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "jobs").rglob("*.json")}
    assert len(written) == 4  # three results, and that it is finished

    # with another seed before it: the job has another number, and no second directory
    assert sweep(monkeypatch, *common, f"data.path={tmp_path / 'text.txt'}", "seed=2,1") == 0
    out, err = capsys.readouterr()
    assert out.count("Perplexity of held-out text") == 1
    assert re.search(r"jobs/0-lmcode-none-seed1-\w{6}: finished with these settings, skipped", out)
    assert {path: path.stat().st_mtime_ns for path in written} == written

    # with other values of a setting that no name of a directory tells
    assert sweep(monkeypatch, *common, f"data.path={tmp_path / 'text.txt'}", "seed=2", "training.lr=0.01,0.02") == 0
    finished = sorted(path.parent for path in (tmp_path / "jobs").glob("*/finished.json"))
    assert [named(job) for job in finished] == [
        "0-lmcode-none-seed1", "0-lmcode-none-seed2", "0-lmcode-none-seed2", "1-lmcode-none-seed2"
    ]  # fmt: skip


def test_jobs_of_a_sweep_train_with_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each with its own settings in all of its processes: up to rounding it is the run of one process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    common = [line for line in lines(tmp_path) if not line.startswith(("memory", "trainer=", "experiment"))]
    common += ["model.dropout=0", "trainer.max_steps=4", "trainer.accelerator=cpu"]
    more = ["experiment=perplexity", "hydra.sweep.dir=jobs", "trainer=ddp", "trainer.devices=2"]
    quick = [line for line in common if not line.startswith("needle")]
    assert sweep(monkeypatch, *quick, *more, "memory=none,stm") == 0
    out, err = capfd.readouterr()
    assert out.count("4 steps on 2 processes") == 2
    assert "Traceback" not in err
    for i, memory in enumerate(("none", "stm")):
        (job,) = (tmp_path / "jobs").glob(f"{i}-lmcode-{memory}-seed0-*")
        alone = compose([*common, f"memory={memory}", f"paths.run_dir={tmp_path / memory}"])
        whole = curve(fit(plan_steps(to_dict(alone)))[2])
        found = curve([row for file in history_files(job) for row in read_history(file)])
        assert found == pytest.approx(whole, abs=1e-4)
        assert sorted(memlm.load(job).memory) == [memory] * (memory != "none")
        assert json.loads((job / "finished.json").read_text())["config"]["trainer"]["devices"] == 2


def test_runs_that_start_together_have_directories_of_their_own() -> None:
    import hydra

    from memlm.compose import config_dir

    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        found = [hydra.compose("train", return_hydra_config=True).hydra for _ in range(2)]
    for one, two in ((node.run._get_node("dir")._value(), node.sweep._get_node("dir")._value()) for node in found):
        assert one.endswith("/${now:%Y-%m-%d_%H-%M-%S-%f}")  # to the microsecond
        assert two.endswith("/${now:%Y-%m-%d_%H-%M-%S-%f}")


# --- in this process -------------------------------------------------------------------------------------------------


def test_what_is_reported_is_what_the_checkpoint_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the curriculum trains a memory with other settings than it has in use."""
    cfg = compose([*lines(tmp_path), f"paths.run_dir={tmp_path / 'run'}", "trainer.max_steps=5"])
    cfg.curriculum.phases[0] = {
        "steps": 5,
        "n_row": 2,
        "n_segment": 2,
        "task": {"items": 2},
        "memory": {"ltm.write_budget": 1},
    }
    recall = main(cfg)
    assert recall is not None
    assert 0 <= recall <= 1
    assert "Recall of facts told once" in capsys.readouterr().out
    model, data = load_run(tmp_path / "run")
    chosen = runner.chosen({name: to_dict(cfg)[name] for name in ("perplexity", "needle")})
    runner.run_all(model, data, chosen, tmp_path / "again")
    for name in chosen:
        stored, again = (
            json.loads((tmp_path / place / name / "result.json").read_text()) for place in ("run", "again")
        )
        assert stored["metrics"] == again["metrics"]


def test_without_a_step_what_is_there_is_measured(tmp_path: Path) -> None:
    main(compose([*lines(tmp_path), f"paths.run_dir={tmp_path / 'run'}", "trainer.max_steps=0"]))
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step=0.ckpt"]
    stored = json.loads((tmp_path / "run/perplexity/result.json").read_text())
    model, data = load_run(tmp_path / "run")
    runner.run_all(model, data, {"perplexity": runner.chosen(model.config)["perplexity"]}, tmp_path / "again")
    again = json.loads((tmp_path / "again/perplexity/result.json").read_text())
    assert stored["metrics"] == again["metrics"]


def test_a_run_that_goes_on_keeps_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number would round sums in another way."""
    kept: list[object] = []
    monkeypatch.setattr(threads, "keep", kept.append)
    common = [*overrides(tmp_path, "none"), "experiment=[]", FACTS]
    main(compose([*common, f"paths.run_dir={tmp_path / 'run'}", "trainer.max_steps=1"]))
    assert kept == []
    checkpoint = tmp_path / "run/checkpoints/step=1.ckpt"
    content = torch.load(checkpoint, weights_only=False)
    assert content["memlm"]["threads"] == torch.get_num_threads()
    content["memlm"]["threads"] = 7
    torch.save(content, checkpoint)
    main(compose([*common, f"paths.run_dir={tmp_path / 'on'}", "trainer.max_steps=2", f"resume={tmp_path / 'run'}"]))
    assert kept == [7]


@pytest.mark.parametrize(
    ("wrong", "told"),
    {
        "data.path=/no/such.txt": r"text file '/no/such\.txt' does not exist",
        "model.segment_len=8000": "no more than one segment of 8000",
        "resume=/no/such/run": "there is no run or checkpoint at /no/such/run",
        "trainer.accelerator=cuda": "asks for CUDA",
        "training.lr=-1": "training.lr must be above 0",
        "needle.n_document=1": "needle.n_document must be at least 2",
        "curriculum.phases=[]": "curriculum.phases is empty",
        "trainer.log_every_n_steps=0": "trainer.log_every_n_steps must be",
    }.items(),
)
def test_mistakes_are_told_before_training(
    wrong: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=told) as caught:
        main(compose([*lines(tmp_path), wrong, f"paths.run_dir={tmp_path / 'run'}"]))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("group", ["memory", "model", "recipe", "table"])
def test_nothing_that_is_shipped_is_refused_ahead(group: str) -> None:
    for path in sorted((config_dir() / group).glob("*.yaml")):
        # but those that ask for a path
        asks = ("babilong", "contexts", "longmem", "memorag", "pretrained", "stories", "told", "training_free")
        if not path.stem.startswith(asks):
            check(to_dict(compose([f"{group}={path.stem}"])))


def test_the_recipe_of_stories_trains_a_memory_beside_a_frozen_base(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    base = bases.with_tokenizer(bases.make_base("llama", tmp_path, max_position_embeddings=96))
    told = write_text(tmp_path, n_word=2000).read_text().splitlines()
    stories = tmp_path / "stories.jsonl"
    stories.write_text("".join(json.dumps({"text": line}) + "\n" for line in told))
    given = [f"model.path={base}", f"data.path={stories}", "model.segment_len=64", "model.overlap=4"]
    few = ["n_token=1", "needle.n_document=2", "needle.n_fact=2", "needle.distance=64", "worth.limit=500"]
    run = tmp_path / "run"
    main(compose(["recipe=stories", *given, *few, "trainer=cpu", "logger=csv", f"paths.run_dir={run}"]))
    settings = plan_steps(to_dict(compose(["recipe=stories", *given, "n_token=1"])))
    assert settings["trainer"]["max_steps"] == len(settings["curriculum"]["phases"])  # a step of each
    assert {path.parent.name for path in run.glob("*/result.json")} == {"needle", "worth", "training"}
    weights = read(checkpoints(run)[-1])["state_dict"]
    assert all(name.startswith(("model.memory.", "model.gates.")) for name in weights)  # of the base nothing is kept
    assert bool(weights["model.gates.ltm"].any())  # which begin at zero
    model: Any = memlm.load(run)
    assert torch.equal(model.embedding.weight, bases.loaded(base).get_input_embeddings().weight)


def test_a_model_without_anything_to_train_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = memlm.assemble.build_model
    monkeypatch.setattr("memlm.assemble.build_model", lambda *parts: built(*parts).requires_grad_(False))
    with pytest.raises(ConfigError, match=r"nothing of this model is trained.*trainer\.max_steps=0"):
        main(compose([*lines(tmp_path), f"paths.run_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run/checkpoints").exists()


def test_what_a_constructor_refuses_is_told_ahead() -> None:
    with pytest.raises(ConfigError, match=r"memory\.ltm\.top_k must be at least 1, got 0"):
        check(to_dict(compose(["memory.ltm.top_k=0"])))
    with pytest.raises(ConfigError, match=r"needle\.n_document must be at least 2"):
        check(to_dict(compose(["needle.n_document=1"])))
    check(to_dict(compose(["trainer=gpu"])))  # another machine may have what this one lacks


@pytest.mark.parametrize(
    ("override", "told"),
    {
        "training._target_=builtins.dict": r"training\._target_ must name memlm\.training\.settings\.Training",
        "curriculum._target_=builtins.dict": r"curriculum\._target_ must name memlm\.data\.curriculum\.Curriculum",
        "+memory.x={_target_: memlm.data.corpora.builtin.Builtin}": (
            r"memory\.x\._target_ must name memlm\.memory\.contract\.Memory"
        ),
        "trainer._target_=builtins.dict": r"trainer\._target_ must be lightning\.Trainer",
        "data.corpus._target_=builtins.dict": r"data\.corpus\._target_ must name memlm\.data\.corpora\.base\.Corpus",
        "replay={_target_: builtins.dict}": "replay",
        "training.lr=3e38": r"training\.lr must be above 0 and at most 1000",
        "trainer.gradient_clip_val=-1": r"trainer\.gradient_clip_val must be a number of at least 0, got -1",
        "~trainer.precision": r"trainer\.precision is missing",
        "~model.segment_len": r"model\.segment_len is missing",
        "model.n_layer=100000": r"training needs at least [\d.]+ GiB of memory .*model\.n_layer=100000",
        "memory.ltm.d_key=4000000000000000000": r"sizes of the model are beyond .*memory\.ltm\.d_key=4",
        "needle.distance=1000000000": r"needle\.distance must be at most 100,000,000",
        "needle.distance=[100000000,90000000]": "needle would read 1,520,000,000 tokens .* 1.8 days",
        "needle.n_fact=100000": r"needle\.n_fact must be at most 10,000",
        "logger.csv.flush_logs_every_n_steps=0": r"logger\.csv\.flush_logs_every_n_steps must be",
        "curriculum.phases=[{steps: abc, n_row: 1, n_segment: 1}]": r"curriculum\.phases\[0\]\.steps must be an int",
        "curriculum.phases=[{steps: 1, n_row: 1, n_segment: 1, task: 5}]": r"curriculum\.phases\[0\]\.task must be",
        "curriculum.phases=[{steps: 1, n_row: 1, n_segment: 1, memory: [1]}]": r"phases\[0\]\.memory must be",
        "curriculum.phases=[{steps: 1, n_row: 100000000, n_segment: 1}]": "100,000,000 rows of 1 segments in a batch",
        "curriculum.phases=[5]": r"curriculum\.phases",
    }.items(),
)
def test_wrong_settings_are_told_ahead(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        check_command_line([override], check=check)
    assert "\n" not in str(caught.value)


def test_training_is_of_the_class_that_its_target_names(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Training):
        pass

    monkeypatch.setattr("tests.targets.Mine", Mine, raising=False)
    config = to_dict(compose(["training._target_=tests.targets.Mine", "replay=reservoir"]))
    assert type(build_training(config)) is Mine
    config["replay"] |= {"_target_": "tests.targets.MyReplay", "capacity": 7}
    monkeypatch.setattr("tests.targets.MyReplay", type("MyReplay", (Replay,), {}), raising=False)
    replay = build_replay(config)
    assert (type(replay).__name__, replay.capacity) == ("MyReplay", 7)
    assert build_replay(config | {"replay": {}}) is None


def test_an_empty_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ConfigError, match="holds no text"):
        main(compose([*lines(tmp_path), f"data.path={tmp_path / 'empty.txt'}"]))
