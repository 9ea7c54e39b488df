"""Generation: that it equals the parallel pass for each memory is law 3; here, what is beside that."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from memlm import laws
from memlm.models.decoding import Decoder
from memlm.models.lstm import LSTM
from memlm.models.mixer import MixerModel
from memlm.models.sampling import Sampling
from memlm.models.segments import SegmentModel

T = laws.T
PROMPTS = torch.randint(laws.N_VOCAB, (4, 9), generator=torch.Generator().manual_seed(3))


def model_of(*names: str, model_class: type[SegmentModel] | None = None, **settings: Any) -> SegmentModel:
    nodes = {key: node for name in names for key, node in laws.nodes_of(name).items()}
    return (laws.builder(nodes) if model_class is None else laws.builder(nodes, model_class=model_class))(**settings)


def ragged() -> Tensor:
    """Which tokens of `PROMPTS` there are: 9, 4, 1 and 6, at the left, at the right and in the middle."""
    mask = torch.ones_like(PROMPTS, dtype=torch.bool)
    mask[1, 4:] = mask[2, :-1] = mask[3, :2] = mask[3, 8:] = False
    return mask


def likeliest(model: SegmentModel, tokens: Tensor, n: int, **options: Any) -> Tensor:
    """The token after each of the last ``n``, by one parallel pass of each row alone, without its padding."""
    rows = []
    for row, text in enumerate(tokens):
        state = options.get("state")
        state = None if state is None else model.select_rows(state, torch.tensor([row]))
        given, new = text[:-n], text[-n:]
        whole = torch.cat([given[options["mask"][row]] if "mask" in options else given, new])
        rows.append(laws.logits(model, whole[None], state)[0, -n - 1 : -1].argmax(dim=-1))
    return torch.stack(rows)


MODELS = [
    pytest.param(("none",), {}, id="none"),
    pytest.param(("none",), {"position": "learned"}, id="learned"),
    pytest.param(("ltm",), {"memory_layers": "all"}, id="ltm"),
    pytest.param(("stm", "ltm"), {}, id="two"),
    pytest.param(("imm",), {"memory_layers": "all"}, id="imm"),
    pytest.param(("titans",), {}, id="titans"),
    pytest.param(("cache",), {"memory_layers": "all"}, id="cache"),
    pytest.param(("knn", "ltm"), {"memory_layers": "all"}, id="knn"),
    pytest.param(("infini",), {"position": "learned"}, id="infini"),
    pytest.param(("rmt",), {}, id="rmt"),
    pytest.param(("none",), {"model_class": LSTM}, id="lstm"),
    pytest.param(("ltm",), {"model_class": MixerModel}, id="mixer"),
]


@pytest.mark.parametrize(("names", "settings"), MODELS)
def test_rows_of_unlike_length_go_on_as_each_alone(names: tuple[str, ...], settings: dict[str, Any]) -> None:
    """Rows end their segments at different steps; some begin in a segment that is open already."""
    model = model_of(*(name for name in names if name != "none"), **settings)
    state = laws.filled(model, n_row=4, n_open=5)
    before = [part.clone() for _, part in laws.builders.named_tensors(state)]
    for given in ({"mask": ragged()}, {"mask": ragged(), "state": state}, {"state": state}):
        tokens = model.generate(PROMPTS, T + 4, temperature=0, **given)
        assert torch.equal(tokens[:, :9], PROMPTS)
        assert torch.equal(tokens[:, 9:], likeliest(model, tokens, T + 4, **given))
    after = [part for _, part in laws.builders.named_tensors(state)]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True)), "the state that was handed in changed"


def test_tokens_within_a_segment_are_computed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the whole model nor `prepare` is run for them."""
    model = model_of("ltm")
    [module], calls = model.memory["ltm"], []
    for of, name in ((type(model), "forward"), (type(module), "prepare")):
        real = getattr(of, name)
        monkeypatch.setattr(of, name, lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k))
    text = Decoder(model, model.init_state(2), read=True, write=True)
    calls.clear()
    for _ in range(T - 1):
        text.step(torch.tensor([1, 2]))
    assert calls == []
    text.step(torch.tensor([1, 2]))
    assert calls.count("forward") == 1


def test_the_state_after_steps_is_that_of_one_call() -> None:
    models = [model_of("ltm", model_class=of) for of in (None, LSTM, MixerModel)]
    for model in (*models, *map(model_of, ("cache", "knn", "infini", "pool"))):
        ids = laws.text(2, 2 * T + 5)
        with torch.no_grad():
            text = Decoder(model, model.init_state(2), read=True, write=True)
            hidden = torch.stack([text.step(ids[:, i]) for i in range(ids.shape[1])], dim=1)
            out, more = model(ids), laws.text(2, T, seed=8)
            laws.builders.close(hidden, out.hidden, "hidden states")
            again = [laws.builders.logits(model, more, state) for state in (text.state(), out.state)]
        laws.builders.close(*again, "what comes after")
        assert text.state().local.position.tolist() == out.state.local.position.tolist()


def test_a_bank_of_all_rows_is_written_in_their_order() -> None:
    model = laws.builder(laws.nodes_of("ltm"))(memory={"scope": "shared"})
    mask = ragged()
    with torch.no_grad():
        state = model(PROMPTS, mask=mask).state
        text, ids = Decoder(model, state, read=True, write=True), laws.text(4, 2 * T)
        for i in range(2 * T):
            text.step(ids[:, i])
            state = model(ids[:, i : i + 1], state=state).state
    laws.builders.same_memory(text.state(), state, "shared bank")


# --- what ends a text ------------------------------------------------------------------------------------------------


def test_rows_end_with_their_own_token_and_the_others_go_on() -> None:
    model = model_of("ltm")
    free = model.generate(PROMPTS, 30, temperature=0, mask=ragged())[:, 9:]
    eos = [int(free[0, 3]), int(free[2, 11])]
    tokens = model.generate(PROMPTS, 30, temperature=0, mask=ragged(), eos_token_id=eos, pad_token_id=7)[:, 9:]
    lengths = []
    for row, expected in zip(tokens.tolist(), free.tolist(), strict=True):
        n = next((i + 1 for i, token in enumerate(expected) if token in eos), 30)
        lengths.append(n)
        assert row == (expected[:n] + [7] * 30)[: tokens.shape[1]]
    assert tokens.shape[1] == max(lengths)
    assert min(lengths) < max(lengths)
    one = model.generate(PROMPTS[:1], 30, temperature=0, eos_token_id=eos[0])
    assert one.shape[1] == 9 + 1 + free[0].tolist().index(eos[0])


def test_strings_end_a_text_once_they_are_whole_in_what_is_new() -> None:
    model: Any = model_of("none")
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOP"
    model.tokenizer = SimpleNamespace(decode=lambda ids: "".join(letters[i] for i in ids), pad_id=5)
    free = model.generate(PROMPTS[:1], 20, temperature=0)[0, 9:].tolist()
    said = model.tokenizer.decode(free)
    stop = said[6:9]
    found = model.generate(PROMPTS[:1], 20, temperature=0, stop_strings=["never", stop])[0, 9:].tolist()
    assert model.tokenizer.decode(found) == said[: said.index(stop) + 3]
    prompt = model.tokenizer.decode(PROMPTS[0].tolist())
    assert len(model.generate(PROMPTS[:1], 5, temperature=0, stop_strings=prompt)[0]) == 14  # it was said before


# --- which token -----------------------------------------------------------------------------------------------------


def test_several_continuations_of_a_prompt_stand_side_by_side() -> None:
    model = model_of("ltm")
    torch.manual_seed(0)
    tokens = model.generate(PROMPTS, 8, temperature=3.0, top_k=None, top_p=None, num_return_sequences=3, mask=ragged())
    assert tokens.shape == (12, 17)
    assert torch.equal(tokens[:, :9], PROMPTS.repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in tokens[:, 9:].tolist()}) == 12
    torch.manual_seed(0)
    with torch.no_grad():
        start = model.select_rows(model(PROMPTS, mask=ragged()).state, torch.arange(4).repeat_interleave(3))
        again = model(tokens[:, 9:], state=start).logits
    assert again.shape == (12, 8, laws.N_VOCAB)
    taken = model.generate(PROMPTS, 8, temperature=3.0, top_k=1, num_return_sequences=3)
    assert torch.equal(taken, model.generate(PROMPTS, 8, do_sample=False).repeat_interleave(3, dim=0))


def test_a_penalty_is_that_of_hugging_face() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    model, n = model_of("none"), 12
    text, expected = PROMPTS, processors.RepetitionPenaltyLogitsProcessor(3.0)
    with torch.no_grad():
        for _ in range(n):
            text = torch.cat([text, expected(text, model(text).logits[:, -1]).argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(PROMPTS, n, do_sample=False, repetition_penalty=3.0), text)
    assert not torch.equal(model.generate(PROMPTS, n, do_sample=False), text)


def test_padding_is_not_penalised() -> None:
    model, mask = model_of("none"), ragged()
    alone = [model.generate(row[there][None], 6, do_sample=False, repetition_penalty=2.0)[0, -6:]
             for row, there in zip(PROMPTS, mask, strict=True)]  # fmt: skip
    together = model.generate(PROMPTS, 6, do_sample=False, repetition_penalty=2.0, mask=mask)[:, -6:]
    assert torch.equal(together, torch.stack(alone))


def test_tokens_come_one_after_the_other_and_may_be_stopped() -> None:
    model = model_of("ltm").train()
    expected = model.generate(PROMPTS, 5, temperature=0)[:, 9:]
    steps = model.stream(PROMPTS, Sampling(5, temperature=0))
    assert torch.equal(next(steps), expected[:, 0])
    assert not model.training
    assert torch.is_grad_enabled()
    assert torch.equal(next(steps), expected[:, 1])
    steps.close()
    assert model.training


def test_what_is_generated_can_be_trained_on() -> None:
    model = model_of("ltm")
    model(model.generate(PROMPTS, 5)).logits.sum().backward()


@pytest.mark.slow
def test_a_compiled_step_takes_the_same_tokens() -> None:
    model = model_of("ltm")
    for given in ({}, {"mask": ragged()}):
        expected = model.generate(PROMPTS, T + 4, temperature=0, **given)
        assert torch.equal(model.generate(PROMPTS, T + 4, temperature=0, compile=True, **given), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": 1}, "do_sample must be true or false, got 1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a positive number"),
        ({"num_return_sequences": 0}, "num_return_sequences must be a whole number of at least 1"),
        ({"num_return_sequences": 2, "do_sample": False}, "would be copies"),
        ({"num_return_sequences": 2, "temperature": 0}, "would be copies"),
        ({"eos_token_id": laws.N_VOCAB}, "eos_token_id must be below the size of the vocabulary, 40, got 40"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id must be a whole number"),
        ({"pad_token_id": -1}, "pad_token_id must be a whole number"),
        ({"stop_strings": ""}, "stop_strings must be texts that are not empty"),
        ({"stop_strings": "a"}, "stop_strings need a model with a tokenizer"),
        ({"mask": torch.ones(4, 8, dtype=torch.bool)}, "mask must have the shape of ids"),
        ({"mask": torch.zeros(4, 9, dtype=torch.bool)}, "a true place in each row"),
        ({"mask": torch.ones(4, 9)}, "mask must be bool"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of("none").generate(PROMPTS, 3, **settings)


def test_all_memories_in_a_layer_go_by_the_column() -> None:
    """But one that reads what its own segment wrote."""
    others = {
        name for name in laws.names() if not Decoder(model := model_of(name), model.init_state(1), True, True).by_column
    }
    assert others == {"armt", "beacon", "camelot", "gradmem", "hmt", "rmt"}
