from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from memlm.analysis.run_log import read_history
from memlm.checkpoint import checkpoints, read_plain
from memlm.config import ConfigError
from memlm.data.stream import Batch
from memlm.training.logged import history_files
from memlm.training.module import LanguageModeling
from memlm.training.replay import Read, Replay
from tests.training.small import FACTS, PLAIN, SHORT, config, curve, fit, fit_until_killed

pytestmark = pytest.mark.slow


def batch_of(rows: list[int], step: int = 0, n_token: int = 4, **more: Any) -> Batch:
    """Rows whose tokens say which they are."""
    ids = torch.tensor(rows)[:, None].expand(-1, n_token).clone()
    parts: dict[str, Any] = {"reset": None, "breaks": None, "mask": None, "fresh": True, "ends": True}
    return Batch(ids, ids + 1, torch.ones(ids.shape), torch.zeros_like(ids).bool(), step=step, **(parts | more))


def kept(replay: Replay) -> list[int]:
    return sorted(int(window.ids[0]) for window in replay.windows)


def test_a_reservoir_is_an_even_sample() -> None:
    counts: Counter[int] = Counter()
    for seed in range(300):
        replay = Replay("reservoir", capacity=10, seed=seed)
        for step in range(50):
            replay.offer(batch_of([2 * step, 2 * step + 1], step), torch.zeros(2), n_segment=1)
        assert len(replay) == 10
        counts.update(kept(replay))
    assert len(counts) == 100
    # each of 100 is kept with probability 1/10: 30 times of 300, standard deviation 5.2
    assert min(counts.values()) > 30 - 4.5 * 5.2
    assert max(counts.values()) < 30 + 4.5 * 5.2
    thirds = [sum(counts[i] for i in range(first, first + 33)) for first in (0, 33, 66)]
    assert all(abs(third - 990) < 4 * 30 for third in thirds)  # neither early nor late ones are favoured


def test_surprise_keeps_what_was_predicted_worst_when_last_seen() -> None:
    replay = Replay("surprise", capacity=3)
    replay.offer(batch_of([1, 2, 3, 4]), torch.tensor([0.5, 4.0, 1.0, 2.0]), n_segment=1)
    assert kept(replay) == [2, 3, 4]
    place = next(i for i, window in enumerate(replay.windows) if window.ids[0] == 2)
    replay.update([place], torch.tensor([0.1]))  # learned since
    replay.offer(batch_of([5], 1), torch.tensor([0.7]), n_segment=1)
    assert kept(replay) == [3, 4, 5]


def test_surprise_draws_in_proportion_to_loss() -> None:
    replay = Replay("surprise", ratio=1.0, capacity=2)
    replay.offer(batch_of([1, 2]), torch.tensor([1.0, 3.0]), n_segment=1)
    drawn = Counter(int(replay.draw(batch_of([9], step))[0].ids[0, 0]) for step in range(400))  # type: ignore[index]
    assert drawn[2] / 400 == pytest.approx(0.75, abs=0.09)


def text_of(rows: list[list[int]], step: int = 0) -> Batch:
    ids = torch.tensor(rows)
    return batch_of([0] * len(rows), step)._replace(
        ids=ids, targets=ids + 1, weight=torch.ones(ids.shape), answer=torch.zeros(ids.shape, dtype=torch.bool)
    )


def test_the_windows_are_drawn_whose_text_was_read_most() -> None:
    replay = Replay("retrieved", ratio=1.0, capacity=10)
    windows = [[1, 2, 3, 4, 5, 6], [9, 1, 2, 3, 9, 9], [7, 7, 7, 1, 2, 3], [3, 2, 1, 3, 2, 1], [1, 2, 3, 1, 2, 3]]
    replay.offer(text_of(windows), torch.zeros(5), n_segment=1)

    def drawn(n_row: int, *reads: tuple[list[int], float]) -> list[int] | None:
        tokens, weights = zip(*reads, strict=True) if reads else ([[0, 0, 0]], [1.0])
        read = Read(torch.tensor(tokens, dtype=torch.int32), torch.tensor(weights))
        found = replay.draw(text_of([[8] * 6] * n_row, 1), reads=[read])
        return None if found is None else found[1]

    assert drawn(1, ([1, 2, 3], 0.5), ([9, 1, 2], 0.1)) == [1]  # 0.6; the others 0.5, or nothing
    assert drawn(3, ([1, 2, 3], 0.5), ([9, 1, 2], 0.1)) == [1, 0, 2]
    # of four that hold the text, the last one twice but counted once; the window that holds nothing is not drawn
    assert drawn(5, ([1, 2, 3], 0.5)) == [0, 1, 2, 4]
    assert drawn(5, ([1, 2, 3], 0.5), ([1, 2, 3], 0.5), ([2, 1, 3], 1.1)) == [3, 0, 1, 2, 4]  # equal slots add up
    assert drawn(5, ([-1, 1, 2], 9.0)) is None  # fewer tokens, from the start of a context
    assert drawn(5, ([3, 4, 6], 9.0)) is None
    assert drawn(5) is None
    assert replay.draw(text_of([[8] * 6]), reads=[]) is None


def test_the_same_window_is_kept_once() -> None:
    replay = Replay(capacity=10)
    for step in range(5):
        replay.offer(batch_of([7, 7, step % 2], step), torch.full((3,), float(step)), n_segment=1)
    assert kept(replay) == [0, 1, 7]
    assert dict(zip([int(w.ids[0]) for w in replay.windows], replay.losses, strict=True)) == {7: 4.0, 0: 4.0, 1: 3.0}


def test_as_many_rows_as_the_ratio_says_and_as_long_as_the_batch() -> None:
    replay = Replay(ratio=0.3, capacity=100)
    assert replay.draw(batch_of([1])) is None
    replay.offer(batch_of(list(range(20))), torch.zeros(20), n_segment=2)
    replay.offer(batch_of(list(range(20, 40)), n_token=8), torch.zeros(20), n_segment=2)
    sizes = []
    for step in range(300):
        drawn = replay.draw(batch_of([50, 51], step))
        sizes.append(0 if drawn is None else len(drawn[0].ids))
        if drawn is not None:
            assert drawn[0].ids.shape[1] == 4
            assert drawn[0].ids.max() < 20
            assert torch.equal(drawn[0].targets, drawn[0].ids + 1)
    assert set(sizes) == {0, 1}
    assert sum(sizes) / 300 == pytest.approx(0.6, abs=0.12)


def test_what_is_worth_to_be_remembered_is_said_again() -> None:
    replay = Replay(ratio=1.0)
    told = torch.tensor([[False, True, False, True], [True, False, False, False]])
    batch = batch_of([1, 2], told=told)
    replay.offer(batch, torch.zeros(2), n_segment=1)
    drawn, _ = replay.draw(batch)  # type: ignore[misc]
    assert drawn.told is not None
    assert {int(ids[0]): said.tolist() for ids, said in zip(drawn.ids, drawn.told, strict=True)} == {
        1: told[0].tolist(),
        2: told[1].tolist(),
    }
    plain = Replay(ratio=1.0)
    plain.offer(batch_of([1, 2]), torch.zeros(2), n_segment=1)
    assert plain.draw(batch_of([1, 2]))[0].told is None  # type: ignore[index]


def test_later_windows_of_a_document_are_not_kept() -> None:
    replay = Replay()
    breaks = torch.tensor([[True, False]])
    replay.offer(batch_of([1], breaks=breaks, fresh=False), torch.zeros(1), n_segment=2)
    assert len(replay) == 0
    replay.offer(batch_of([1], breaks=breaks), torch.zeros(1), n_segment=2)
    assert torch.equal(replay.draw(batch_of([2, 2, 2, 2, 2]))[0].breaks, breaks)  # type: ignore[index, arg-type]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"policy": "newest"}, "replay.policy must be one of reservoir, surprise, retrieved, got 'newest'"),
        ({"ratio": 0.0}, r"replay.ratio must be in \(0, 1\], got 0.0; for none use replay=none"),
        ({"ratio": float("nan")}, "replay.ratio"),
        ({"capacity": 0}, "replay.capacity must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Replay(**settings)


def test_each_process_has_its_own_buffer_again() -> None:
    parts = []
    for rank in range(2):
        replay = Replay(capacity=3)
        for step in range(4):
            replay.offer(batch_of([10 * rank + 2 * step, 10 * rank + 2 * step + 1], step), torch.rand(2), 1, rank)
        parts.append(replay.state_dict())
    for rank in range(2):
        again = Replay(capacity=3)
        again.take_up(parts, rank, 2)
        assert again.state_dict() == parts[rank]  # in the same places, which later steps draw from


def _seen(rows: list[int], losses: list[float], **settings: Any) -> dict[str, Any]:
    replay = Replay(**settings)
    for step, (row, loss) in enumerate(zip(rows, losses, strict=True)):
        replay.offer(batch_of([row], step), torch.tensor([loss]), n_segment=1)
    return replay.state_dict()


def test_a_buffer_is_dealt_out_to_more_processes_and_joined_again() -> None:
    whole = _seen([1, 2, 3, 4, 5], [1.0, 2.0, 3.0, 4.0, 5.0], capacity=10)
    shares = [Replay(capacity=10) for _ in range(2)]
    for rank, share in enumerate(shares):
        share.take_up([whole], rank, 2)
    assert [len(share) for share in shares] == [share.n_seen for share in shares] == [3, 2]
    other = Replay(capacity=10)
    other.take_up([share.state_dict() for share in shares], 0, 1)
    assert (kept(other), other.n_seen) == ([1, 2, 3, 4, 5], 5)
    assert {int(w.ids[0]): loss for w, loss in zip(other.windows, other.losses, strict=True)} == {
        i: float(i) for i in range(1, 6)
    }


def test_what_two_processes_both_kept_is_kept_once() -> None:
    parts = [_seen([1, 2], [1.0, 2.0], capacity=2), _seen([2, 3], [4.0, 3.0], capacity=2)]
    replay = Replay("surprise", capacity=3)
    replay.take_up(parts, 0, 1)
    assert kept(replay) == [1, 2, 3]
    for step in range(9, 30):  # what replaces them finds each in its place
        replay.offer(batch_of([step], step), torch.tensor([float(step)]), n_segment=1)
    assert kept(replay) == [27, 28, 29]


def test_of_more_than_fit_the_worst_predicted_or_an_even_sample_stay() -> None:
    parts = [_seen([1, 2, 3], [9.0, 1.0, 8.0], capacity=3), _seen([4, 5, 6], [2.0, 7.0, 3.0], capacity=3)]
    replay = Replay("surprise", capacity=3)
    replay.take_up(parts, 0, 1)
    assert kept(replay) == [1, 3, 5]
    counts: Counter[int] = Counter()
    for seed in range(400):
        parts = [_seen(list(range(n, n + 8)), [0.0] * 8, capacity=4, seed=2 * seed + n // 8) for n in (0, 8)]
        replay = Replay(capacity=4, seed=seed)
        replay.take_up(parts, 0, 1)
        assert len(replay) == 4
        counts.update(kept(replay))
    # each of 16 is kept with probability 1/4: 100 times of 400, standard deviation 8.7
    assert len(counts) == 16
    assert min(counts.values()) > 100 - 4 * 8.7
    assert max(counts.values()) < 100 + 4 * 8.7


# --- in training -----------------------------------------------------------------------------------------------------

STILL = ["training.lr=1e-12", "model.dropout=0", "replay.ratio=1.0", "trainer.max_steps=6"]


@pytest.mark.parametrize("scope", ["sequence", "shared"])
@pytest.mark.parametrize("phase", [SHORT, PLAIN])
def test_replayed_rows_are_trained_and_leave_no_trace_in_memory(
    scope: str, phase: dict[str, Any], tmp_path: Path
) -> None:
    states: dict[str, list[Any]] = {"none": [], "reservoir": []}
    totals: list[tuple[float, float]] = []
    for name, seen in states.items():

        def look(module: LanguageModeling, batch: Batch, seen: list[Any] = seen) -> None:
            bank = getattr(module.model.memory["ltm"][0].bank, "key", torch.zeros(()))
            seen.append((module.carried.state, bank.clone()))
            if module.replay is not None and len(module.replay):
                totals.append(_naive(module, batch))

        settings = config(tmp_path, name, *(s for s in STILL if name != "none" or "replay" not in s),
                          f"memory.ltm.scope={scope}", phases=[phase], replay=name)  # fmt: skip
        _, module, rows = fit(settings, before_step=look)
        if name == "none":
            expected = curve(rows)
        else:
            # what is logged, what is carried on and what is in the bank are as without replay
            assert curve(rows) == pytest.approx(expected, rel=1e-5)
            assert module.replay is not None
            assert len(module.replay) > 2
            assert any(row.get("train/replay_nll") for row in rows)
    for (state, bank), (replayed, other) in zip(*states.values(), strict=True):
        assert torch.equal(bank, other)
        assert (state is None) == (replayed is None)
        if state is not None:
            torch.testing.assert_close(state.memory["ltm"], replayed.memory["ltm"])
    assert len(totals) >= 4
    assert all(loss == pytest.approx(naive, rel=1e-4) for loss, naive in totals)


def _naive(module: LanguageModeling, batch: Batch) -> tuple[float, float]:
    """The loss of a step, and the mean over the weights of its rows and of those replayed, each row by itself."""
    before = module.carried.state, module.replay.state_dict()  # type: ignore[union-attr]
    banks = {name: buffer.clone() for name, buffer in module.model.named_buffers()}
    drawn = module.replay.draw(batch)  # type: ignore[union-attr]
    assert drawn is not None
    model, total, weights, extra = module.model, 0.0, 0.0, 0.0
    with torch.no_grad():
        for part, state in ((batch, None if batch.fresh else module.carried.state), (drawn[0], None)):
            if state is not None:
                state = module.banks.put_in(state)
            out = model(part.ids, state=state, reset=part.reset, breaks=part.breaks, mask=part.mask)
            weight = part.weight * torch.where(part.answer, module.settings.answer_weight, 1.0)
            nll = F.cross_entropy(out.logits.flatten(0, 1), part.targets.flatten(), reduction="none")
            total += float((nll * weight.flatten()).sum())
            weights += float(weight.sum())
            extra += sum(float(value) for value in model.memory["ltm"][0].losses(out.trace["ltm"], nll).values())
        loss = float(module._loss(batch))
    module.carried.state = before[0]
    module.replay.load_state_dict(before[1])  # type: ignore[union-attr]
    for name, buffer in model.named_buffers():
        buffer.copy_(banks[name])
    return loss - extra, total / weights


def naive_reads(module: LanguageModeling, state: Any, batch: Batch) -> dict[tuple[int, ...], float]:
    """Read weight by the tokens of a slot, of slots that were there before the batch and not written since."""
    model = module.model
    with torch.no_grad():
        out = model(batch.ids, state=state, reset=batch.reset, breaks=batch.breaks, mask=batch.mask)
    found: dict[tuple[int, ...], float] = {}
    read = out.reads["ltm/1"]
    old, new = state.memory["ltm"][0], out.state.memory["ltm"][0]
    for row in range(len(batch.ids)):
        bank = min(row, len(old.tokens) - 1)
        for slots, weights in zip(read.slots[row].tolist(), read.weights[row].tolist(), strict=True):
            for slot, weight in zip(slots, weights, strict=True):
                tokens = tuple(old.tokens[bank, slot].tolist())
                if slot >= 0 and old.record[bank, slot] >= 0 and tokens == tuple(new.tokens[bank, slot].tolist()):
                    found[tokens] = found.get(tokens, 0.0) + weight
    return found


@pytest.mark.parametrize(("scope", "phase"), [("shared", SHORT), ("sequence", PLAIN)])
def test_the_memory_says_what_is_replayed(scope: str, phase: dict[str, Any], tmp_path: Path) -> None:
    expected: dict[int, list[bytes]] = {}
    seen: dict[int, list[bytes]] = {}
    banks: list[Any] = []

    def look(module: LanguageModeling, batch: Batch) -> None:
        replay, model = module.replay, module.model
        assert replay is not None
        state = None if batch.fresh else module.carried.state
        state = model.init_state(len(batch.ids)) if state is None else module.banks.put_in(state)
        banks.append(state.memory["ltm"][0])
        read, n = naive_reads(module, state, batch), len(state.memory["ltm"][0].tokens[0, 0])
        score = []
        for window in replay.windows:
            ids = window.ids.tolist()
            held = {tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)}
            score.append(sum(read.get(tokens, 0.0) for tokens in held))
        order = sorted(range(len(score)), key=lambda i: -score[i])[: len(batch.ids)]
        expected[batch.step] = [replay.windows[i].ids.numpy().tobytes() for i in order if score[i] > 0]

    class Noted(Replay):
        def draw(self, batch: Batch, *arguments: Any) -> Any:
            drawn = super().draw(batch, *arguments)
            seen[batch.step] = [] if drawn is None else [ids.numpy().tobytes() for ids in drawn[0].ids]
            return drawn

    settings = ["model.dropout=0", f"memory.ltm.scope={scope}", "trainer.max_steps=7"]
    replay = Noted("retrieved", ratio=1.0)
    fit(config(tmp_path, "a", *settings, phases=[phase], replay="retrieved"), before_step=look, replay=replay)
    assert seen == expected
    drawn = [names for names in seen.values() if names]
    assert len(drawn) >= 4
    assert len({tuple(names) for names in drawn}) > 1
    assert not torch.equal(banks[1].tokens, banks[-1].tokens)


def test_a_memory_that_does_not_say_its_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no memory of this model \(stm\) says which text its slots hold: choose one that does"
    ):
        fit(config(tmp_path, "a", memory="stm", replay="retrieved"))


@pytest.mark.parametrize("policy", ["reservoir", "surprise", "retrieved"])
def test_a_killed_run_goes_on_bit_for_bit(policy: str, tmp_path: Path) -> None:
    more = ["replay.capacity=5", "replay.ratio=0.5"]
    if policy == "retrieved":  # of what every document before it left
        more += ["memory.ltm.scope=shared"]
    whole = curve(
        fit(
            config(
                tmp_path,
                "whole",
                *more,
                phases=[
                    FACTS,
                ],
                replay=policy,
            )
        )[2]
    )
    fit_until_killed(config(tmp_path, "killed", *more, phases=[FACTS], replay=policy), step=7)
    fit(config(tmp_path, "on", *more, f"resume={tmp_path / 'killed'}", phases=[FACTS], replay=policy))
    found = curve([row for file in history_files(tmp_path / "on") for row in read_history(file)])
    assert found == whole
    without = curve(fit(config(tmp_path, "without", *more[2:], phases=[FACTS]))[2])
    assert without != whole


@pytest.mark.parametrize("policy", ["reservoir", "retrieved"])
def test_two_processes_have_a_buffer_each(policy: str, tmp_path: Path) -> None:
    bank = "memory.ltm.scope=shared"
    ranks = ["trainer.devices=2", "trainer.strategy=ddp_fork", "replay.ratio=1.0", bank]
    fit(config(tmp_path, "two", *ranks, "trainer.max_steps=4", phases=[SHORT], replay=policy))
    parts = read_plain(checkpoints(tmp_path / "two")[-1])["replay"]
    assert [(part["n_seen"], len(part["windows"])) for part in parts] == [(4, 4), (4, 4)]
    assert len({window["ids"].numpy().tobytes() for part in parts for window in part["windows"]}) == 8
    _, module, _ = fit(config(tmp_path, "on", f"resume={tmp_path / 'two'}", "replay.ratio=1.0", bank, phases=[SHORT],
                              replay=policy))  # fmt: skip
    assert module.replay is not None
    assert len(module.replay) == 8 + 2 * 5  # four steps of two processes, then five of one
