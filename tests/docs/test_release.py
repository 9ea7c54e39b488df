"""What a release says of itself agrees."""

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import memlm
from tests.docs.programs import loaded
from tests.test_layout import OURS, at_run, imports, sources

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]


def needed(*extras: str) -> list[Requirement]:
    """Return what memlm and some of its extras depend on."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    found = [Requirement(line) for line in lines]
    return [each for each in found if each.name != "memlm"]


def test_citation_and_changelog_know_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == memlm.__version__
    assert citation["repository-code"] == PROJECT["urls"]["Source"]
    assert citation["license"] == PROJECT["license"]
    versions = re.findall(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == (memlm.__version__, str(citation["date-released"]))


def test_python_versions_agree() -> None:
    """What is promised is what is tested, linted and checked for types."""
    versions = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs["check"]["strategy"]["matrix"]["python"] == versions
    assert PROJECT["requires-python"] == f">={versions[0]}"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == versions[0]
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{versions[0].replace('.', '')}"


def test_what_is_imported_is_declared() -> None:
    packages = metadata.packages_distributions()
    declared = {canonicalize_name(each.name) for each in needed(*EXTRAS)} | {"triton", "wordllama"}  # see their imports
    for path, module in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, name in imports(tree, module, path.name == "__init__.py", at_run):
            top = name.partition(".")[0]
            if top not in OURS | sys.stdlib_module_names:
                homes = {canonicalize_name(home) for home in packages.get(top, [top])}
                assert homes & declared, f"{path}:{line} imports {top}, which pyproject.toml does not name"


@pytest.fixture(scope="module")
def oldest() -> dict[str, str]:
    return loaded(ROOT / ".ci" / "oldest.py").oldest((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_every_dependency_has_an_oldest_version(oldest: dict[str, str], extra: str) -> None:
    for each in needed(*([extra] if extra else [])):
        assert {s.version for s in each.specifier if s.operator in (">=", "==")} == {oldest[each.name]}, each


def test_the_lock_holds_what_is_needed() -> None:
    text = (ROOT / "requirements.lock").read_text()
    pins = dict(re.findall(r"^([\w.-]+)==(\S+) \\$", text, re.MULTILINE))
    line = r"#.*|[\w.-]+==\S+ \\| {4}--hash=sha256:[0-9a-f]{64}(?: \\)?"
    assert re.fullmatch(rf"(?:(?:{line})\n)+", text), "something else than pins and hashes"
    for each in needed("test", "docs", "dev", "launchers", "search", "pretrained"):
        assert each.specifier.contains(pins[canonicalize_name(each.name)], prereleases=True), each
    assert pins["torch"].endswith("+cpu")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["rev"] for hook in hooks if hook["repo"].endswith("/ruff-pre-commit")] == [f"v{pins['ruff']}"]


def test_links_and_pictures_on_pypi_lead_to_the_repository() -> None:
    def shown(text: str) -> str:
        for rule in PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
            text = re.sub(rule["pattern"], rule["replacement"], text)
        return text

    raw, blob = "https://raw.githubusercontent.com/memlm/memlm/main/", "https://github.com/memlm/memlm/blob/main/"
    assert shown("![x](docs/a.png) [y](docs/b.md#c)") == f"![x]({raw}docs/a.png) [y]({blob}docs/b.md#c)"
    assert shown('<source srcset="d.svg"><img src="l.svg">') == f'<source srcset="{raw}d.svg"><img src="{raw}l.svg">'
    assert shown("[![b](https://c/b.svg)](https://c) [d](#e)") == "[![b](https://c/b.svg)](https://c) [d](#e)"
    left = r'\]\((?!https?://|mailto:|#)|\b(?:src|srcset|href)="(?!https?://|#)'
    assert not re.findall(left, shown((ROOT / "README.md").read_text()))
