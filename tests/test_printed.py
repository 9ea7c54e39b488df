"""Text that is shown, and not obeyed."""

import pytest

from memlm.printed import in_csv, in_markdown, one_line, printable


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("plain é 日本 עברית 👩‍🚀 a\tb\nc", "plain é 日本 עברית 👩‍🚀 a\tb\nc"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\x00b\rc\x7f\x9b", r"a\x00b\x0dc\x7f\x9b".replace(r"\x0d", r"\r")),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        ("a\u2028b\ufeff\ud800", r"a\u2028b\ufeff\ud800"),
        (5, "5"),
    ],
)
def test_what_would_be_obeyed_is_written_out(given: object, shown: str) -> None:
    assert printable(given) == shown


def test_one_line_is_one_line() -> None:
    assert one_line(" a\n b\tc\x1b ") == r"a b c\x1b"


def test_markdown_has_no_markup_and_no_html_in_it() -> None:
    assert in_markdown("a|b_c*\n# `x` <img src=x>&[y](z)") == (r"a\|b\_c\* \# \`x\` &lt;img src=x&gt;&amp;\[y\](z)")


def test_a_spreadsheet_calculates_nothing() -> None:
    for text in ('=HYPERLINK("x")', "+1", "-1", "@SUM(A1)", " =1", "\t=1"):
        assert in_csv(text) == f"'{text}"
    for value in ("a=1", "", -1.5, None, True):
        assert in_csv(value) is value
