"""The house: imports point down only."""

import ast
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up; a module imports from its own room and from the floors below it. `memlm` itself is the roof of the
# package: it names what lies below without importing it. Nothing uses `memlm.compat`, which may use all.
FLOORS = [
    {
        "memlm.annotations",
        "memlm.config",
        "memlm.distributed",
        "memlm.files",
        "memlm.machine",
        "memlm.output",
        "memlm.printed",
        "memlm.quoting",
        "memlm.saved",
        "memlm.schema",
        "memlm.statistics",
        "memlm.tensors",
        "memlm.threads",
        "memlm.version",
    },
    {"memlm.data", "memlm.retrieval", "memlm.compose", "memlm.config_files", "memlm.known"},
    {"memlm.memory"},
    {"memlm.models", "memlm.store"},
    {"memlm.assemble", "memlm.exported"},
    {"memlm.analysis", "memlm.laws"},
    {"memlm.checkpoint"},
    {"memlm.hf"},
    {"memlm.training"},
    {"memlm"},
    {"memlm.evaluation"},
    {"experiments", "memlm.app"},
    {"benchmarks", "scripts", "train", "memlm.compat", "memlm.__main__"},
]
OURS = {"memlm", "experiments", "benchmarks", "scripts", "train"}

# A trained model is loaded and used without what trains it: that holds for the floors up to `memlm.assemble` but for
# a few of their modules, for `memlm.checkpoint`, and for all that these import when they are imported.
TRAINING = {"hydra", "omegaconf", "lightning", "lightning_fabric", "pytorch_lightning", "wandb"}
NOT_LOADED = {
    "memlm.compose",
    "memlm.config_files",
    "memlm.known",
    "memlm.quoting",
    "memlm.data.datamodule",
    "memlm.__main__",
}


def floor(module: str) -> int:
    """Return the floor of the longest known prefix of a dotted name."""
    parts = module.split(".")
    for n in range(len(parts), 0, -1):
        name = ".".join(parts[:n])
        for level, names in enumerate(FLOORS):
            if name in names:
                return level
    raise AssertionError(f"{module} has no floor: add it to FLOORS")


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield what is run when a module is imported: not what functions do, or what only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        if not isinstance(node, functions) and not (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ):
            yield node
            yield from at_import(node)


def at_run(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all but what only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            yield node
            yield from at_run(node)


def imports(
    tree: ast.Module, module: str, is_package: bool, walk: Callable[[ast.AST], Iterable[ast.AST]] = ast.walk
) -> Iterator[tuple[int, str]]:
    """Yield the line and the dotted name of everything a module imports, by default also inside of functions."""
    for node in walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
                base = ".".join([*package, base] if base else package)
            # `from memlm import build` names a module; `from memlm.build import build` a function
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def sources() -> Iterator[tuple[Path, str]]:
    paths = [ROOT / "train.py", *(p for d in sorted(OURS - {"train"}) for p in (ROOT / d).rglob("*.py"))]
    for path in paths:
        if path.exists():
            yield path, ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    found = []
    for line, name in imports(ast.parse(source), module, is_package):
        if name.split(".")[0] in OURS and floor(name) > floor(module):
            found.append(f"{module}:{line} imports {name}")
    return found


def test_imports_point_down_only() -> None:
    found = [v for path, name in sources() for v in violations(path.read_text(), name, path.name == "__init__.py")]
    assert not found, "\n".join(found)


def test_violations_are_seen() -> None:
    assert violations("from memlm.models.lmcode import LmCode", "memlm.memory.ltm")
    assert violations("from memlm import build", "memlm.models.lmcode")
    assert violations("from memlm.memory.state import detach", "memlm.retrieval.exact")
    assert violations("def f():\n    import memlm.evaluation.result", "memlm.training.module")
    assert violations("from ..training import module", "memlm.memory.ltm")
    assert violations("from .training import module", "memlm.memory", is_package=False)
    assert violations("from memlm.app.cli import compose", "memlm.models.lmcode")
    assert violations("from memlm.compat.lmcode import LMCODE", "experiments.needle")
    assert not violations("from memlm.config import ConfigError", "memlm.memory.ltm")
    assert not violations("from .contract import Memory\nfrom ..retrieval import exact", "memlm.memory.ltm")
    assert not violations("from memlm.evaluation.result import Result", "scripts.evaluate")


def ways_to_training(start: str, sources: Mapping[str, str], packages: Collection[str] = ()) -> list[str]:
    """Return how the import of a module comes to import a package of training, module by module."""
    found, seen, ways = [], {start}, [[start]]
    for way in ways:  # which grows
        module = way[-1]
        for _, name in imports(ast.parse(sources[module]), module, module in packages, at_import):
            if name.split(".")[0] in TRAINING:
                found.append(" > ".join([*way, name]))
            target = next((n for n in (name, name.rpartition(".")[0]) if n in sources), None)
            if target is not None and target not in seen:
                seen.add(target)
                ways.append([*way, target])
    return found


@pytest.mark.slow
def test_a_model_is_loaded_without_what_trains_it() -> None:
    texts = {name: path.read_text() for path, name in sources()}
    packages = {name for path, name in sources() if path.name == "__init__.py"}
    loaded = {name for name in texts if name.split(".")[0] == "memlm" and floor(name) <= floor("memlm.assemble")}
    loaded = loaded - NOT_LOADED | {"memlm", "memlm.checkpoint"}
    assert loaded > {
        "memlm.config",
        "memlm.memory.ltm",
        "memlm.models.lmcode",
        "memlm.data.tokenizer",
        "memlm.assemble",
    }
    found = [way for name in sorted(loaded) for way in ways_to_training(name, texts, packages)]
    assert not found, "\n".join(found)


def test_ways_to_training_are_seen() -> None:
    texts = {
        "memlm.config": "import hydra.errors",
        "memlm.build": "from memlm.config import compose\ntry:\n    from . import cli\nfinally:\n    pass",
        "memlm.cli": "class A:\n    from lightning.pytorch import Trainer",
        "memlm.checkpoint": "if TYPE_CHECKING:\n    import lightning\ndef load():\n    import memlm.build",
    }
    assert ways_to_training("memlm.build", texts) == [
        "memlm.build > memlm.config > hydra.errors",
        "memlm.build > memlm.cli > lightning.pytorch.Trainer",
    ]
    assert ways_to_training("memlm.checkpoint", texts) == []


def test_no_catch_all_modules() -> None:
    assert not [name for _, name in sources() if name.split(".")[-1] in ("utils", "helpers", "misc", "common")]


def circles(imported: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, by Tarjan's algorithm."""
    place: dict[str, int] = {}
    least: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        place[module] = least[module] = len(place)
        stack.append(module)
        for other in sorted(imported[module]):
            if other not in place:
                visit(other)
                least[module] = min(least[module], least[other])
            elif other in stack:
                least[module] = min(least[module], place[other])
        if least[module] == place[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in imported:
        if module not in place:
            visit(module)
    return found


def test_no_modules_import_each_other() -> None:
    texts = {name: (path.read_text(), path.name == "__init__.py") for path, name in sources()}
    imported: dict[str, set[str]] = {}
    for module, (source, is_package) in texts.items():
        names = (name for _, name in imports(ast.parse(source), module, is_package, at_run))
        known = ({name, name.rpartition(".")[0]} & texts.keys() for name in names)
        # `memlm` names what it offers for type checkers; a folder offers what its modules hold
        imported[module] = set() if is_package else {max(found, key=len) for found in known if found} - {module}
    assert not circles(imported)


def test_circles_are_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})
