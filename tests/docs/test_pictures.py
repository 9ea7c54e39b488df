"""The pictures of the pages are those that `docs/pictures.py` draws."""

import importlib.util
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]


def test_pictures_are_as_drawn_and_shown() -> None:
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    page = (ROOT / "docs" / "concepts.md").read_text()
    for name, draw in pictures.PICTURES.items():
        drawn = draw().svg()
        assert (ROOT / f"docs/figures/{name}.svg").read_text() == drawn, "run python docs/pictures.py"
        assert ElementTree.fromstring(drawn).tag.endswith("svg")
        assert f"](figures/{name}.svg)" in page
