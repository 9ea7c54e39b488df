"""Exports as models of transformers, against memlm itself and the bare base."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memlm import checkpoint
from memlm.assemble import build_model
from memlm.config import ConfigError
from memlm.data.tokenizer import train_tokenizer
from tests.experiments.tiny import MEMORIES
from tests.models import bases

transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline  # noqa: E402

from memlm.hf import MemlmCache, MemlmForCausalLM  # noqa: E402

pytestmark = pytest.mark.slow

LTM = {"ltm": MEMORIES["ltm"] | {"n_slot": 50, "write_budget": None, "top_k": 8}}
TEXT = "a cat sat on a red box. a dog ran home. it saw a cat."


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bases.with_tokenizer(bases.make_base("llama", tmp_path_factory.mktemp("bases")))


def from_scratch() -> Any:
    config = {
        "model": {
            "_target_": "memlm.models.lmcode.LMCode", "n_layer": 2, "n_head": 2, "d_model": 32, "segment_len": 16,
            "overlap": 4,
        },
        "memory": LTM,
        "data": {"tokenizer": {"n_vocab": None}},
        "seed": 0,
    }  # fmt: skip
    return build_model(config, train_tokenizer("byte", (), 0)).eval()


def made(kind: str, llama: Path) -> Any:
    if kind == "lmcode":
        return from_scratch()
    if kind == "lora":
        pytest.importorskip("peft")
        model = bases.attached(llama, LTM, lora={"r": 2})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        return model
    return bases.attached(llama, LTM if kind == "ltm" else {})


def ids_of(model: Any, n_row: int, n_token: int, seed: int = 0) -> Tensor:
    return torch.randint(2, model.n_vocab, (n_row, n_token), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["lmcode", "ltm", "lora"])
@torch.no_grad()
def test_the_round_trip_is_exact(kind: str, llama: Path, tmp_path: Path) -> None:
    model = made(kind, llama)
    stored = model.store_experience(TEXT)
    checkpoint.export(model, tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = ids_of(model, 2, 70)
    assert torch.equal(found(ids).logits, model(ids).logits)
    assert not torch.equal(found(ids).logits, found(ids, read=False).logits)  # else memory plays no part
    assert [part.id for part in found.model.list_memory()] == stored[::-1]
    found.save_pretrained(tmp_path / "again")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ids).logits, model(ids).logits)
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or path.name == "SHA256SUMS" or path.suffix in (".json", ".safetensors")


@torch.no_grad()
def test_a_call_goes_on_from_the_past_and_leaves_it_as_it_was(llama: Path) -> None:
    model = MemlmForCausalLM.of(made("ltm", llama))
    ids = ids_of(model.model, 2, 60)
    whole = model(ids).logits
    out, parts = None, []
    for part in ids.split([5, 20, 1, 34], dim=1):
        past = None if out is None else out.past_key_values
        out = model(part, past_key_values=past)
        assert torch.equal(model(part, past_key_values=past).logits, out.logits)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-4)
    assert out.past_key_values.get_seq_length() == 60
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, whole[:, -3:], atol=1e-5, rtol=1e-4)
    fresh = out.past_key_values.new_context()
    by_memory = model.model(ids[:, :4], state=model.model.new_context(out.past_key_values.state)).logits
    assert torch.equal(model(ids[:, :4], past_key_values=fresh).logits, by_memory)


def test_the_loss_is_that_of_the_next_tokens(llama: Path) -> None:
    model = MemlmForCausalLM.of(made("ltm", llama))
    ids = ids_of(model.model, 2, 30)
    labels = ids.clone()
    labels[0, :10] = -100
    out = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert model.model.gates["ltm"].grad is not None


@torch.no_grad()
def test_generation_is_that_of_memlm_and_of_recomputation(llama: Path) -> None:
    model = MemlmForCausalLM.of(made("ltm", llama))
    rows = [ids_of(model.model, 1, n, seed=n) for n in (23, 9)]
    how = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    alone = [model.generate(row, **how) for row in rows]
    for row, found in zip(rows, alone, strict=True):
        assert torch.equal(found, model.model.generate(row, 30, do_sample=False))
        assert torch.equal(found, model.generate(row, use_cache=False, **how))
    padded = torch.nn.functional.pad(rows[1], (14, 0))
    mask = torch.ones(2, 23, dtype=torch.long)
    mask[1, :14] = 0
    both = model.generate(torch.cat([rows[0], padded]), attention_mask=mask, **how)
    assert torch.equal(both[0], alone[0][0])
    assert torch.equal(both[1, 14:], alone[1][0])
    beams = [model.generate(rows[0], num_beams=3, use_cache=cached, **how) for cached in (True, False)]
    assert torch.equal(*beams)
    assert model.generate(rows[0], num_return_sequences=3, max_new_tokens=3, do_sample=True).shape == (3, 26)


@torch.no_grad()
def test_without_memory_generation_is_that_of_the_base(llama: Path) -> None:
    """Within a segment; the base is told ``<s>`` by its tokenizer, the model puts it there itself."""
    model = MemlmForCausalLM.of(bases.attached(llama, {}, segment_len=32))
    ids = ids_of(model.model, 1, 6)
    begin = torch.tensor([model.model.begin])
    found = model.generate(ids, max_new_tokens=20, do_sample=False)
    expected = bases.loaded(llama).generate(torch.cat([begin, ids], dim=1), max_new_tokens=20, do_sample=False)
    assert len(begin[0]) == 1
    assert torch.equal(found[0], expected[0, 1:])


@pytest.mark.parametrize("kind", ["lmcode", "ltm"])
def test_the_tokenizer_is_that_of_the_model(kind: str, llama: Path, tmp_path: Path) -> None:
    model = made(kind, llama)
    checkpoint.export(model, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "a cat <pad> sat.\n\n  it"
    assert tokenizer(text).input_ids == model.tokenizer.encode(text)
    assert tokenizer.decode(model.tokenizer.encode("a cat sat.")) == "a cat sat."
    if kind == "ltm":
        written = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        assert written == "<|u|hi\n"
    write = pipeline("text-generation", str(tmp_path / "out"), max_new_tokens=5, do_sample=False)
    found = write("a cat sat")[0]["generated_text"]
    ids = torch.tensor([model.tokenizer.encode("a cat sat")])
    assert found == model.tokenizer.decode(model.generate(ids, 5, do_sample=False)[0])


def test_importing_memlm_tells_transformers_without_importing_it() -> None:
    code = """
import sys, memlm
assert not {"torch", "transformers"} & set(sys.modules)
from transformers import AutoConfig
config = AutoConfig.for_model("memlm", vocab_size=7)
assert type(config).__name__ == "MemlmConfig" and config.vocab_size == 7
from transformers import AutoModelForCausalLM, PreTrainedModel
assert AutoModelForCausalLM._model_mapping[type(config)].__name__ == "MemlmForCausalLM"
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# --- the base, the hub, errors ---------------------------------------------------------------------------------------


def test_a_base_goes_along_or_is_named_anew(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "base")
    model = made("ltm", tmp_path / "base")
    checkpoint.export(model, tmp_path / "out")
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "out").rename(tmp_path / "moved")
    ids = ids_of(model, 1, 20)
    with torch.no_grad():
        for settings in ({}, {"base": str(llama)}):
            found = AutoModelForCausalLM.from_pretrained(tmp_path / "moved", **settings)
            assert torch.equal(found(ids).logits, model(ids).logits)
    other = bases.make_base("llama", tmp_path, num_hidden_layers=2)
    with pytest.raises(ConfigError, match="they are of another base"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "moved", base=str(other))
    checkpoint.export(from_scratch(), tmp_path / "scratch")
    with pytest.raises(ConfigError, match="base is of models that stand on a pretrained one"):
        checkpoint.load(tmp_path / "scratch", base=str(llama))


def test_push_to_hub_uploads_the_export_with_its_card(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class Hub:
        def __init__(self, token: Any = None) -> None:
            calls.append(token)

        def create_repo(self, name: str, private: bool, exist_ok: bool) -> Any:
            calls.append((name, private))
            return types.SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, repo_id: str, folder_path: Any, **how: Any) -> str:
            shutil.copytree(folder_path, tmp_path / "hub")
            calls.append(repo_id)
            return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    model = made("ltm", llama)
    checkpoint.export(model, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("# what was measured")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.push_to_hub("mine", private=True, token="secret") == "https://hub/commit"
    assert calls == ["secret", ("mine", True), "me/mine"]
    assert (tmp_path / "hub" / "README.md").read_text() == "# what was measured"
    ids = ids_of(model, 1, 20)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "hub")(ids).logits, model(ids).logits)


def test_bad_input_is_refused_in_a_sentence(llama: Path, tmp_path: Path) -> None:
    model = MemlmForCausalLM.of(made("ltm", llama))
    ids = ids_of(model.model, 1, 4)
    with pytest.raises(ConfigError, match="the past must be what a call of this model gave, got a DynamicCache"):
        model(ids, past_key_values=transformers.DynamicCache())
    with pytest.raises(ConfigError, match="cannot be taken back from a memory"):
        model(ids).past_key_values.crop(1)
    with pytest.raises(ConfigError, match="would write a pickle"):
        model.save_pretrained(tmp_path / "out", safe_serialization=False)
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(ConfigError, match="takes no low_cpu_mem_usage; it takes base, trust, dtype"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", low_cpu_mem_usage=True)
    with pytest.raises(ConfigError, match=r"made of a model: MemlmForCausalLM.of"):
        AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(ConfigError, match="is an export of memlm, no base"):
        bases.attached(tmp_path / "out", {})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"version": "0.0.1"}))
    with pytest.raises(ConfigError, match=r"config\.json is not as it was exported"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_past_can_be_chosen_from(llama: Path) -> None:
    model = MemlmForCausalLM.of(made("ltm", llama))
    past: MemlmCache = model(ids_of(model.model, 2, 20)).past_key_values
    past.batch_repeat_interleave(2)
    assert past.batch_size == 4
    past.batch_select_indices(torch.tensor([3]))
    assert past.batch_size == 1
    assert not past.is_croppable
