"""Commands of the pages are ones that memlm takes, and those of the quick start do what it says."""

import importlib
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import pytest

from memlm.app import console
from memlm.app.command_line import check_command_line
from memlm.app.evaluate import name_all
from tests.training.small import write_text

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = {"tutorial", "attention_memory"}  # of files that only tests/docs/test_tutorial.py writes
PAGES = sorted({path.stem for path in (ROOT / "docs").glob("*.md")} - TUTORIALS)
HYDRA = ("train", "evaluate", "generate", "chat", "export", "check", "benchmark")
SMALL = [
    *("data.tokenizer.kind=word", "data.tokenizer.vocab_size=400", "model.d_model=16", "model.n_head=2"),
    *("model.n_layer=2", "model.segment_len=16", "model.overlap=4", "trainer=cpu", "trainer.max_steps=2"),
    *("logger=csv", "watch=null", "needle.n_document=2", "needle.n_fact=2", "needle.distance=32"),
    *("perplexity.limit=200", "curriculum.phases=[{steps: 2, n_row: 2, n_segment: 2, task: {items: 2}}]"),
]

pytestmark = pytest.mark.slow


def commands(page: str) -> list[list[str]]:
    """The words of each command of a page, which begin with the name of one of memlm's."""
    text = (ROOT / "docs" / f"{page}.md").read_text().replace("\\\n", " ").replace("=STEPS", "=100")
    for name, value in re.findall(r"^    (\w+)='(.+)'$", text, re.MULTILINE):  # a variable of the shell
        text = text.replace(f"${name}", value)
    lines = re.findall(r"^    (?:python |memlm )(.+)$", text, re.MULTILINE)
    lines += re.findall(r"^\| .+ \| `memlm (.+)` \|$", text, re.MULTILINE)
    words = [shlex.split(line, comments=True) for line in lines]
    return [[re.sub(r"^(scripts/)?(\w+)\.py$", r"\2", first), *rest] for first, *rest in words if first != "-m"]


def run(folder: Path, words: Sequence[str], said: str = "") -> str:
    """What a command prints that is given ``said``, in a process that has imported everything already."""
    for name in HYDRA:
        importlib.import_module(f"memlm.app.{name}")
    (folder / "said").write_text(said)
    (folder / "printed").unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            os.chdir(folder)
            os.dup2(os.open("said", os.O_RDONLY), 0)
            for stream in (1, 2):
                os.dup2(os.open("printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            sys.stdout, sys.stderr, sys.stdin = os.fdopen(1, "w"), os.fdopen(2, "w"), os.fdopen(0)
            sys.argv = ["memlm", *words]
            try:
                console.main()
            except SystemExit as stop:
                if stop.code:
                    raise
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    printed = (folder / "printed").read_text()
    assert code == 0, printed
    return printed


def write_files(page: str, folder: Path) -> None:
    """The files that a page shows and names."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    for name, content in re.findall(r"^```\w+ title=\"(.+?)\"\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_taken(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_files(page, tmp_path)
    for name, *words in commands(page):
        if name in HYDRA and "OPTIONS" not in words and "--help" not in words:
            check_command_line(name_all(words), name)


def test_the_quick_start_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "quickstart.md").read_text().partition("## More commands")[0]
    lines = [shlex.split(line) for line in re.findall(r"^    memlm (.+)$", text, re.MULTILINE)]
    assert [words[0] for words in lines] == ["train", "watch", "evaluate", "chat", "report", "train", "compare"]
    small = [*SMALL, "data=text", f"data.path={write_text(tmp_path)}"]
    printed = {}
    for words in lines:
        more = small if words[0] == "train" else []
        if words[0] == "evaluate":
            more = ["needle.distance=[32,64]", "needle.n_document=2", "needle.n_fact=2"]
        printed[words[0]] = run(tmp_path, [*words, *more], "Frame Codec was born in Pickwell.\n/clear\n")
    assert "[stored: record 0]" in printed["chat"]
    assert "[context cleared]" in printed["chat"]
    assert list(tmp_path.glob("outputs/report/*.html"))
    assert "memory" in printed["compare"]
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "quickstart", "exec"), {})


def test_a_task_of_ones_own_is_trained(tmp_path: Path) -> None:
    write_files("your_data", tmp_path)
    (words,) = [words for words in commands("your_data") if "curriculum=repeat" in words]
    small = [setting for setting in SMALL if not setting.startswith(("curriculum", "needle", "perp"))]
    run(tmp_path, [*words, *small, "data=text", f"data.path={write_text(tmp_path)}"])
    assert list(tmp_path.glob("outputs/*/*/checkpoints/step=2.ckpt"))
