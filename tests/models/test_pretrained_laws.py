"""Memories on pretrained decoders, before the laws."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memlm import laws
from memlm.models.segments import SegmentModel
from tests.laws import test_laws
from tests.models import bases

pytest.importorskip("transformers")

from memlm.models.pretrained import Pretrained

ONE_SOFTMAX = {"n_token": 30, "norm_keys": False, "gate": None, "reach": 20}  # of knn, which then needs no training
LAWS = [*test_laws.LAWS, laws.bare, laws.closed_once]
WHOLE = ("ltm", "stm", "cache", "delta")
# What differs from one way of standing around a layer to the next; by all memories but those above.
EACH = [laws.alive, laws.causal, laws.chunk_invariant, laws.generates_as_parallel, laws.resets]
# By family, memories that read, that give more keys, that use heads, and that put cells before a segment.
FAMILIES = {
    "qwen2": ("ltm", "camelot", "rmt"),
    "qwen3": ("stm", "pool", "infini"),
    "gpt2": ("delta", "cache", "hmt"),
    "gpt_neox": ("memoria", "knn", "rmt"),
    "gemma": ("ltm", "compressive", "armt"),
    "mistral": ("titans", "mplus", "knn"),
}


def make_of(path: Path, name: str) -> laws.Make:
    model: Any = functools.partial(Pretrained, path=str(path), freeze=False)
    return laws.builder(laws.nodes_of(name), model_class=model)


@pytest.mark.parametrize("name", test_laws.lanes(laws.names()))
def test_an_empty_or_untrained_memory_leaves_the_base_as_it_is(name: str, folder: Callable[[str], Path]) -> None:
    laws.bare(make_of(folder("llama"), name))


def test_the_law_of_the_base_bites(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pretrained, "bare_when_empty", False)
    for name in ("rmt", "infini"):
        with pytest.raises(AssertionError, match="an empty memory: differ"):
            laws.bare(make_of(folder("llama"), name))
    monkeypatch.setattr(Pretrained, "let_in", SegmentModel.let_in)
    with pytest.raises(AssertionError, match="an untrained memory: differ"):
        laws.bare(make_of(folder("llama"), "ltm"))


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("law", LAWS)
def test_laws_hold(law: Callable[[laws.Make], None], name: str, folder: Callable[[str], Path]) -> None:
    make = make_of(folder("llama"), name)
    if law is not laws.inspectable or laws.has_slots(name):
        law(make)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in laws.names() if name not in ("none", *WHOLE)])
def test_laws_hold_for_every_memory(name: str, folder: Callable[[str], Path]) -> None:
    make = make_of(folder("llama"), name)
    for law in EACH:
        law(make)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), [("camelot", {"reach": 20}), ("knn", ONE_SOFTMAX)])
@pytest.mark.parametrize("law", [*EACH, laws.isolated])
def test_laws_hold_for_what_needs_no_training(
    law: Callable[[laws.Make], None], name: str, settings: dict[str, Any], folder: Callable[[str], Path]
) -> None:
    make = make_of(folder("llama"), name)
    law(lambda memory=None, **model: make(settings | (memory or {}), **model))


@pytest.mark.slow
@pytest.mark.parametrize("law", [law for law in LAWS if law not in (laws.alive, laws.reach, laws.inspectable)])
def test_laws_hold_without_memory(law: Callable[[laws.Make], None], folder: Callable[[str], Path]) -> None:
    law(make_of(folder("llama"), "none"))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in FAMILIES.items() for name in names])
def test_laws_hold_in_other_families(family: str, name: str, folder: Callable[[str], Path]) -> None:
    for law in (laws.bare, *EACH):
        law(make_of(folder(family), name))


def test_every_family_is_put_before_the_laws() -> None:
    assert {"llama", *FAMILIES} == set(bases.FAMILIES)
