from types import SimpleNamespace
from typing import Any

from memlm.data.growing import GrowingText


def test_pieces_are_the_text_and_no_character_is_cut() -> None:
    letters: Any = SimpleNamespace(decode=lambda ids: bytes(ids).decode(errors="replace"))
    text = "a é 語 🙂\n."
    growing = GrowingText(letters)
    pieces = [growing.add([byte]) for byte in text.encode()]
    assert [piece for piece in pieces if piece] == list(text)
    assert growing.end() == ""


def test_bytes_that_are_no_character_come_too() -> None:
    letters: Any = SimpleNamespace(decode=lambda ids: bytes(ids).decode(errors="replace"))
    for ids in ([97, 0xE8, 97], [0xE8], [0xFF] * 9, [97, 0xF0, 0x9F]):
        growing = GrowingText(letters)
        assert "".join([*(growing.add([i]) for i in ids), growing.end()]) == bytes(ids).decode(errors="replace")


def test_spaces_between_words_are_kept() -> None:
    words: Any = SimpleNamespace(decode=lambda ids: " ".join("abc"[i] for i in ids))  # none before the first
    growing = GrowingText(words)
    assert [growing.add([0, 1]), growing.add([2]), growing.add([0])] == ["a b", " c", " a"]
