"""Every page of `docs/` is on the site and links lead to pages; `mkdocs build --strict` in .ci/run checks the rest."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.programs import loaded

ROOT = Path(__file__).resolve().parents[2]


def nav(entries: Any) -> Iterator[str]:
    if isinstance(entries, str):
        yield entries
        return
    for entry in entries.values() if isinstance(entries, dict) else entries:
        yield from nav(entry)


@pytest.fixture(scope="module")
def hooks() -> Any:
    return loaded(ROOT / "docs" / "hooks.py")


def test_every_page_is_in_the_navigation(hooks: Any) -> None:
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    found = list(nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(found) == sorted(pages | set(hooks.ROOT_PAGES.values()))


def test_every_package_is_in_the_reference() -> None:
    reference = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    named = {line.removeprefix("::: ") for line in reference.splitlines() if line.startswith("::: ")}
    modules = {f"memlm.{path.stem}" for path in (ROOT / "memlm").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert {name for name in modules if "__" not in name} | {"experiments"} == named


@pytest.mark.parametrize(
    ("source", "link", "expected"),
    [
        ("README.md", "docs/memories/ltm.md#limits", "memories/ltm.md#limits"),
        ("README.md", "docs/figures/worth-dark.svg", "figures/worth-dark.svg"),
        ("README.md", "CONTRIBUTING.md", "contributing.md"),
        ("CONTRIBUTING.md", "docs/api/index.md", "api/index.md"),
        ("docs/architecture.md", "../CONTRIBUTING.md#tests", "contributing.md#tests"),
        ("docs/architecture.md", "memories/index.md", "memories/index.md"),
        ("docs/api/memory.md", "../memories/index.md", "../memories/index.md"),
        ("docs/api/memory.md", "../../README.md", "../index.md"),
        ("docs/architecture.md", "#data", "#data"),
        ("README.md", "results/worth.json", "https://github.com/memlm/memlm/blob/main/results/worth.json"),
        ("docs/architecture.md", "https://example.org/a.md", "https://example.org/a.md"),
    ],
)
def test_links_of_the_repository_are_links_of_the_site(hooks: Any, source: str, link: str, expected: str) -> None:
    assert hooks.site_links(f"see [it]({link}).", source) == f"see [it]({expected})."


@pytest.mark.parametrize(
    ("source", "link", "expected"),
    [
        ("README.md", "docs/figures/a.svg", "figures/a.svg"),
        ("docs/concepts.md", "figures/a.svg", "../figures/a.svg"),
        ("docs/results/needle.md", "../figures/a.svg", "../../figures/a.svg"),
        ("docs/results/index.md", "../figures/a.svg", "../figures/a.svg"),
    ],
)
def test_pictures_are_found_from_the_directory_of_a_page(hooks: Any, source: str, link: str, expected: str) -> None:
    for name in ("src", "srcset"):
        assert hooks.site_links(f'<img {name}="{link}">', source) == f'<img {name}="{expected}">'


def test_badges_are_for_the_repository_alone(hooks: Any) -> None:
    badge = "[![ci](https://example.org/ci.svg)](https://example.org/ci)\n"
    assert (
        hooks.site_links(f"# memlm\n\n{badge}{badge}\nText [![a](b.svg)](https://c).\n", "README.md").count("![") == 1
    )
