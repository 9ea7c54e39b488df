import io
from pathlib import Path

import pytest

from memlm.app.generate import read_prompt
from memlm.config import ConfigError


class Stdin(io.TextIOWrapper):
    def __init__(self, content: bytes, tty: bool = False) -> None:
        super().__init__(io.BytesIO(content))
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


def test_a_prompt_is_an_argument_a_file_or_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\ntwo é \n\n".encode())
    assert read_prompt("The end ", None) == "The end "
    assert read_prompt(None, str(tmp_path / "a.txt")) == "one\r\ntwo é \n"
    for prompt in ("-", None):
        monkeypatch.setattr("sys.stdin", Stdin(b" piped \n"))
        assert read_prompt(prompt, None) == " piped "


@pytest.mark.parametrize(
    ("prompt", "content", "tty", "message"),
    [
        ("", b"", False, "prompt is empty"),
        ("a\udcff", b"", False, "prompt is not valid UTF-8"),
        (None, b"\n", False, "standard input is empty"),
        (None, b"a\xff", False, "standard input is not valid UTF-8"),
        (None, b"a", True, "there is no prompt: give"),
    ],
)
def test_a_prompt_that_is_none_is_refused(
    prompt: str | None, content: bytes, tty: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", Stdin(content, tty))
    with pytest.raises(ConfigError, match=message):
        read_prompt(prompt, None)


def test_two_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both given"):
        read_prompt("a", str(tmp_path / "a.txt"))
