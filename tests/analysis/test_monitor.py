"""The record of a memory, by hand and while it is trained."""

from types import SimpleNamespace

import lightning
import pytest
import torch

from memlm.analysis.monitor import MemoryMonitor
from tests.experiments.tiny import T, tiny
from tests.training import small

TOKENIZER = SimpleNamespace(pad_id=0, vocab_size=30)


def test_steps_by_hand(tmp_path, monkeypatch):
    model = tiny(TOKENIZER, "ltm", "stm").eval()
    monitor, state, share = MemoryMonitor(model), None, []
    ids = torch.randint(30, (2, 3 * T), generator=torch.Generator().manual_seed(0))
    for step in range(3):
        out = model(ids[:, step * T : (step + 1) * T], state=state)
        state = out.state
        numbers = monitor.record_step(10 * step, out)
        used = state.memory["ltm"][0].record >= 0
        share.append(int(used.sum()) / used.numel())
        assert numbers["memory/ltm/1/filled"] == pytest.approx(share[-1])
        assert numbers["memory/ltm/1/read_gate"] == pytest.approx(out.reads["ltm/1"].gate.mean().item())
    found = monitor.get_statistics()["memory/ltm/1/filled"]
    assert found == pytest.approx({"mean": sum(share) / 3, "min": share[0], "max": share[2], "last": share[2], "n": 3})
    assert share[0] < share[2]
    monkeypatch.setenv("HOME", str(tmp_path))
    figure = monitor.plot_history("~/new/history.png")
    assert (tmp_path / "new" / "history.png").stat().st_size > 1000
    (panel,) = (axes for axes in figure.axes if axes.get_title(loc="left") == "filled")
    lines = {line.get_label(): line.get_ydata() for line in panel.lines}
    assert list(lines["ltm/1"]) == pytest.approx(share)
    assert list(lines["stm/1"]) == [1, 1, 1]
    with pytest.raises(ValueError, match="step 20 comes after step 20"):
        monitor.record_step(20, out)
    for wrong in ("30", None, 30.5, True):
        with pytest.raises(ValueError, match="step must be a whole number of at least 0, got"):
            monitor.record_step(wrong, out)
    with pytest.raises(ValueError, match="outputs is a Tensor"):
        monitor.record_step(30, out.logits)


def test_nothing_recorded_and_no_model():
    assert MemoryMonitor().plot_history() is None
    assert MemoryMonitor().get_statistics() == {}
    with pytest.raises(ValueError, match=r"MemoryMonitor\(model\)"):
        MemoryMonitor().record_step(0, None)


def test_as_a_callback_it_keeps_what_training_logs(tmp_path, monkeypatch):
    monitor, make = MemoryMonitor(), lightning.Trainer.__init__

    def with_monitor(self, *args, callbacks=(), **kwargs):
        make(self, *args, callbacks=[*callbacks, monitor], **kwargs)

    monkeypatch.setattr(lightning.Trainer, "__init__", with_monitor)
    _, _, rows = small.fit(small.config(tmp_path, "run", "trainer.max_steps=4", memory="dual"))
    for name in ("memory/ltm/write_gate", "memory/ltm/1/read_mass", "memory/stm/1/read_gate"):
        logged = small.curve(rows, name)
        assert len(logged) == 4
        # the logger counts from 0, a monitor the steps that were made
        assert {row["step"] - 1: row[name] for row in monitor.history} == pytest.approx(logged)
    again = MemoryMonitor()
    again.load_state_dict(monitor.state_dict())
    assert again.history == monitor.history
