"""`docs/prose.py` on a page whose words were counted by hand."""

from pathlib import Path
from typing import Any

import pytest

from tests.docs.programs import loaded

PROSE = Path(__file__).resolve().parents[2] / "docs" / "prose.py"

PAGE = """# A heading is no sentence

One two three. Four **five
six.** Seven `eight is one word`, eight. `this` too: [nine ten](eleven/twelve.md)!

    python train.py is code.

```python
this = "too"
```

- A point of
  five words
- Another: two 2 e.g. six.

![no words](figure.png)

| a | table |
|---|---|
| of | one row. Not a sentence. |

<!-- results/mine.json -->
| 1 | 2 |
|---|---|
| 3 | generated |
And a line.
<!-- end of results -->
By A. Author (and others). The end.
"""


@pytest.fixture(scope="module")
def prose() -> Any:
    pytest.importorskip("markdown_it")
    return loaded(PROSE)


def test_words_and_lines_are_those_counted_by_hand(prose: Any) -> None:
    sentences, tables = prose.measured(PAGE)
    assert [(sentence.n_word, sentence.line) for sentence in sentences] == [
        (3, 3),
        (3, 3),
        (3, 4),
        (4, 4),
        (5, 12),
        (5, 14),
        (5, 28),
        (2, 28),
    ]
    assert sentences[2].text == "Seven eight is one word, eight."
    assert tables == [(1, len("| of | one row. Not a sentence. |"), 18)]


def test_the_longest_are_named_with_their_place(prose: Any, tmp_path: Path, capsys: Any) -> None:
    page = tmp_path / "page.md"
    row = f"| {'a' * 120} |\n"
    page.write_text(f"Short one.\nThis one has five words.\n\n| b |\n|---|\n{row}\n\n| c |\n|---|\n" + "| d |\n" * 15)
    prose.main([str(page)])
    said = capsys.readouterr().out
    assert f"3.5        5          2  {page}" in said
    assert f"  5 words  {page}:2  This one has five words." in said
    assert said.endswith(f"  1 rows, 124 characters  {page}:4\n")
