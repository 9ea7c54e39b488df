import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from memlm.analysis.run_log import read_history
from memlm.checkpoint import checkpoints, read, write
from memlm.config import ConfigError
from memlm.files import unfinished
from memlm.training.logged import history_files, keep_earlier_history
from memlm.training.marks import mark_finished, running
from memlm.training.resume import Origin, find_in_sweep, find_origin, remove_leftovers_of_runs
from memlm.training.stopping import answering
from tests.training.small import CURRICULA, FACTS, PLAIN, SHORT, config, curve, fit, fit_until_killed, write_text

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("n_worker", [0, 2])
@pytest.mark.parametrize("curriculum", CURRICULA)
def test_killed_and_resumed_is_bit_identical(curriculum: str, n_worker: int, tmp_path: Path) -> None:
    phases = [CURRICULA[curriculum]]
    _, module, rows = fit(config(tmp_path, "whole", phases=phases, memory="dual"))
    whole = {name: curve(rows, name) for name in ("train/loss", "train/lr", "val/nll", "memory/ltm/write_gate")}
    assert sorted(whole["train/loss"]) == list(range(9))
    assert len(set(whole["train/loss"].values())) == 9
    assert sorted(whole["val/nll"]) == [3, 7]
    weights = {name: value.clone() for name, value in module.model.state_dict().items()}

    workers = f"data.n_worker={n_worker}"
    killed = config(tmp_path, "killed", workers, phases=phases, memory="dual")
    fit_until_killed(killed, step=8)  # in the middle of a document: the last checkpoint is of step 6
    assert [p.name for p in checkpoints(tmp_path / "killed")] == ["step=3.ckpt", "step=6.ckpt"]
    resume = f"resume={tmp_path / 'killed'}"
    _, module, rows = fit(config(tmp_path, "on", workers, resume, phases=phases, memory="dual"))
    for name, expected in whole.items():
        assert curve(rows, name) == expected, name
    for name, value in module.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_resumed_twice_and_with_accumulation(tmp_path: Path) -> None:
    more = ["trainer.accumulate_grad_batches=2", "trainer.max_steps=6", "checkpoint.every=2"]
    _, _, rows = fit(config(tmp_path / "a", "whole", *more))
    whole = curve(rows)
    assert sorted(whole) == list(range(6))
    fit_until_killed(config(tmp_path / "b", "first", *more), step=7)  # step 3, its second half
    fit_until_killed(config(tmp_path / "b", "second", *more, "resume=auto"), step=10)
    assert [p.name for p in checkpoints(tmp_path / "b" / "second")] == ["step=4.ckpt"]
    _, _, rows = fit(config(tmp_path / "b", "third", *more, "resume=auto"))
    assert curve(rows) == whole
    names = [file.name for file in history_files(tmp_path / "b" / "third")]
    assert names == ["earlier-0.csv", "earlier-1.csv", "metrics.csv"]


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    constant = ["training.min_lr_ratio=1"]
    _, _, rows = fit(config(tmp_path, "long", *constant))
    whole = curve(rows)
    short = config(tmp_path, "short", *constant, "trainer.max_steps=5")
    fit(short)
    mark_finished(tmp_path / "short", short, None)
    with pytest.raises(ConfigError, match="has made 5 of 5 steps"):
        fit(config(tmp_path, "same", *constant, "trainer.max_steps=5", f"resume={tmp_path / 'short'}"))
    _, _, rows = fit(config(tmp_path, "longer", *constant, f"resume={tmp_path / 'short'}"))
    assert curve(rows) == whole


def test_auto_begins_anew_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = config(tmp_path, "first", "resume=auto", "trainer.max_steps=3")
    _, _, rows = fit(first)
    assert sorted(curve(rows)) == [0, 1, 2]
    assert "no unfinished run" in capsys.readouterr().out
    # trained, but stopped before it was measured: there is no step left, and nothing to begin anew
    origin = find_origin("auto", first, [tmp_path])
    assert origin is not None
    assert (origin.run, origin.step) == (tmp_path / "first", 3)
    mark_finished(tmp_path / "first", first, 0.5)
    fit(config(tmp_path, "second", "resume=auto", "trainer.max_steps=3"))
    assert "is finished; beginning anew" in capsys.readouterr().out
    # other settings are another run
    assert find_origin("auto", config(tmp_path, "x", "training.lr=1"), [tmp_path]) is None


def test_auto_takes_the_older_checkpoint_if_the_newest_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, rows = fit(config(tmp_path / "a", "whole"))
    fit_until_killed(config(tmp_path, "killed"), step=8)
    newest = tmp_path / "killed" / "checkpoints" / "step=6.ckpt"
    newest.write_bytes(newest.read_bytes()[:-5000])
    settings = config(tmp_path, "on", "resume=auto")
    origin = find_origin("auto", settings, [tmp_path])
    assert origin is not None
    assert origin.path.name == "step=3.ckpt"
    assert "step=6.ckpt cannot be read: it is damaged" in capsys.readouterr().err
    assert curve(fit(settings)[2]) == curve(rows)


def test_a_file_may_be_given(tmp_path: Path) -> None:
    fit(config(tmp_path, "a", "trainer.max_steps=6", "training.min_lr_ratio=1"))
    _, _, rows = fit(config(tmp_path, "b", "training.min_lr_ratio=1", f"resume='{tmp_path}/a/checkpoints/step=3.ckpt'"))
    assert sorted(curve(rows)) == list(range(9))


def test_other_settings_are_refused(tmp_path: Path) -> None:
    fit(config(tmp_path, "a", "trainer.max_steps=3"))
    for more, told in {
        "training.lr=0.5": "training.lr is 0.5 here, 0.003 there",
        "memory.ltm.n_slot=32": "memory.ltm.n_slot is 32 here, 64 there",
        "seed=1": "seed is 1 here, 0 there",
        "trainer.accumulate_grad_batches=2": "trainer.accumulate_grad_batches is 2 here, 1 there",
    }.items():
        with pytest.raises(ConfigError, match=told):
            fit(config(tmp_path, "b", f"resume={tmp_path / 'a'}", more))
    with pytest.raises(ConfigError, match="other settings: memory is stm here, ltm there") as error:
        fit(config(tmp_path, "b", f"resume={tmp_path / 'a'}", memory="stm"))
    assert "memory.ltm" not in str(error.value)  # not each of its settings
    # how it is computed may change
    free = ["data.n_worker=2", "model.gradient_checkpointing=true", "trainer.precision=bf16-mixed", "name=x"]
    assert find_origin(str(tmp_path / "a"), config(tmp_path, "c", *free), []) is not None


def test_another_vocabulary_or_text_is_refused(tmp_path: Path) -> None:
    fit(config(tmp_path, "a", "trainer.max_steps=3"))
    text = write_text(tmp_path)
    text.write_text(text.read_text() + "\n" + " ".join(f"new{c}{d}" for c in "abcd" for d in "abcd") * 30)
    with pytest.raises(ConfigError, match=r"another vocabulary \(\d+ tokens there, \d+ here\)"):
        fit(config(tmp_path, "b", f"resume={tmp_path / 'a'}"))
    # the same vocabulary, other text
    content = read(checkpoints(tmp_path / "a")[-1])
    settings = config(tmp_path, "e", f"resume={tmp_path / 'a'}")
    from memlm.assemble import build_corpus, build_tokenizer

    content["memlm"]["tokenizer"] = build_tokenizer(settings, build_corpus(settings)).to_json()
    write(content, checkpoints(tmp_path / "a")[-1])
    with pytest.raises(ConfigError, match="another text"):
        fit(settings)


def whole_and_changed(folder: Path, change: Any) -> dict[str, Any]:
    """A run with a checkpoint of step 4, and one of step 5 that is changed; returns settings to go on with it."""
    phases = [FACTS]
    more = ["checkpoint.every=1", "checkpoint.keep=null"]
    fit(config(folder, "a", *more, phases=phases, replay="reservoir"))
    for path in checkpoints(folder / "a"):
        if path.name not in ("step=4.ckpt", "step=5.ckpt"):
            path.unlink()
    content = read(folder / "a" / "checkpoints" / "step=5.ckpt")
    change(content)
    write(content, folder / "a" / "checkpoints" / "step=5.ckpt")
    return config(folder, "b", *more, phases=phases, replay="reservoir")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.update(optimizer_states=[]), "optimizer_states is not the state of one optimizer"),
        (lambda c: c["optimizer_states"][0]["state"].pop(3), "lacks moments of weights"),
        (lambda c: c["optimizer_states"][0]["state"][2].update(exp_avg=torch.zeros(3)), r"exp_avg has shape \(3,\)"),
        (lambda c: c.update(lr_schedulers=[]), "lr_schedulers is not"),
        (lambda c: c.pop("loops"), "loops lacks"),
        (lambda c: c.update(global_step=10**9), "which is not the place of step 1000000000"),
        (lambda c: c["state_dict"].update(extra=torch.zeros(1)), "state_dict holds extra, which this run has not"),
        (lambda c: c["state_dict"]["model.embedding.weight"].fill_(torch.nan), "numbers that are not finite"),
        (lambda c: c.pop("carried"), "carried is missing"),
        (lambda c: c["carried"]["local"].update(ids=c["carried"]["local"]["ids"][:1]), r"ids has shape \(1, 20\)"),
        (lambda c: c.pop("replay"), "replay is missing"),
        (lambda c: c["memlm"].update(version="99.0"), r"was written by memlm 99\.0, and this is"),
        (lambda c: c["memlm"].update(version="0.0.9"), r"was written by memlm '0\.0\.9'"),
        (lambda c: c.update({"pytorch-lightning_version": "99.0"}), "was written by lightning '99.0'"),
    ],
)
def test_changed_training_state_is_refused(
    change: Any, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a sentence, and ``auto`` says it and takes the checkpoint before."""
    settings = whole_and_changed(tmp_path, change)
    with pytest.raises(ConfigError, match=rf"step=5\.ckpt .*{told}") as caught:
        find_origin(str(tmp_path / "a"), settings, [])
    assert "\n" not in str(caught.value)
    origin = find_origin("auto", settings, [tmp_path])
    assert origin is not None
    assert origin.path.name == "step=4.ckpt"
    assert str(caught.value) in capsys.readouterr().err


def test_auto_takes_the_run_that_is_further_whatever_the_clock_says(tmp_path: Path) -> None:
    fit_until_killed(config(tmp_path, "far"), step=8)
    fit_until_killed(config(tmp_path, "near"), step=5)
    for path in checkpoints(tmp_path / "far"):
        os.utime(path, (1e9, 1e9))
    origin = find_origin("auto", config(tmp_path, "on"), [tmp_path])
    assert origin is not None
    assert (origin.run, origin.step) == (tmp_path / "far", 6)
    # What a finished run may have gone on from is not begun again.
    settings = config(tmp_path, "done")
    fit(settings)
    mark_finished(tmp_path / "done", settings, None)
    assert find_origin("auto", settings, [tmp_path]) is None


def test_a_damaged_mark_of_a_finished_run_counts_as_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(tmp_path, "a", "trainer.max_steps=3")
    fit(settings)
    (tmp_path / "a" / "finished.json").write_text('{"config"')
    origin = find_origin("auto", settings, [tmp_path])
    assert origin is not None
    assert origin.step == 3
    assert "finished.json cannot be read: it is damaged" in capsys.readouterr().err


class _Code:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("kind", ["empty", "text", "random", "cut", "code", "pickle", "other", "none"])
def test_damaged_checkpoints_are_refused(kind: str, tmp_path: Path) -> None:
    marker = tmp_path / "code-was-run"
    path = tmp_path / "checkpoints" / "step=3.ckpt"
    path.parent.mkdir()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello, this is no checkpoint\n" * 50)
    elif kind == "random":
        path.write_bytes(random.Random(0).randbytes(5000))
    elif kind == "cut":
        torch.save({"memlm": {}, "x": torch.zeros(10_000)}, path)
        path.write_bytes(path.read_bytes()[:20_000])
    elif kind == "code":
        torch.save({"memlm": _Code(marker)}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(_Code(marker)))
    elif kind == "other":
        torch.save({"state_dict": {"w": torch.zeros(3)}}, path)
    settings = {"trainer": {"max_steps": 5}, "model": {}}
    with pytest.raises(ConfigError, match=r"damaged|not a checkpoint of memlm|no checkpoint") as caught:
        find_origin(str(tmp_path), settings, [])
    assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_leftovers_of_killed_runs_are_removed_by_the_next_one_beside_them(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    left = []
    for place in ("runs/a", "root/kind/b"):  # beside the run, and below the root
        path = tmp_path / place / "checkpoints" / unfinished(Path("step=3.ckpt")).name
        path.parent.mkdir(parents=True)
        path.touch()
        left.append(path.rename(path.with_name(path.name.replace(f".{os.getpid()}.", f".{child}."))))
    remove_leftovers_of_runs(tmp_path / "runs/new", [tmp_path / "root"])
    assert not any(path.exists() for path in left)


def test_no_memory_is_saved_where_none_is_carried(tmp_path: Path) -> None:
    for name, phase, carried in (("short", SHORT, False), ("facts", FACTS, True), ("plain", PLAIN, True)):
        fit(config(tmp_path, name, "trainer.max_steps=4", "checkpoint.every=4", phases=[phase]))
        content = read(checkpoints(tmp_path / name)[-1])
        assert (content["carried"] is not None) == carried, name


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("key", torch.nan, r"carried\.memory\.ltm\[0\]\.key holds numbers that are not finite"),
        ("n_record", -1, "carries a state of the memory 'ltm' that no text can .*number of records"),
    ],
)
def test_a_carried_memory_that_no_text_led_to_is_refused(
    field: str, value: float, message: str, tmp_path: Path
) -> None:
    constant = "training.min_lr_ratio=1"
    fit(config(tmp_path, "run", constant, "trainer.max_steps=4"))
    path = checkpoints(tmp_path / "run")[-1]
    content = read(path)
    assert content["carried"] is not None
    content["carried"]["memory"]["ltm"][0][field][:] = value
    write(content, path)
    with pytest.raises(ConfigError, match=message):
        fit(config(tmp_path, "longer", constant, f"resume={path}"))


def test_history_survives_half_a_line(tmp_path: Path) -> None:
    fit_until_killed(config(tmp_path, "a"), step=5)
    file = tmp_path / "a" / "csv" / "metrics.csv"
    file.write_text(file.read_text() + "0,0.0")
    _, _, rows = fit(config(tmp_path, "b", "resume=auto"))
    assert sorted(curve(rows)) == list(range(9))


def test_a_run_that_is_alive_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit_until_killed(config(tmp_path, "first"), step=8)
    code = f"""
import sys
import time
from pathlib import Path
from memlm.training.marks import running
with running(Path({str(tmp_path / "first")!r})):
    print("on", flush=True)
    sys.stdin.read()
"""
    settings = config(tmp_path, "second", "resume=auto")
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "on\n"
        assert find_origin("auto", settings, [tmp_path]) is None
        assert "is still being trained" in capsys.readouterr().out
        with pytest.raises(ConfigError, match=r"first is still being trained by another process"):
            find_origin(str(tmp_path / "first"), settings, [])
        # In its own directory its first process has marked it before the others look.
        for found in (
            find_origin("auto", config(tmp_path, "first"), [tmp_path]),
            find_in_sweep(config(tmp_path, "first"), tmp_path),
        ):
            assert isinstance(found, Origin)
            assert found.path == checkpoints(tmp_path / "first")[-1]
    finally:
        other.communicate()
    assert find_origin("auto", settings, [tmp_path]) is not None


def fit_until_asked(settings: dict[str, Any], step: int, signum: int = signal.SIGTERM, times: int = 1) -> int:
    """Train in a process of its own, which gets a signal in the middle of batch ``step``; returns its exit code."""

    def stop(module: Any, batch: Any) -> None:
        if batch.step == step:
            for _ in range(times):
                os.kill(os.getpid(), signum)

    child = os.fork()
    if child == 0:
        try:
            fit(settings, before_step=stop)
        except SystemExit as error:
            os._exit(error.code)  # type: ignore[arg-type]
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def terminal() -> Iterator[None]:
    """Signals as a terminal gives them: under nohup SIGHUP is ignored, and so in processes that begin there."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_asked_to_stop_writes_a_checkpoint_to_go_on_from(
    signum: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # the step in which it comes is finished first
    settings = ["checkpoint.every=100", "trainer.enable_progress_bar=true"]
    assert fit_until_asked(config(tmp_path, "stopped", *settings), 4, signum) == 128 + signum
    assert "stopped after step 5, with a checkpoint: resume=auto goes on" in capfd.readouterr().err
    assert [path.name for path in checkpoints(tmp_path / "stopped")] == ["step=5.ckpt"]
    fit(config(tmp_path, "on", f"resume={tmp_path / 'stopped'}"))
    whole = curve(fit(config(tmp_path, "whole"))[2])
    assert curve([row for file in history_files(tmp_path / "on") for row in read_history(file)]) == whole


def test_a_run_that_was_told_to_outlive_its_terminal_does(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert fit_until_asked(config(tmp_path, "a"), 4, signal.SIGHUP) == 1  # as where nothing is asked
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoints(tmp_path / "a")[-1].name == "step=9.ckpt"


def test_a_run_whose_time_is_over_goes_on_later(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = ["checkpoint.every=100", "training.min_lr_ratio=1"]
    stopped = config(tmp_path, "stopped", *settings)
    stopped["trainer"]["max_time"] = {"seconds": 1}
    with pytest.raises(SystemExit) as left:
        fit(stopped, before_step=lambda *_: time.sleep(0.3))
    assert left.value.code == 124
    assert "as trainer.max_time is over, with a checkpoint: resume=auto goes on" in capfd.readouterr().err
    (made,) = checkpoints(tmp_path / "stopped")
    assert 1 <= read(made)["global_step"] <= 4
    fit(config(tmp_path, "on", *settings, f"resume={tmp_path / 'stopped'}"))
    whole = curve(fit(config(tmp_path, "whole", *settings))[2])
    assert curve([row for file in history_files(tmp_path / "on") for row in read_history(file)]) == whole


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_asked_to_stop_outside_of_training_says_what_is_left(signum: int, capsys: pytest.CaptureFixture[str]) -> None:

    def asked() -> None:
        with answering() as answer:
            answer.text = "resume=RUN measures it"
            os.kill(os.getpid(), signum)

    before = signal.getsignal(signum)
    signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as left:
            asked()
        assert left.value.code == 128 + signum
        assert "resume=RUN measures it" in capsys.readouterr().err
        assert signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler)
    finally:
        signal.signal(signum, before)


def test_asked_to_stop_within_accumulated_gradients_finishes_the_step(tmp_path: Path) -> None:
    settings = ["checkpoint.every=3", "trainer.accumulate_grad_batches=2"]
    # the first batch of two
    assert fit_until_asked(config(tmp_path, "stopped", *settings), step=8) == 128 + signal.SIGTERM
    assert [path.name for path in checkpoints(tmp_path / "stopped")] == ["step=3.ckpt", "step=5.ckpt"]


def test_asked_to_stop_in_the_last_step(tmp_path: Path) -> None:
    """What comes after training is left for later."""
    assert fit_until_asked(config(tmp_path, "stopped"), step=8) == 128 + signal.SIGTERM
    assert checkpoints(tmp_path / "stopped")[-1].name == "step=9.ckpt"


def test_asked_to_stop_while_the_last_step_is_validated(tmp_path: Path) -> None:
    def stop(module: Any, batch: Any) -> None:
        if batch.step == 7:
            module.validation_step = lambda *_: os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as left:
        fit(config(tmp_path, "stopped", "trainer.max_steps=8"), before_step=stop)
    assert left.value.code == 128 + signal.SIGTERM
    assert checkpoints(tmp_path / "stopped")[-1].name == "step=8.ckpt"


def test_all_processes_stop_after_the_same_step(tmp_path: Path) -> None:
    """Though only one of them is asked."""

    def stop(module: Any, batch: Any) -> None:
        if batch.step == 4 and module.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    ranks = ["trainer.devices=2", "trainer.strategy=ddp_fork", "checkpoint.every=100"]
    with pytest.raises(SystemExit) as left:
        fit(config(tmp_path, "stopped", *ranks), before_step=stop)
    assert left.value.code == 128 + signal.SIGTERM
    assert [path.name for path in checkpoints(tmp_path / "stopped")] == ["step=5.ckpt"]


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    assert fit_until_asked(config(tmp_path, "stopped"), 4, signal.SIGINT, times=2) == -signal.SIGINT
    assert [path.name for path in checkpoints(tmp_path / "stopped")] == ["step=3.ckpt"]


def test_what_waits_for_the_signal_too_gets_it_after_the_checkpoint(tmp_path: Path) -> None:
    """As submitit does, which puts the job in the queue again."""

    def requeue(signum: int, frame: Any) -> None:
        found = [path.name for path in checkpoints(tmp_path / "stopped")]
        os._exit(77 if found == ["step=5.ckpt"] else 1)

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        settings = config(tmp_path, "stopped", "checkpoint.every=100")
        assert fit_until_asked(settings, 4, signal.SIGUSR2) == 77
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_job_of_a_repeated_sweep_is_known_by_its_settings(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    done = config(sweep, "0", "trainer.max_steps=3")
    fit(done)
    (sweep / "0" / "error.txt").touch()  # of a second start at the same time, which was refused
    mark_finished(sweep / "0", done, 0.25)
    assert not (sweep / "0" / "error.txt").exists()
    assert fit_until_asked(config(sweep, "1", "seed=1", "checkpoint.every=100"), step=4) == 128 + signal.SIGTERM
    # by another number, logged elsewhere
    assert find_in_sweep(config(sweep, "7", "trainer.max_steps=3", logger="wandb"), sweep) == (sweep / "0", 0.25)
    before = {name: value for name, value in done.items() if name not in ("state_bytes", "n_token")}
    assert find_in_sweep(before, sweep) == (sweep / "0", 0.25)  # settings that came later, and are null
    # all other settings count, unlike those of resume=auto: a sweep may be over precisions
    for other in ("trainer.precision=bf16-mixed", "trainer.max_steps=4", "seed=2", "needle.n_fact=3"):
        more = [] if "max_steps" in other else ["trainer.max_steps=3"]
        assert find_in_sweep(config(sweep, "0", other, *more), sweep) is None
    origin = find_in_sweep(config(sweep, "1", "seed=1", "checkpoint.every=100"), sweep)
    assert isinstance(origin, Origin)
    assert (origin.run, origin.step) == (sweep / "1", 5)
    # what is begun again is not finished
    fit(config(sweep, "0", f"resume={sweep / '0'}", "training.min_lr_ratio=0.05", "trainer.max_steps=4"))
    assert find_in_sweep(done, sweep) is None


def test_a_directory_holds_one_run(tmp_path: Path) -> None:
    def second(module: Any, batch: Any) -> None:
        if batch.step == 1:
            child = os.fork()  # locks belong to a process
            if child == 0:
                try:
                    with running(tmp_path / "a"):
                        os._exit(0)
                except ConfigError as error:
                    os._exit(
                        7 if "a is being trained by another process: give another hydra.run.dir" in str(error) else 1
                    )
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

    fit(config(tmp_path, "a", "trainer.max_steps=3"), before_step=second)
    before = checkpoints(tmp_path / "a")
    with pytest.raises(
        ConfigError, match=r"a holds a run already: give another hydra.run.dir, or go on with it: resume=.*a"
    ):
        fit(config(tmp_path, "a", "seed=1"))
    assert checkpoints(tmp_path / "a") == before
    fit(config(tmp_path, "a", f"resume={tmp_path / 'a'}"))  # in its own directory
    assert checkpoints(tmp_path / "a")[-1].name == "step=9.ckpt"


def test_what_is_damaged_beside_a_run_is_left_out_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path, "mine", "trainer.max_steps=3")
    fit(settings)
    newest = checkpoints(tmp_path / "mine")[-1]
    os.utime(newest, (1, 1))  # the others are looked at first
    cyclic: dict[str, Any] = {}
    cyclic["model"] = cyclic
    for name, odd in {"list": [], "null": None, "cyclic": cyclic, "part": {**settings, "trainer": 5}}.items():
        content = read(newest)
        content["memlm"]["config"] = odd
        write(content, tmp_path / name / "checkpoints" / newest.name)
    for name, put in {"pipe": os.mkfifo, "loop": lambda path: os.symlink(path, path), "folder": os.mkdir}.items():
        path = tmp_path / name / "checkpoints" / newest.name
        path.parent.mkdir(parents=True)
        put(path)
    os.mkfifo(tmp_path / "null" / ".lock")
    origin = find_origin("auto", config(tmp_path, "new", "trainer.max_steps=3"), [tmp_path])
    assert origin is not None
    assert origin.run.name == "mine"
    told = capsys.readouterr().err
    assert all(f"left out: {tmp_path / name}" in told for name in ("list", "null", "cyclic", "part", "pipe"))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"config": [], "value": 1}', b'{"config": {}, "value": "x"}', b"\xff"]
)
def test_a_damaged_mark_of_the_end_makes_no_job_of_a_sweep_fail(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "0"
    (run / "checkpoints").mkdir(parents=True)
    mark_finished(run, {"seed": 1, "trainer": {}, "paths": {"run_dir": "x"}}, 0.5)
    settings = {"seed": 1, "trainer": {}, "paths": {"run_dir": "y"}}
    assert find_in_sweep(settings, tmp_path) == (run, 0.5)
    (run / "finished.json").write_bytes(content)
    assert find_in_sweep(settings, tmp_path) is None
    assert f"left out: {run / 'finished.json'}" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"step\n\xff\n", b"step,a\n1," + b"x" * 200_000 + b"\n"])
def test_a_damaged_log_of_a_run_is_told_with_its_file(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "csv" / "metrics.csv"
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"csv/(metrics|earlier-0)\.csv cannot be read: it is damaged"):
        keep_earlier_history(tmp_path / "new", tmp_path, 1)
    assert file.read_bytes() == content


@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_a_lock_that_is_no_file_is_refused(put: Any, tmp_path: Path) -> None:
    put(tmp_path / ".lock")
    with pytest.raises(ConfigError, match=r"\.lock is no regular file"), running(tmp_path):
        pass


def test_the_same_text_in_another_place_is_gone_on_with(tmp_path: Path) -> None:
    whole, *_ = fit(config(tmp_path, "whole", phases=[PLAIN]))
    fit(config(tmp_path, "a", "trainer.max_steps=3", phases=[PLAIN]))
    moved, other = tmp_path / "moved.txt", tmp_path / "other.txt"
    (tmp_path / "text.txt").rename(moved)
    other.write_text(moved.read_text().replace("a", "e"))
    for resume in (str(tmp_path / "a"), "auto"):
        again = config(tmp_path, f"b-{resume == 'auto'}", f"resume={resume}", "trainer.max_steps=9", phases=[PLAIN])
        for node in (again["data"], again["data"]["corpus"]):
            node["path"] = str(moved)
        if resume == "auto":
            again["trainer"]["max_steps"] = 3
            origin = find_origin(
                resume, again, [tmp_path], lambda: read(checkpoints(tmp_path / "a")[-1])["memlm"]["text"]
            )
            assert origin is not None
            assert origin.run == tmp_path / "a"
            assert find_origin(resume, again, [tmp_path], lambda: "another") is None
            continue
        trainer, _, _ = fit(again)
        assert trainer.global_step == whole.global_step
        again["data"]["corpus"]["path"] = str(other)
        with pytest.raises(ConfigError, match=r"another (vocabulary|text)"):
            fit(again | {"resume": str(tmp_path / "a"), "paths": again["paths"] | {"run_dir": str(tmp_path / "c")}})
