from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from memlm import quoting
from memlm.app import cli
from memlm.app.command_line import check_command_line
from memlm.compose import compose, config_dir, device_of_job, run_dir, to_dict
from memlm.config import ConfigError, schema_hints, validate
from memlm.files import ERROR
from memlm.schema import SCHEMAS
from tests.targets import HERE, error


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write(
        tmp_path / "tree",
        {
            "train": """
                defaults:
                  - _self_
                  - model: small
                  - memory: ltm
                  - data: builtin
                  - optional recipe: null
                seed: 0
                resume: null
                """,
            "model/small": f"""
                _target_: {HERE}.Model
                n_layer: 2
                dropout: 0.1
                """,
            "model/large": f"""
                _target_: {HERE}.Model
                n_layer: 12
                """,
            "memory/none": "{}",
            "memory/ltm": f"""
                ltm:
                  _target_: {HERE}.Ltm
                  n_slot: 10
                """,
            "memory/stm": f"""
                stm:
                  _target_: {HERE}.Ltm
                """,
            "memory/broken": f"""
                ltm:
                  _target_: {HERE}.Ltm
                  n_slots: 10
                """,
            "data/builtin": "path: null",
            "data/text": "path: ???",
            "recipe/recall": """
                # @package _global_
                defaults:
                  - override /memory: stm
                seed: 7
                """,
        },
    )


# composing


def test_overrides_groups_and_recipes(tree: Path) -> None:
    cfg = compose(["memory=stm", "model.n_layer=3", "+note=x"], directory=tree)
    assert (cfg.model.n_layer, list(cfg.memory), cfg.note) == (3, ["stm"], "x")
    recipe = compose(["recipe=recall"], directory=tree)
    assert (recipe.seed, list(recipe.memory)) == (7, ["stm"])
    assert "hydra" not in cfg


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("memory=lmt", ["memory has no option 'lmt'", "Did you mean 'ltm'?", "broken, ltm, none, stm"]),
        ("model.n_layr=2", ["'model.n_layr'", "Did you mean 'n_layer'?", "model has: dropout, n_layer"]),
        ("mdoel=small", ["'mdoel'", "Did you mean 'model'?"]),
        ("n_slot=4", ["'n_slot'", "Did you mean 'memory.ltm.n_slot'?"]),
        ("memory.ltm.n_slot.x=4", ["'memory.ltm.n_slot.x'", "memory.ltm.n_slot is a single value"]),
        ("memory.stm.n_slot=4", ["'memory.stm'", "memory has: ltm"]),
        ("resume.step=4", ["resume is a single value"]),
        ("model", ["Cannot read 'model'", "key=value"]),
        ("--model=small", ["Cannot read '--model=small'"]),
        ("seed=[1", ["Cannot read 'seed=[1'", "quotes"]),
        ("seed=1,2", ["several values", "-m", "'seed=[1,2]'"]),
        ("~nothing", ["nothing", "does not exist"]),
        ("data=text", ["data.path is required", "data.path=VALUE"]),
    ],
)
def test_mistakes_in_overrides(tree: Path, override: str, parts: list[str]) -> None:
    message = error(compose, [override], directory=tree)
    for part in parts:
        assert part in message


def test_mistakes_in_files(tree: Path) -> None:
    assert "Did you mean 'train'?" in error(compose, [], "trian", directory=tree)
    assert "no config directory" in error(compose, [], directory=tree / "nowhere")
    write(tree, {"bad": "a: [1", "gone": "defaults:\n  - model: tiny\n", "choose": "defaults:\n  - model: ???\n"})
    assert "not valid YAML" in error(compose, [], "bad", directory=tree)
    assert "model/tiny" in error(compose, [], "gone", directory=tree)
    assert "large" in error(compose, [], "choose", directory=tree)


def test_required_value_is_met(tree: Path) -> None:
    assert compose(["data=text", "data.path=a.txt"], directory=tree).data.path == "a.txt"


def test_search_path_adds_options(tree: Path, tmp_path: Path) -> None:
    more = write(tmp_path / "more", {"memory/mine": "{}"})
    assert compose(["memory=mine"], directory=tree, searchpath=[more]).memory == {}
    assert "mine" in error(compose, ["memory=min"], directory=tree, searchpath=[more])
    check_command_line(["--config-dir", str(more), "memory=mine"], directory=tree)


def test_works_while_hydra_is_initialised(tree: Path) -> None:
    import hydra

    with hydra.initialize_config_dir(str(tree), version_base="1.3"):
        outer = GlobalHydra.instance().hydra
        compose(directory=tree)
        error(compose, ["memory=lmt"], directory=tree)
        assert GlobalHydra.instance().hydra is outer
        assert hydra.compose("train").seed == 0
    compose(directory=tree)
    assert not GlobalHydra.instance().is_initialized()


def test_to_dict() -> None:
    cfg = OmegaConf.create({"a": {"b": [1, "${c}"]}, "c": 2})
    assert to_dict(cfg) == {"a": {"b": [1, 2]}, "c": 2}
    assert type(to_dict(cfg)["a"]["b"]) is list
    assert "a.b is required" in error(to_dict, OmegaConf.create({"a": {"b": "???"}}))
    assert "nowhere" in error(to_dict, OmegaConf.create({"a": "${nowhere}"}))


# command lines


@pytest.mark.parametrize(
    "argv",
    [
        ["memory=stm", "hydra.run.dir=x", "seed=3"],
        ["-m", "memory=none,ltm,stm", "model=glob(*)", "seed=range(0,1000)"],
        ["hydra.mode=MULTIRUN", "seed=1,2"],
        ["-m", "model.dropout=interval(0,0.5)"],
        ["--help", "memory=lmt"],
        ["--info", "config", "memory=lmt"],
        ["--cfg", "job", "data=text"],
        ["~seed", "+extra.a=1", "++model.dropout=0.2"],
    ],
)
def test_good_command_lines(tree: Path, argv: list[str]) -> None:
    check_command_line(argv, directory=tree)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["memory=lmt"], "Did you mean 'ltm'?"),
        (["--cfg", "job", "memory=lmt"], "Did you mean 'ltm'?"),
        (["--multrun", "seed=1"], "Did you mean '--multirun'?"),
        (["--experiment", "needle"], "There is no option '--experiment'. A setting is written experiment=VALUE."),
        (["--multi", "seed=1"], "Did you mean '--multirun'?"),
        (["seed=1,2"], "add -m"),
        (["data=text"], "data.path is required"),
        (["model.n_layer=two"], "model.n_layer must be an int"),
        (["memory=broken"], "memory.ltm.n_slots is not a setting"),
        (["-m", "memory=ltm,lmt"], "no option 'lmt'"),
        (["-m", "seed=1,2", "memory=none,ltm,broken"], "memory.ltm.n_slots"),
        (["-m", "memory=ltm,stm", "model.n_layer=1,two"], "model.n_layer must be an int, got 'two'"),
        (["-m", "model.n_layer=choice(1,2.5)"], "got 2.5"),
        (["-m", "memory=glob(x*)"], "sweeps over nothing"),
        (["+model.width=3"], "model.width is not a setting"),
        (["--config-name", "trian"], "Did you mean 'train'?"),
        (["--config-dir", "nowhere"], "--config-dir"),
    ],
)
def test_bad_command_lines(tree: Path, argv: list[str], part: str) -> None:
    assert part in error(check_command_line, argv, directory=tree)


def run(tree: Path, monkeypatch: pytest.MonkeyPatch, function: Any, *argv: str) -> Any:
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none", f"hydra.run.dir={tree}/out"]
    quiet += [f"hydra.sweep.dir={tree}/out"]
    monkeypatch.setattr(sys, "argv", ["train.py", *argv, *quiet])
    return cli.cli("train", directory=tree)(function)()


def test_cli_runs_the_function(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def main(cfg: Any) -> None:
        seen.append((list(cfg["memory"]), run_dir(), os.environ.get("HYDRA_FULL_ERROR")))

    run(tree, monkeypatch, main, "memory=stm")
    assert seen == [(["stm"], f"{tree}/out", None)]
    assert "HYDRA_FULL_ERROR" not in os.environ
    assert cli.cli("train")(lambda cfg: cfg + 1)(1) == 2


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (ConfigError("no slots."), 2, "error: no slots.\n"),
        (ValueError("inside"), 2, None),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "error: No such file or directory: a.txt\n"),
    ],
)
def test_cli_reports_mistakes_in_one_line(
    tree: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: Exception,
    code: int,
    text: str | None,
) -> None:
    def main(cfg: Any) -> None:
        raise raised

    if text is None:  # a ValueError of somebody else's code is a fault, not a mistake of the user
        with pytest.raises(ValueError, match="inside"):
            run(tree, monkeypatch, main)
        return
    with pytest.raises(SystemExit) as left:
        run(tree, monkeypatch, main)
    assert left.value.code == code
    stderr = capsys.readouterr().err
    assert stderr.startswith(text)
    assert "Traceback" not in stderr


def test_cli_takes_our_value_errors_for_mistakes(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scope: dict[str, Any] = {"__name__": "memlm.memory.fake"}
    exec("def main(cfg):\n    raise ValueError('n_slot must be at least 1')", scope)
    with pytest.raises(SystemExit) as left:
        run(tree, monkeypatch, lambda cfg: scope["main"](cfg))
    assert left.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: n_slot must be at least 1\n")
    assert "MEMLM_TRACEBACK=1" in stderr


def test_cli_checks_before_it_runs(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: list[int] = []
    with pytest.raises(SystemExit) as left:
        run(tree, monkeypatch, lambda cfg: jobs.append(cfg["seed"]), "-m", "model.n_layer=1,2,x")
    assert (left.value.code, jobs) == (2, [])
    assert capsys.readouterr().err == "error: model.n_layer must be an int, got 'x' (a string).\n"


@pytest.mark.slow
def test_cli_sweep_goes_on_after_a_failed_job(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: list[int] = []

    def main(cfg: Any) -> None:
        jobs.append(cfg["seed"])
        if cfg["seed"] != 2:
            raise ConfigError(f"seed {cfg['seed']} is unlucky.")

    with pytest.raises(SystemExit) as left:
        run(tree, monkeypatch, main, "-m", "seed=1,2,3")
    stderr = capsys.readouterr().err
    assert (left.value.code, jobs) == (2, [1, 2, 3])
    assert "error: job 0: seed 1 is unlucky." in stderr
    assert "error: job 2: seed 3 is unlucky." in stderr
    assert "Traceback" not in stderr
    # and all of them at the end
    listed = stderr.partition(f"error: 2 of the jobs in {tree}/out failed:\n")[2]
    assert listed.splitlines() == [
        f"  {tree}/out/0: seed 1 is unlucky.",
        f"  {tree}/out/2: seed 3 is unlucky.",
        f"To run what is left, repeat the command with hydra.sweep.dir={tree}/out",
    ]
    # a job that comes to an end the next time is no longer among them
    with pytest.raises(SystemExit):
        run(tree, monkeypatch, lambda cfg: 1 / (cfg["seed"] - 3), "-m", "seed=1,2,3")
    stderr = capsys.readouterr().err
    assert f"error: 1 of the jobs in {tree}/out failed:\n  {tree}/out/2: division by zero\n" in stderr
    assert "ZeroDivisionError" in (tree / "out" / "2" / ERROR).read_text()


def test_a_fault_in_a_job_is_no_mistake_of_the_user(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as left:
        run(tree, monkeypatch, lambda cfg: 1 / cfg["seed"], "-m", "seed=1,0")
    assert left.value.code == 1


@pytest.mark.parametrize(("stop", "code"), [(SystemExit(143), 143), (KeyboardInterrupt(), 130), (SystemExit(0), 0)])
def test_a_sweep_that_is_stopped_starts_no_other_job(
    stop: BaseException, code: int, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: list[int] = []

    def main(cfg: Any) -> None:
        jobs.append(cfg["seed"])
        raise stop

    with pytest.raises(SystemExit) as left:
        run(tree, monkeypatch, main, "-m", "seed=1,2")
    assert (left.value.code, jobs) == (code, [1])
    assert ("repeat the command with hydra.sweep.dir=" in capsys.readouterr().err) == (code != 0)


def test_a_run_that_leaves_nothing_leaves_no_directory(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(cfg: Any) -> None:
        assert (tree / "out" / ".hydra" / "config.yaml").is_file()
        raise ConfigError("no.")

    def write_and_refuse(cfg: Any) -> None:
        (tree / "out" / "a.txt").touch()
        raise ConfigError("no.")

    with pytest.raises(SystemExit):
        run(tree, monkeypatch, refuse)
    assert not (tree / "out").exists()
    with pytest.raises(SystemExit):
        run(tree, monkeypatch, write_and_refuse)
    assert (tree / "out" / "a.txt").exists()
    with pytest.raises(SystemExit):  # what was there stays
        run(tree, monkeypatch, refuse)
    assert (tree / "out" / "a.txt").exists()


def test_what_a_constructor_refuses_is_told_before_the_first_job(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: list[int] = []

    def check(cfg: Any) -> None:
        if cfg["seed"] == 3:
            raise ConfigError("seed 3 is unlucky.")

    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=1,2,3", f"hydra.sweep.dir={tree}/out"])
    with pytest.raises(SystemExit) as left:
        cli.cli("train", check, directory=tree)(lambda cfg: jobs.append(cfg["seed"]))()
    assert (left.value.code, jobs) == (2, [])
    assert capsys.readouterr().err == "error: seed 3 is unlucky.\n"
    assert not (tree / "out").exists()


def _parallel(tree: Path) -> None:
    write(tree, {"hydra/launcher/parallel": (config_dir() / "hydra/launcher/parallel.yaml").read_text()})


@pytest.mark.slow
def test_jobs_side_by_side(tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In processes of their own, with a GPU and a share of the cores each; failures as in one process."""
    _parallel(tree)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    place = str(tree)

    def main(cfg: Any) -> None:
        import os
        import time
        from pathlib import Path

        from memlm.config import ConfigError

        mine = Path(place, f"job{cfg['seed']}")
        mine.write_text(f"{os.getpid()} {os.environ['CUDA_VISIBLE_DEVICES']} {os.environ['OMP_NUM_THREADS']}")
        deadline = time.monotonic() + 60
        while not Path(place, f"job{1 - cfg['seed']}").exists():  # each waits for the other: they run at the same time
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if cfg["seed"] == 1:
            raise ConfigError("seed 1 is unlucky.")

    with pytest.raises(SystemExit) as left:
        run(tree, monkeypatch, main, "-m", "seed=0,1", "hydra/launcher=parallel")
    assert left.value.code == 2
    found = [(tree / f"job{seed}").read_text().split() for seed in (0, 1)]
    assert len({pid for pid, *_ in found} | {str(os.getpid())}) == 3
    assert [device for _, device, _ in found] == ["4", "7"]
    assert {int(threads) for *_, threads in found} == {max((os.cpu_count() or 1) // 2, 1)}
    assert f"error: 1 of the jobs in {tree}/out failed:\n  {tree}/out/1: seed 1 is unlucky." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("visible", "found"), [("4,7", ["4", "7", "4"]), ("GPU-a", ["GPU-a"] * 3), ("", [""] * 3), (None, ["0", "1", "2"])]
)
def test_devices_are_dealt_out_by_the_number_of_the_job(
    visible: str | None, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert [device_of_job(num) for num in range(3)] == found


def test_a_launcher_that_is_not_installed_is_told(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra.core.config_store import ConfigStore

    _parallel(tree)
    check_command_line(["-m", "hydra/launcher=parallel", "seed=1,2"], directory=tree)
    assert "Did you mean 'parallel'?" in error(check_command_line, ["-m", "hydra/launcher=paralel"], directory=tree)
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], "joblib.yaml")
    message = error(check_command_line, ["-m", "hydra/launcher=parallel", "seed=1,2"], directory=tree)
    assert "pip install 'memlm[launchers]'" in message


def test_shipped_launchers() -> None:
    """Every key of ours is one of the library's, which refuses others when it is composed."""
    import hydra

    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        for name, target in {
            "parallel": "JoblibLauncher",
            "slurm": "SlurmLauncher",
            "slurm_local": "LocalLauncher",
        }.items():
            found = hydra.compose("train", [f"hydra/launcher={name}"], return_hydra_config=True).hydra
            assert found.launcher._target_.endswith(target)
            assert ("CUDA_VISIBLE_DEVICES" in found.job.env_set) == (name != "slurm")


def test_cli_shows_the_traceback_on_request(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMLM_TRACEBACK", "1")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    with pytest.raises(ConfigError):
        run(tree, monkeypatch, lambda cfg: None, "memory=lmt")


def test_script(tree: Path) -> None:
    """Help of a real program: quick, complete and without torch."""
    write(tree, {"hydra/default": (config_dir() / "hydra" / "default.yaml").read_text()})
    write(tree, {"paths/default": (config_dir() / "paths" / "default.yaml").read_text()})
    text = (tree / "train.yaml").read_text().replace("  - _self_", "  - _self_\n  - paths: default\n  - hydra: default")
    (tree / "train.yaml").write_text(text)
    script = tree.parent / "train.py"
    script.write_text(
        textwrap.dedent(f"""
            import sys

            from memlm.app.cli import cli

            @cli("train", directory={str(tree)!r})
            def main(cfg):
                print("ran", cfg["seed"], cfg["paths"]["run_dir"])

            try:
                main()
            finally:
                print("slow imports:", [m for m in ("torch", "lightning", "wandb") if m in sys.modules])
            """)
    )
    root = str(Path(cli.__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root}
    help_ = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, env=env, check=True)
    assert "memory: broken, ltm, none, stm" in help_.stdout
    assert "memlm train -m" in help_.stdout
    assert "slow imports: []" in help_.stdout


# the shipped configs


def test_shipped_scripts_configs() -> None:
    assert "checkpoint is required" in error(compose, [], "evaluate")
    assert compose(["checkpoint=x"], "evaluate").paths.root == "outputs"
    cfg = compose(["checkpoint=x", "prompt='Once upon, a time'"], "generate")
    assert cfg.prompt == "Once upon, a time"
    assert to_dict(cfg)["paths"]["run_dir"] == "."
    assert compose(["checkpoint=x"], "chat").device == "auto"


@pytest.mark.parametrize("name", ["default", "cpu", "gpu"])
def test_shipped_trainers(tmp_path: Path, name: str) -> None:
    here = config_dir()
    write(
        tmp_path,
        {"main": f"defaults:\n  - _self_\n  - trainer: {name}\n  - logger: default\n  - paths: default\nname: null"},
    )
    cfg = compose([], "main", directory=tmp_path, searchpath=[here])
    assert set(cfg.logger) == {"csv", "wandb"}
    validate(to_dict(cfg))


TEXTS = [
    "1e3", "007", "true", "null", "The end ", " x", "${seed}", "Hello, world", "It's late", "x=3", "'q'", "[1]", "a\\",
    "\\'", "\\${seed}", "choice(1, 2)", "~x", "a\nb", "100 %", '"', "{a: 1}", "-m", "émile 日", "",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_is_the_text_that_was_given(text: str) -> None:
    for option in ([], ["-m"]):
        arguments = quoting.quote_texts([*option, "checkpoint=x", f"prompt={text}"])
        assert to_dict(compose(arguments[len(option) :], "generate"))["prompt"] == text


@pytest.mark.parametrize("text", [text for text in TEXTS if text not in ("null", "${seed}", "'q'", "[1]", "{a: 1}",
                                                                         "choice(1, 2)", "\\${seed}")])  # fmt: skip
def test_names_and_paths_are_texts(text: str) -> None:
    arguments = quoting.quote_texts([f"name={text}", f"paths.root={text}", f"++paths.cache_dir={text}"])
    config = compose(arguments)
    assert (config.name, config.paths.root, config.paths.cache_dir) == (text, text, text)


def test_names_and_paths_may_be_what_hydra_reads() -> None:
    for value in ("null", "'a b'", "${paths.root}", "['a,b']", "choice(a,b)", '"a",b'):
        assert quoting.quote_texts(["-m", f"name={value}"]) == ["-m", f"name={value}"]
    assert quoting.quote_texts(["-m", "name=a,1 2"]) == ["-m", "name='a','1 2'"]
    assert quoting.quote_texts(["model.n_layer=2", "names=a b"]) == ["model.n_layer=2", "names=a b"]


def test_a_quoted_text_stays_as_it_is() -> None:
    parser = OverridesParser.create()
    rng = random.Random(0)
    parts = [*"ab '\"\\$[](),=:#%\n\té", "\\'", "\\\\", "${", "${seed}", "}"]
    for _ in range(300):
        text = "".join(rng.choice(parts) for _ in range(rng.randrange(10)))
        value = parser.parse_override(f"prompt={quoting.quoted(text)}").value()
        assert to_dict(OmegaConf.create({"seed": 1, "text": value}))["text"] == text


def test_several_paths_are_split_at_commas_outside_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b=1").mkdir()

    def sweep(argument: str) -> str:
        return quoting.quote_texts(["-m", argument])[1]

    assert quoting.quote_texts(["checkpoint=x/step=3.ckpt"]) == ["checkpoint='x/step=3.ckpt'"]
    assert sweep("checkpoint=a,b=1") == "checkpoint='a,b=1'"
    assert sweep("checkpoint=x/step=3.ckpt,a,b=1,c") == "checkpoint='x/step=3.ckpt','a,b=1','c'"
    assert sweep("checkpoint=x,a") == "checkpoint='x','a'"
    assert sweep("checkpoint=['a,b=1']") == "checkpoint=['a,b=1']"


def test_an_empty_mapping_is_no_way_to_switch_off() -> None:
    with pytest.raises(ConfigError, match=r"watch=\{\} would change nothing.*use watch=null"):
        compose(["watch={}"])
    assert compose(["watch=null"]).watch is None


def test_a_value_that_others_refer_to_is_required_by_its_name() -> None:
    with pytest.raises(ConfigError, match=r"data\.path is required and has no value: give it as data\.path=VALUE"):
        compose(["data=text"])


def test_a_group_that_a_config_does_not_choose_from_is_told() -> None:
    for override in ("memory=ltm", "trainer=cpu"):  # a checkpoint tells its memory, and is not trained
        name = override.partition("=")[0]
        with pytest.raises(ConfigError, match=f"{name} is no choice of evaluate, which has experiment, logger, paths"):
            compose(["checkpoint=RUN", override], "evaluate")
    with pytest.raises(ConfigError, match=r"no setting .trainer.\. The settings are"):
        compose(["checkpoint=RUN", "trainer.max_steps=3"], "evaluate")


def test_null_is_no_option() -> None:
    with pytest.raises(ConfigError, match=r"memory=null chooses nothing: give an option, or leave .* out\. .*none"):
        compose(["memory=null"])
    assert compose(["~watch.needle"]).watch == {}


def test_a_sweep_ends_with_the_command_that_compares_its_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    cli.CompareHint().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": "multirun/a b"}}}))
    assert capsys.readouterr().out.strip() == "To compare the jobs: memlm compare 'multirun/a b'"


# keys that nothing reads


@pytest.mark.parametrize(
    ("config", "override", "parts"),
    [
        ("train", "+lr=0.1", ["setting 'lr'", "Did you mean 'training.lr'?"]),
        ("train", "++lr=0.1", ["setting 'lr'", "Did you mean 'training.lr'?"]),
        ("train", "+checkpoint.evry=1", ["'checkpoint.evry'", "Did you mean 'every'?", "checkpoint has: every, keep."]),
        ("train", "+data.batch_size=32", ["'data.batch_size'", "data has: corpus, n_worker, tokenizer."]),
        ("train", "+data.tokenizer.kid=char", ["'data.tokenizer.kid'", "Did you mean 'kind'?"]),
        ("train", "+data.path=a.txt", ["'data.path'"]),  # another corpus reads it, not this one
        ("train", "+paths.rot=a", ["'paths.rot'", "Did you mean 'root'?"]),
        ("train", "+extra={_target_: memlm.data.corpora.builtin.Builtin}", ["'extra'"]),
        ("train", "++memory.x=5", ["memory.x must be settings with a _target_"]),
        ("train", "+retention.n_write=[0]", ["retention.n_write has no effect", "experiment=retention"]),
        ("generate", "+max_tokens=2", ["'max_tokens'", "Did you mean 'max_new_tokens'?"]),
        ("evaluate", "+sead=2", ["'sead'", "Did you mean 'seed'?"]),
        ("search", "+search.trials=2", ["'search.trials'", "Did you mean 'n_trial'?"]),
        ("survival", "+kills=2", ["'kills'", "Did you mean 'n_kill'?"]),
        ("chat", "+temperature=1", ["'temperature'"]),
        ("export", "+dir=1", ["'dir'"]),
    ],
)
def test_a_key_that_nothing_reads_is_refused(config: str, override: str, parts: list[str]) -> None:
    needed = {"evaluate": ["checkpoint=x"], "chat": ["checkpoint=x"], "generate": ["checkpoint=x"]}
    needed["export"] = ["checkpoint=x", "output=y"]
    message = error(compose, [*needed.get(config, []), override], config)
    assert all(part in message for part in parts), message
    assert error(check_command_line, [*needed.get(config, []), override], config) == message


def test_a_typing_error_in_a_recipe_is_refused(tmp_path: Path) -> None:
    more = write(
        tmp_path, {"recipe/mine": "# @package _global_\nsead: 3\n", "recipe/right": "# @package _global_\nseed: 3\n"}
    )
    assert "'sead'. Did you mean 'seed'?" in error(compose, ["recipe=mine"], searchpath=[more])
    assert compose(["recipe=right"], searchpath=[more]).seed == 3


@pytest.mark.slow
def test_keys_that_others_refer_to_are_fine() -> None:
    assert compose(["+width=32", "model.d_model=${width}", "model.d_ff=${width}"]).model.d_ff == 32
    assert compose(["+a.b=x", "name=${a.b}"]).name == "x"
    assert compose(["+a.b=x", "+a.c=${.b}", "name=${a.c}"]).name == "x"
    assert "'a.c'" in error(compose, ["+a.b=x", "name=${a.b}", "+a.c=3"])
    compose(["+tag=x", "hydra.run.dir=out/${tag}"])
    assert "'a.c'" in error(compose, ["+a.b=1", "+a.c=${a.b}"])  # which nothing refers to in turn
    assert compose(["+a=1", "+b=${a}", "seed=${b}"]).seed == 1
    assert "'tagg'" in error(compose, ["+tagg=x", "hydra.run.dir=out/${hydra:job.name}"])


def test_settings_of_experiments_that_are_not_chosen_are_fine_in_a_recipe() -> None:
    assert "_target_" not in compose(["recipe=needle", "experiment=[]"]).needle


@pytest.mark.slow
def test_what_ships_has_the_keys_of_its_schema() -> None:
    """And every key of a schema has a value in what ships."""
    given = {"generate": ["checkpoint=x"], "evaluate": ["checkpoint=x"], "export": ["checkpoint=x", "output=y"]}
    given["chat"] = ["model=pretrained", "model.path=x", "memory=cache"]
    for name, schema in SCHEMAS.items():
        config = to_dict(compose(given.get(name, []), name))
        assert set(schema_hints(schema)) - set(config) <= {"logger"}
    for data in ("books", "builtin", "code", "hub", "shakespeare", "symbols", "text"):
        compose([f"data={data}", *(["data.name=a"] if data == "hub" else ["data.path=a"] if data == "text" else [])])


# sweeps of very many jobs


@pytest.mark.parametrize(
    "sweep",
    [["seed=range(0,1000000000)"], ["seed=range(0,inf)"], ["seed=range(0,200)", "trainer.max_steps=range(1,200)"]],
)
def test_a_sweep_of_too_many_jobs_is_refused_at_once(sweep: list[str]) -> None:
    assert "The sweep would be more than 10,000 jobs" in error(check_command_line, ["-m", *sweep])


@pytest.mark.slow
def test_of_very_many_values_some_are_checked(tree: Path) -> None:
    seen = []
    values = [*range(1000, 0, -1), 5000, 7]
    line = f"model.n_layer={','.join(map(str, values))}"
    check_command_line(["-m", line], directory=tree, check=lambda cfg: seen.append(cfg["model"]["n_layer"]))
    assert {1000, 7, 1, 5000} <= set(seen)
    assert len(seen) < 30
    assert "got 'x'" in error(check_command_line, ["-m", line.replace(",500,", ",x,")], directory=tree)
    assert "sweeps over nothing" in error(check_command_line, ["-m", "seed=range(0,5,0)"], directory=tree)
