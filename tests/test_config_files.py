"""Config files: those of a user in which a few lines stand for very much, and those that change."""

from pathlib import Path

import pytest

from memlm.app.cli import check_command_line
from memlm.compose import compose
from memlm.config import ConfigError

N = 40  # doublings: about 10^12 values


def write(tmp_path: Path, body: str) -> Path:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/mine.yaml").write_text(f"# @package _global_\n{body}")
    return tmp_path


def doubled(first: str, line: str) -> str:
    return first + "".join(line.format(i, i - 1) for i in range(1, N + 1)) + f"model:\n  memory_layers: *a{N}\n"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (doubled("x0: &a0 [1, 1]\n", "x{0}: &a{0} [*a{1}, *a{1}]\n"), "more than 10,000 values"),
        (doubled("x0: &a0 {k: 1}\n", "x{0}: &a{0}\n  <<: [*a{1}, *a{1}]\n"), "more than 10,000 values"),
        ("x: &a [1, *a]\n", "in themselves"),
        (f"x: &a {'[' * 70}1{']' * 70}\ny: *a\n", "more than 60 deep"),
    ],
    ids=["lists", "merged mappings", "itself", "deep"],
)
def test_what_stands_for_too_much_is_refused(tmp_path: Path, body: str, told: str) -> None:
    more = write(tmp_path, body)
    with pytest.raises(ConfigError, match=rf"recipe/mine\.yaml, with its aliases .*{told}"):
        compose(["recipe=mine"], searchpath=[more])
    with pytest.raises(ConfigError, match=told):
        check_command_line(["--config-dir", str(more), "recipe=mine"])


def test_aliases_are_filled_in(tmp_path: Path) -> None:
    more = write(tmp_path, "model:\n  d_model: &width 32\n  d_ff: *width\n")
    assert compose(["recipe=mine"], searchpath=[more]).model.d_ff == 32


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "main.yaml").write_text("a: 1\nb: [1]\n")
    first = compose([], "main", directory=tmp_path)
    first.b.append(2)  # what one is given is its own
    assert compose([], "main", directory=tmp_path) == {"a": 1, "b": [1]}
    (tmp_path / "main.yaml").write_text("a: 2\nb: [1]\n")
    assert compose([], "main", directory=tmp_path).a == 2
