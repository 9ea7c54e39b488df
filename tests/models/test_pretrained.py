"""Pretrained decoders with memory: against the bare base, the laws, checkpoints, errors."""

import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memlm import laws
from memlm.config import ConfigError
from memlm.data.stream import Batch
from memlm.memory.ltm import LongTermMemory
from memlm.models import hf_base
from memlm.models.decoding import Decoder
from memlm.models.segments import SegmentModel
from memlm.training.objective import Objective
from tests.models import bases

transformers = pytest.importorskip("transformers")

from memlm.models.pretrained import Pretrained  # noqa: E402

pytestmark = pytest.mark.slow

T, OVERLAP = 12, 4
ONE_SOFTMAX = {"n_token": 30, "norm_keys": False, "gate": None, "reach": 20}  # of knn, which then needs no training


def make_of(path: Path, name: str, **settings: Any) -> laws.Make:
    settings = {"path": str(path), "freeze": False} | settings
    return laws.builder(laws.nodes_of(name), model_class=functools.partial(Pretrained, **settings))  # type: ignore[arg-type]


def text(n_row: int, n_token: int, seed: int = 0) -> Tensor:
    return torch.randint(bases.N_VOCAB, (n_row, n_token), generator=torch.Generator().manual_seed(seed))


def by_base(base: Any, ids: Tensor, begin: list[int], overlap: int = OVERLAP) -> Tensor:
    """Logits of the bare base, segment by segment: each a text of its own, with the overlap before it."""
    found = []
    for start in range(0, ids.shape[1], T):
        first = max(start - overlap, 0)
        window = ids[:, first : start + T]
        window = torch.cat([torch.tensor(begin, dtype=torch.long).expand(len(ids), -1), window], dim=1)
        found.append(base(window).logits[:, len(begin) + start - first :])
    return torch.cat(found, dim=1)


# --- the law of pretrained models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", bases.FAMILIES)
@torch.no_grad()
def test_without_memory_logits_are_those_of_the_base(family: str, folder: Callable[[str], Path]) -> None:
    base, ids = bases.loaded(folder(family)), text(2, 3 * T + 5)
    model = Pretrained(40, {}, path=str(folder(family)), segment_len=T, overlap=OVERLAP).eval()
    torch.testing.assert_close(model(ids).logits, by_base(base, ids, []), atol=1e-5, rtol=1e-4)
    state, parts = None, []
    for part in ids.split([1, 1, 12, 3, 20, 4], dim=1):
        out = model(part, state=state)
        state = out.state
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), by_base(base, ids, []), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", bases.FAMILIES)
@torch.no_grad()
def test_one_segment_is_the_base_bit_for_bit(family: str, folder: Callable[[str], Path]) -> None:
    base, ids = bases.loaded(folder(family)), text(2, T)
    model = Pretrained(40, {}, path=str(folder(family)), segment_len=T, overlap=0).eval()
    assert torch.equal(model(ids).logits, base(ids).logits)


def nonzero_gates(model: SegmentModel) -> None:
    for gate in model.gates.values():  # type: ignore[operator, union-attr]
        gate.data.fill_(0.5)


@pytest.mark.parametrize("name", ["ltm", "stm", "delta", "auto", "imm", "memoria", "lm2", "hierarchy", "adaptive"])
@torch.no_grad()
def test_reads_begin_at_zero(name: str, folder: Callable[[str], Path]) -> None:
    """Whatever an untrained memory holds, logits are those of the base, bit for bit; and not once it is let in."""
    model, ids = make_of(folder("llama"), name)(perturb=False), text(2, 5 * T)
    bare = Pretrained(40, {}, path=str(folder("llama")), segment_len=T, overlap=OVERLAP).eval()
    for n_open in (0, 5):
        state = laws.filled(model, n_row=2, n_open=n_open)
        start = bare(laws.text(2, 7 * T + n_open, seed=9)).state
        assert torch.equal(model(ids, state=state).logits, bare(ids, state=start).logits)
    nonzero_gates(model)
    assert not torch.allclose(model(ids, state=state).logits, bare(ids, state=start).logits)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("cache", {}), ("compressive", {}), ("camelot", {}), ("camelot", {"reach": 20}), ("knn", ONE_SOFTMAX)],
)
@torch.no_grad()
def test_more_keys_change_nothing_while_there_are_none(
    name: str, settings: dict[str, Any], folder: Callable[[str], Path]
) -> None:
    model, ids = make_of(folder("llama"), name)(settings, perturb=False), text(2, 4 * T)
    bare = Pretrained(40, {}, path=str(folder("llama")), segment_len=T, overlap=OVERLAP).eval()
    torch.testing.assert_close(model(ids[:, :T]).logits, bare(ids[:, :T]).logits, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(ids).logits, bare(ids).logits, atol=1e-3)


# --- token by token ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [[], [7]])
@torch.no_grad()
def test_tokens_that_neither_begin_nor_end_a_segment_go_through_the_layers_alone(
    begin: list[int], folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_base, "begin_of", lambda _: begin)
    model, ids = make_of(folder("mistral"), "ltm")().eval(), text(2, 2 * T + 9)
    nonzero_gates(model)
    expected = model(ids).hidden[:, 3:]
    decoder = Decoder(model, model(ids[:, :3]).state, True, True)
    whole, calls = model.forward, []
    monkeypatch.setattr(model, "forward", lambda *given, **how: calls.append(1) or whole(*given, **how))
    found = [decoder.step(ids[:, i]) for i in range(3, ids.shape[1])]
    torch.testing.assert_close(torch.stack(found, dim=1), expected, atol=1e-4, rtol=1e-4)
    assert len(calls) == 4  # the ends and the beginnings of segments, of which there are two each


@pytest.mark.parametrize("name", ["knn", "infini"])
@torch.no_grad()
def test_token_by_token_the_base_is_as_it_was_while_memory_is_empty(name: str, folder: Callable[[str], Path]) -> None:
    model, ids = make_of(folder("llama"), name)().eval(), text(2, 2 * T + 3, seed=5)
    full = model.new_context(model(text(2, 3 * T, seed=6)).state)
    state = model.with_memory(full, model.init_state(2))
    one = laws.builders.logits(model, ids, state)
    assert not torch.allclose(one, laws.builders.logits(model, ids, full), atol=1e-3), "what it holds matters"
    decoder = Decoder(model, state, True, True)
    found = torch.stack([model.head(decoder.step(ids[:, i])) for i in range(ids.shape[1])], dim=1)
    torch.testing.assert_close(found, one, atol=1e-4, rtol=1e-4)


# --- what is trained, and what is kept -------------------------------------------------------------------------------

MEMORY = {"ltm": functools.partial(LongTermMemory, n_slot=20, d_key=8)}


def model_of(path: Path, memories: dict[str, Any] | None = None, **settings: Any) -> Pretrained:
    torch.manual_seed(0)
    return Pretrained(40, memories or {}, path=str(path), segment_len=T, overlap=OVERLAP, **settings)


def trained(model: Pretrained) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_what_is_trained(folder: Callable[[str], Path]) -> None:
    path = folder("llama")
    assert all(name.startswith(("memory.", "gates.")) for name in trained(model_of(path, MEMORY)))
    everything = model_of(path, MEMORY, freeze=False)
    assert trained(everything) == {name for name, _ in everything.named_parameters()}
    pytest.importorskip("peft")
    adapted = trained(model_of(path, MEMORY, lora={"r": 2})) - trained(model_of(path, MEMORY))
    assert adapted
    assert all("lora_" in name for name in adapted)


@pytest.mark.parametrize("settings", [{}, {"lora": {"r": 2}}, {"freeze": False}])
def test_a_checkpoint_holds_what_was_trained(settings: dict[str, Any], folder: Callable[[str], Path]) -> None:
    if "lora" in settings:
        pytest.importorskip("peft")
    model, ids = model_of(folder("llama"), MEMORY, **settings), text(2, 4 * T)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    weights = {name: part.clone() for name, part in model.state_dict().items()}
    of_base = [name for name in weights if name.startswith(("base.", "layers.")) and "lora_" not in name]
    assert bool(of_base) == ("freeze" in settings)
    other = model_of(folder("llama"), MEMORY, **settings)
    other.load_state_dict(weights)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, other.eval()(ids).logits)


def test_lora_begins_as_the_base(folder: Callable[[str], Path]) -> None:
    pytest.importorskip("peft")
    ids = text(2, 2 * T)
    with torch.no_grad():
        adapted, bare = (model_of(folder("llama"), lora=lora).eval() for lora in ({"r": 2}, None))
        assert torch.equal(adapted(ids).logits, bare(ids).logits)


def test_the_loss_of_text_is_the_distance_from_the_base_with_its_whole_context(folder: Callable[[str], Path]) -> None:
    pytest.importorskip("peft")
    base, share, n = bases.loaded(folder("llama")), 0.25, 9
    model = model_of(folder("llama"), MEMORY, lora={"r": 2}, distill=share)
    assert model.bare_len // T == 5
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    whole, weight = text(3, n * T + 1), torch.rand(3, n * T)
    ids, targets = whole[:, :-1], whole[:, 1:]
    reset, breaks = torch.zeros(3, n, dtype=torch.bool), torch.zeros(3, n, dtype=torch.bool)
    reset[0, 0] = reset[1, 5] = breaks[1, 7] = True  # the other rows go on with documents of the batch before
    answer = torch.zeros_like(ids, dtype=torch.bool)
    answer[0, 3:6] = answer[1, -1] = True
    batch = Batch(ids, targets, weight, answer, reset, breaks, None, False, True, 0)
    before, out = trained(model), model(ids, reset=reset, breaks=breaks)
    losses, nll, _ = Objective(model, 1.0).losses(batch, out, torch.tensor(1.0))

    # By row: from which segment on the base sees each segment. It has room for 5, and at least 2 before those counted.
    seen = [[0] * 5 + [2, 2, 4, 4], [None, None, 0, 0, 0, 5, 5, 7, 7], [None, None, 0, 0, 0, 2, 2, 4, 4]]
    expected, own = torch.zeros(()), -out.logits.log_softmax(dim=2).gather(2, targets[..., None])[..., 0]
    left = own * weight
    for row, starts in enumerate(seen):
        for i, start in enumerate(starts):
            here = slice(i * T, (i + 1) * T)
            counted = ~answer[row, here]
            if start is None:
                continue
            with torch.no_grad():
                teacher = base(ids[row : row + 1, start * T : (i + 1) * T]).logits[0, -T:].log_softmax(dim=1)
            away = (teacher.exp() * (teacher - out.logits[row, here].log_softmax(dim=1))).sum(dim=1)
            expected = expected + (away * weight[row, here])[counted].sum()
            left[row, here] = left[row, here] * (1 - share * counted)
    torch.testing.assert_close(nll, own)
    torch.testing.assert_close(losses["distance from the base"], share * expected)
    torch.testing.assert_close(losses["next-token loss"], left.sum())
    assert trained(model) == before
    sum(losses.values()).backward()
    assert all(part.grad is not None for name, part in model.named_parameters() if "lora_B" in name)


def test_a_base_in_bfloat16_has_memories_in_float32(folder: Callable[[str], Path]) -> None:
    model, ids = model_of(folder("llama"), MEMORY, dtype="bfloat16"), text(2, 4 * T)
    out = model(ids)
    assert out.logits.dtype == model.embedding.weight.dtype == torch.bfloat16
    assert {part.dtype for part in model.memory.parameters()} == {torch.float32}
    nonzero_gates(model)
    model(ids).logits.float().square().mean().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if n in ("gates.ltm",)
    )
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name.startswith("base."))


def test_a_run_keeps_which_base_it_was(folder: Callable[[str], Path], tmp_path: Path) -> None:
    path = folder("llama")
    settings = Pretrained.settled({"path": str(path), "freeze": True})
    assert settings == {"path": str(path), "freeze": True, "revision": None, "sha256": hf_base.hash_of(path)}
    other = bases.make_base("llama", tmp_path, num_hidden_layers=2)
    with pytest.raises(ConfigError, match=r"they are of another base, with which this memory was not trained"):
        model_of(other, sha256=settings["sha256"])
    with pytest.raises(ConfigError, match=r"another base"):
        Pretrained.settled({"path": str(other), "sha256": settings["sha256"]})


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": None}, "model.path is missing"),
        ({"path": "/nowhere/at/all"}, "model.path: there is no folder /nowhere/at/all"),
        ({"path": "some/model-of-nobody"}, "neither a folder nor a model in the cache of the hub: fetch it with 'hf"),
        ({"revision": "main"}, "model.revision is of models of the hub"),
        ({"lora": {"r": 2}, "freeze": False}, "model.lora stands beside weights that are frozen"),
        ({"lora": {"rank": 2}}, "model.lora: peft refuses"),
        ({"distill": 0.5}, "model.distill=0.5 needs adapters beside a frozen base: set model.lora, or leave it 0"),
        ({"distill": 2, "lora": {"r": 2}}, "model.distill must be in 0..1, got 2"),
        ({"dtype": "int8"}, "model.dtype must be one of float32, bfloat16, got 'int8'"),
        ({"segment_len": 61}, "more than the 64 places that the base knows: set model.segment_len to at most 60"),
        ({"memory_layers": [3]}, "different layers of 0..2"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    settings: dict[str, Any], message: str, folder: Callable[[str], Path]
) -> None:
    fine = {"path": str(folder("llama")), "segment_len": T, "overlap": OVERLAP}
    with pytest.raises(ValueError, match=message):
        Pretrained(40, {}, **(fine | settings))  # type: ignore[arg-type]


def test_another_tokenizer_is_refused(folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"the tokenizer has 41 ids, and the base knows 40: it is another tokenizer"):
        Pretrained(41, {}, path=str(folder("llama")))


def test_a_folder_that_is_no_decoder_is_refused(tmp_path: Path, folder: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"is no model of Hugging Face: it has no config.json"):
        model_of(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = transformers.BertModel(transformers.BertConfig(vocab_size=40, **sizes))
    encoder.save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match=r"is a BertModel, no decoder that predicts the next token"):
        model_of(tmp_path / "bert")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has no weights|cannot be read as a model"):
        model_of(tmp_path)


def test_a_quantised_base_is_not_trained(tmp_path: Path, folder: Callable[[str], Path]) -> None:
    shutil.copytree(folder("llama"), tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"are quantised, so they cannot be trained: leave model.freeze true"):
        model_of(tmp_path / "base", freeze=False)


@pytest.mark.parametrize(("package", "settings"), [("transformers", {}), ("peft", {"lora": {"r": 2}})])
def test_a_missing_extra_is_told(
    package: str, settings: dict[str, Any], folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder("llama")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs {package}: pip install 'memlm\[pretrained\]'"):
        model_of(path, **settings)


def test_a_head_that_is_not_linear_is_refused(tmp_path: Path) -> None:
    config = transformers.Gemma2Config(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, final_logit_softcapping=0.5,
    )  # fmt: skip
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma2")
    with pytest.raises(ConfigError, match=r"memory cannot be attached to gemma2 in .*: its logits are more than"):
        model_of(tmp_path / "gemma2")
