import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

import memlm
from memlm.assemble import build_data, build_model, build_tokenizer
from memlm.checkpoint import checkpoints, read
from memlm.config import ConfigError
from memlm.memory import state as states
from memlm.memory.ltm import LongTermMemory
from memlm.training import fit as fit_module
from memlm.training import loss
from memlm.training.finite import NonFiniteLoss
from memlm.training.memory_settings import memory_settings
from memlm.training.module import LanguageModeling
from memlm.training.optimizer import decay_groups
from memlm.training.settings import Training
from tests.training.small import FACTS, PLAIN, SHORT, config, curve, fit


def batches_of(settings: dict[str, Any], n: int) -> tuple[torch.nn.Module, list[Any]]:
    tokenizer = build_tokenizer(settings)
    data = build_data(settings, tokenizer)
    data.n_step = n
    return build_model(settings, tokenizer), list(data.train_dataloader())


def plain_loss(model: Any, batch: Any, state: Any = None) -> tuple[Tensor, Any]:
    """The loss by its definition."""
    out = model(batch.ids, state=state, reset=batch.reset, mask=batch.mask, breaks=batch.breaks)
    nll = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    weight = batch.weight * torch.where(batch.answer, 5.0, 1.0)
    weighted = nll.view_as(weight) * weight
    loss, by_row = weighted.sum() / weight.sum(), weighted.sum(dim=1).detach() / weight.sum(dim=1)
    own = [v for name, mods in model.memory.items() for v in mods[0].losses(out.trace[name], by_row).values()]
    return loss + sum(own), out.state


def grads(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Recorder(lightning.Callback):
    """Gradients as the optimizer gets them, and learning rates."""

    def __init__(self) -> None:
        self.grads: list[dict[str, Tensor]] = []
        self.clipped: list[dict[str, Tensor]] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.grads.append(grads(module.model))
        self.rates.append(optimizer.param_groups[0]["lr"])
        assert {group["lr"] for group in optimizer.param_groups} == {self.rates[-1]}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.clipped.append(grads(module.model))


def fit_plainly(settings: dict[str, Any], training: Training | None = None, **trainer: Any) -> tuple[Any, Recorder]:
    """A plain Trainer, without anything of memlm.training.fit."""
    tokenizer = build_tokenizer(settings)
    recorder = Recorder()
    module = LanguageModeling(build_model(settings, tokenizer), training)
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "callbacks": [recorder]}
    quiet |= dict.fromkeys(["enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    lightning.Trainer(**quiet | trainer).fit(module, build_data(settings, tokenizer))
    return module, recorder


def test_gradients_are_those_of_the_definition_and_stop_between_windows(tmp_path: Path) -> None:
    settings = config(tmp_path, "a", "model.dropout=0", phases=[FACTS])
    model, batches = batches_of(settings, 2)
    assert not batches[1].fresh
    plain_loss(model, batches[0])[0].backward()
    first = grads(model)
    model.zero_grad()
    # the second window goes on from the first, without gradients across
    state = states.detach(plain_loss(model, batches[0])[1])
    plain_loss(model, batches[1], state)[0].backward()
    second = grads(model)
    model.zero_grad()
    plain_loss(model, batches[1], plain_loss(model, batches[0])[1])[0].backward()
    across = grads(model)
    _, recorder = fit_plainly(settings, Training(lr=1e-30), max_steps=2)
    for name in first:
        torch.testing.assert_close(recorder.grads[0][name], first[name], rtol=2e-4, atol=1e-6, msg=name)
        torch.testing.assert_close(recorder.grads[1][name], second[name], rtol=2e-4, atol=1e-6, msg=name)
    key = "memory.ltm.0.to_value.weight"
    assert (recorder.grads[1][key] - across[key]).abs().max() > 1e-5  # else the test could not tell
    # inside a window they do flow: what segment 0 wrote is read in segment 1, in a document of its own here
    assert second[key].abs().max() > 0


def test_a_carried_state_matters(tmp_path: Path) -> None:
    settings = config(tmp_path, "a", "model.dropout=0", phases=[FACTS])
    model, batches = batches_of(settings, 2)
    _, recorder = fit_plainly(settings, Training(lr=1e-30), max_steps=2)
    plain_loss(model, batches[1])[0].backward()
    assert any((recorder.grads[1][name] - grad).abs().max() > 1e-4 for name, grad in grads(model).items())


def test_accumulation_averages_batches(tmp_path: Path) -> None:
    settings = config(tmp_path, "a", "model.dropout=0", phases=[PLAIN])
    model, batches = batches_of(settings, 2)
    state = None
    for batch in batches:
        loss, state = plain_loss(model, batch, None if state is None else states.detach(state))
        (loss / 2).backward()
    _, recorder = fit_plainly(settings, Training(lr=1e-30), max_steps=1, accumulate_grad_batches=2)
    assert len(recorder.grads) == 1
    for name, grad in grads(model).items():
        torch.testing.assert_close(recorder.grads[0][name], grad, rtol=2e-4, atol=1e-6, msg=name)


def test_clipping_bounds_the_whole_gradient(tmp_path: Path) -> None:
    settings = config(tmp_path, "a", phases=[SHORT])
    norms = {}
    for bound in (None, 0.01):
        _, recorder = fit_plainly(settings, max_steps=1, gradient_clip_val=bound)
        norms[bound] = torch.cat([g.flatten() for g in recorder.clipped[0].values()]).norm().item()
    assert norms[None] > 0.05
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3)


def test_warm_up_and_cosine(tmp_path: Path) -> None:
    settings = config(tmp_path, "a", phases=[SHORT])
    training = Training(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    model = build_model(settings, build_tokenizer(settings))
    module = LanguageModeling(model, training, total_steps=12)
    found = module.configure_optimizers()
    rates = []
    for _ in range(14):
        rates.append(found["optimizer"].param_groups[0]["lr"])
        found["optimizer"].step()
        found["lr_scheduler"]["scheduler"].step()
    by_hand = [0.25, 0.5, 0.75, 1.0]
    by_hand += [0.1 + 0.9 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert rates[:12] == pytest.approx(by_hand)
    assert rates[8] == pytest.approx(0.55)  # half-way down
    assert rates[12:] == pytest.approx([0.1, 0.1])
    # the trainer steps it once per optimizer step
    _, recorder = fit_plainly(settings, Training(lr=1e-9, warmup_steps=2, min_lr_ratio=0), max_steps=3,
                              accumulate_grad_batches=2)  # fmt: skip
    assert recorder.rates == pytest.approx([0.5e-9, 1e-9, 1e-9])
    no_warm_up = LanguageModeling(model, Training(lr=1.0, warmup_steps=0), total_steps=5).configure_optimizers()
    assert no_warm_up["optimizer"].param_groups[0]["lr"] == 1.0
    with pytest.raises(ValueError, match="max_steps"):
        fit_plainly(settings, max_epochs=1)


def test_only_matrices_are_decayed(tmp_path: Path) -> None:
    settings = config(tmp_path, "a", memory="dual")
    model = build_model(settings, build_tokenizer(settings))
    decayed, plain = decay_groups(model, 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, rest = ({names[id(p)] for p in group["params"]} for group in (decayed, plain))
    assert matrices | rest == set(names.values())
    assert not matrices & rest
    assert "embedding.weight" in rest
    assert "memory.ltm.0.log_temperature" in rest
    assert "norm.weight" in rest
    assert "layers.0.attention.to_qkv.weight" in matrices
    assert "memory.ltm.0.to_key.weight" in matrices


@pytest.mark.parametrize(
    ("key", "value"),
    {
        "lr": 0,
        "betas": [0.9, 1.0],
        "weight_decay": -1,
        "warmup_steps": -1,
        "answer_weight": -1,
        "min_lr_ratio": 2,
    }.items(),
)
def test_impossible_settings_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"training.{key} must"):
        Training(**{key: value})


def test_gradient_checkpointing_and_workers_change_nothing(tmp_path: Path) -> None:
    whole = curve(fit(config(tmp_path, "a", "trainer.max_steps=4"))[2])
    again = curve(fit(config(tmp_path, "b", "trainer.max_steps=4", "model.gradient_checkpointing=true"))[2])
    assert again == whole
    assert curve(fit(config(tmp_path, "c", "trainer.max_steps=4", "seed=1"))[2]) != whole


def test_bf16_on_the_cpu(tmp_path: Path) -> None:
    whole = curve(fit(config(tmp_path, "a", "trainer.max_steps=4"))[2])
    rough = curve(fit(config(tmp_path, "b", "trainer.max_steps=4", "trainer.precision=bf16-mixed"))[2])
    assert rough != whole
    assert list(rough.values()) == pytest.approx(list(whole.values()), abs=0.1)


def test_validation_and_watching_leave_training_alone(tmp_path: Path) -> None:
    def watch(model: Any) -> dict[str, float]:
        torch.rand(3)
        return {"recall/on": 0.5}

    _, module, rows = fit(config(tmp_path, "a", "trainer.log_every_n_steps=5"), watch)
    _, _, alone = fit(config(tmp_path, "b", "trainer.log_every_n_steps=5", "trainer.limit_val_batches=0"))
    assert curve(rows) == curve(alone)
    assert sorted(curve(rows, "recall/on")) == [3, 7]  # also at steps that are not logged
    assert sorted(curve(rows, "val/nll")) == [3, 7]
    assert curve(alone, "val/nll") == {}
    assert module._val_state is None


def test_details_are_those_of_the_step_they_are_logged_with(tmp_path: Path) -> None:
    _, _, rows = fit(config(tmp_path, "a", "trainer.log_every_n_steps=3", memory="none", phases=[PLAIN]))
    assert curve(rows, "train/nll_text") == pytest.approx(curve(rows), rel=1e-5)
    assert sorted(curve(rows)) == [2, 5, 8]


# --- memory settings of the curriculum -------------------------------------------------------------------------------


def test_the_curriculum_sets_memories_during_steps_only(tmp_path: Path) -> None:
    settings = {"ltm.write_budget": 3, "ltm.gate_penalty": [0.0, 0.3], "ltm.temperature_scale": 2.0, "stm.x": 1}
    phases = [PLAIN | {"steps": 4, "memory": settings}, SHORT]
    seen = []

    def look(module: Any, inputs: Any, output: Any) -> None:
        seen.append((module.write_budget, round(module.gate_penalty, 6), module.temperature_scale.item()))

    cfg = config(tmp_path, "a", "trainer.max_steps=6", "trainer.val_check_interval=100", phases=phases)

    def before_step(module: LanguageModeling, batch: Any) -> None:
        ltm = module.model.memory["ltm"][0]
        if batch.step == 0:
            # called by the model in every segment
            ltm.norm.register_forward_hook(lambda *args: look(ltm, *args[1:]))
        seen.append(batch.step)

    _, module, _ = fit(cfg, before_step=before_step)
    by_step = {step: seen[seen.index(step) + 1] for step in range(6)}
    assert by_step == {0: (3, 0.0, 2.0), 1: (3, 0.1, 2.0), 2: (3, 0.2, 2.0), 3: (3, 0.3, 2.0),
                       4: (6, 0.03, 2.0), 5: (6, 0.03, 2.0)}  # fmt: skip
    loaded = memlm.load(tmp_path / "a")
    for model in (module.model, loaded):
        ltm = model.memory["ltm"][0]
        assert (ltm.write_budget, ltm.gate_penalty, ltm.temperature_scale.item()) == (6, 0.03, 2.0)


def test_an_unknown_memory_setting_is_told_before_the_first_step(tmp_path: Path) -> None:
    phases = [SHORT, SHORT | {"memory": {"ltm.write_budgte": 3}}]
    with pytest.raises(ConfigError, match=r"'write_budgte' of a LongTermMemory.*Did you mean 'write_budget'"):
        fit(config(tmp_path, "a", phases=phases), before_step=lambda *_: pytest.fail("a step was made"))


@pytest.mark.parametrize("value", [0, [3, 0], 2.5])
def test_a_memory_setting_out_of_range_is_told_before_the_first_step(value: Any, tmp_path: Path) -> None:
    phases = [SHORT, SHORT | {"memory": {"ltm.write_budget": value}}]
    with pytest.raises(ConfigError, match=r"curriculum\.phases\[1\]\.memory\.ltm.* write_budget|write_budget must be"):
        fit(config(tmp_path, "a", phases=phases), before_step=lambda *_: pytest.fail("a step was made"))


def test_what_a_later_phase_cannot_do_is_told_before_the_first_step(tmp_path: Path) -> None:
    phases = [SHORT | {"steps": 2}, SHORT | {"task": {"items": 2, "kinds": {"naturl": 1.0}}}]
    with pytest.raises(ConfigError, match="no facts of kind 'naturl'"):
        fit(config(tmp_path, "a", phases=phases), before_step=lambda *_: pytest.fail("a step was made"))


def test_memory_settings_are_put_back_after_an_error(tmp_path: Path) -> None:
    settings = config(tmp_path, "a")
    model = build_model(settings, build_tokenizer(settings))
    with pytest.raises(RuntimeError, match="x"), memory_settings(model, {"ltm.top_k": 1}):  # noqa: PT012
        assert model.memory["ltm"][0].top_k == 1  # type: ignore[index, union-attr]
        raise RuntimeError("x")
    assert model.memory["ltm"][0].top_k == 4  # type: ignore[index, union-attr]


# --- one bank for all ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [FACTS, *(pytest.param(p, marks=pytest.mark.slow) for p in (SHORT, PLAIN))])
def test_training_steps_write_the_shared_bank(phase: dict[str, Any], tmp_path: Path) -> None:
    banks, states_seen = [], []

    def before_step(module: LanguageModeling, batch: Any) -> None:
        bank = module.model.memory["ltm"][0]
        banks.append((bank.bank.n_record.item(), bank.bank.key.clone()))
        states_seen.append(module.carried.state)

    cfg = config(tmp_path, "a", "memory.ltm.scope=shared", "trainer.max_steps=5", phases=[phase])
    _, module, _rows = fit(cfg, before_step=before_step)
    written = [n for n, _ in banks]
    assert written[0] == 0
    steps = [b - a for a, b in itertools.pairwise(written)]
    assert min(steps) >= (1 if phase is PLAIN else 4)  # two rows of two segments each; plain text also has ends
    # nothing of the bank is carried beside the bank
    assert all(state is None or state.memory["ltm"] == () for state in states_seen)
    before = module.model.memory["ltm"][0].bank.key.clone()
    lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(
        module, build_data(cfg, module.model.tokenizer), verbose=False
    )
    assert torch.equal(before, module.model.memory["ltm"][0].bank.key)
    # the bank comes back with the model, and a resumed run is the same run
    assert torch.equal(memlm.load(tmp_path / "a").memory["ltm"][0].bank.key, before)
    fit(
        config(
            tmp_path, "b", "memory.ltm.scope=shared", "trainer.max_steps=3", "training.min_lr_ratio=1", phases=[phase]
        )
    )
    _, _, on = fit(config(tmp_path, "c", "memory.ltm.scope=shared", "trainer.max_steps=5", "training.min_lr_ratio=1",
                          f"resume={tmp_path / 'b'}", phases=[phase]))  # fmt: skip
    _, _, whole = fit(config(tmp_path, "d", "memory.ltm.scope=shared", "trainer.max_steps=5", "training.min_lr_ratio=1",
                             phases=[phase]))  # fmt: skip
    assert curve(on) == curve(whole)


def test_what_is_written_to_the_bank_between_steps_is_read(tmp_path: Path) -> None:
    written = []

    def forget(module: LanguageModeling, batch: Any) -> None:
        bank = module.model.memory["ltm"][0]
        if batch.step == 2:  # in the middle of a document
            bank.bank.commit(bank.init_state(1))
        written.append(bank.bank.n_record.item())

    phases = [FACTS]
    _, _, rows = fit(
        config(tmp_path, "a", "memory.ltm.scope=shared", "trainer.max_steps=4", phases=phases), before_step=forget
    )
    assert written[1] > 0
    assert written[2] == 0
    assert written[3] < 2 * written[1]  # what step 2 wrote, and no more
    _, _, kept = fit(config(tmp_path, "b", "memory.ltm.scope=shared", "trainer.max_steps=4", phases=phases))
    assert curve(rows)[1] == curve(kept)[1]
    assert curve(rows)[2] != curve(kept)[2]


# --- numbers that are not finite -------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    def spoil(module: LanguageModeling, batch: Any) -> None:
        if batch.step == 5:
            module.model.norm.weight.data.fill_(float("nan"))

    with pytest.raises(NonFiniteLoss, match=r"not finite at step 5: next-token loss.*norm\.weight") as caught:
        fit(config(tmp_path, "a", "checkpoint.every=1"), before_step=spoil)
    assert "\n" not in str(caught.value)
    kept = checkpoints(tmp_path / "a")
    assert [path.name for path in kept] == ["step=4.ckpt", "step=5.ckpt"]
    assert all(torch.isfinite(v).all() for path in kept for v in read(path)["state_dict"].values())


@pytest.mark.parametrize("where", ["weights", "optimizer"])
def test_weights_that_are_not_finite_are_never_written(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spoil(lightning.Callback):
        def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
            if trainer.global_step == 5:  # after the update of the last step before a checkpoint
                weight = module.model.norm.weight
                target = weight.data if where == "weights" else optimizer.state[weight]["exp_avg"]
                target[0] = float("inf")

    settings = config(tmp_path, "a")

    monkeypatch.setattr(fit_module, "Throughput", type("Both", (fit_module.Throughput, Spoil), {}))
    with pytest.raises(NonFiniteLoss, match="not finite"):
        fit(settings)
    assert [path.name for path in checkpoints(tmp_path / "a")] == ["step=3.ckpt"]


# --- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "backend"), [("stm", "aot_eager"), ("none", "inductor")])
def test_compiled_training_is_the_same_and_keeps_its_keys(
    memory: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "inductor" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler")
    calls = []
    original = torch.compile

    def compile_with(function: Any) -> Any:
        compiled = original(function, backend=backend)
        return lambda *args, **kwargs: calls.append(1) or compiled(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compile_with)
    monkeypatch.setattr(loss, "_compiled", lambda: compile_with(loss._rows))
    small = ["trainer.max_steps=2", "model.n_layer=1", "trainer.val_check_interval=1", "model.dropout=0"]
    _, _, whole = fit(config(tmp_path, "a", *small, phases=[SHORT], memory=memory))
    assert not calls
    _, module, rows = fit(config(tmp_path, "b", *small, "training.compile=true", phases=[SHORT], memory=memory))
    assert len(calls) == 2 * 2  # the model and the loss of training steps only
    assert list(curve(rows).values()) == pytest.approx(list(curve(whole).values()), abs=1e-4)
    keys = [set(read(checkpoints(tmp_path / run)[-1])["state_dict"]) for run in "ab"]
    assert keys[0] == keys[1]
    assert module.objective.compiled is None
    memlm.load(tmp_path / "b")


# --- consolidation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["sequence", "shared"])
def test_memories_are_consolidated_every_so_many_steps(
    scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, Any, Any]] = []
    original = LongTermMemory.consolidate

    turns: list[int] = []

    def twice(self: Any, state: Any, threshold: float = 0.1, *, turn: int = 0) -> Any:
        turns.append(turn)
        new, counts = original(self, state, threshold=1.5, turn=turn)  # so wide that something is merged
        seen.append((counts["merged"], states.detach(state), new))
        return new, counts

    monkeypatch.setattr(LongTermMemory, "consolidate", twice)
    carried: dict[int, Any] = {}

    def look(module: LanguageModeling, batch: Any) -> None:
        if scope == "shared":
            carried[batch.step] = module.model.memory["ltm"][0].bank.first(1)
        elif module.carried.state is not None:
            carried[batch.step] = module.carried.state.memory["ltm"][0]

    settings = [f"memory.ltm.scope={scope}", "training.consolidate_every=2", "trainer.max_steps=6"]
    _, _, rows = fit(config(tmp_path, "a", *settings, phases=[FACTS | {"n_window": 5}]), before_step=look)
    # after steps 1, 3 and 5; the document of five windows ends with step 4
    assert len(seen) == 3
    assert turns == [0, 1, 2]
    merged = {row["step"]: row["memory/ltm/merged"] for row in rows if row.get("memory/ltm/merged") is not None}
    assert merged == {1: seen[0][0], 3: seen[1][0], 5: seen[2][0]}
    assert seen[0][0] > 0
    for (_, _, new), step in zip(seen[:2], (2, 4), strict=True):  # what the next step begins with
        torch.testing.assert_close(carried[step].key, new.key)
        assert torch.equal(carried[step].priority, new.priority)


def test_accumulated_batches_are_one_step_to_consolidation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = LongTermMemory.consolidate

    def counted(self: Any, state: Any, turn: int) -> Any:
        seen.append(step)
        return original(self, state, turn=turn)

    def look(module: LanguageModeling, batch: Any) -> None:
        nonlocal step
        step = batch.step

    step = -1
    monkeypatch.setattr(LongTermMemory, "consolidate", counted)
    settings = ["memory.ltm.scope=shared", "training.consolidate_every=2", "trainer.max_steps=4"]
    fit(config(tmp_path, "a", *settings, "trainer.accumulate_grad_batches=3"), before_step=look)
    assert seen == [5, 11]  # with the last batch of the second and of the fourth step


def test_a_module_is_loaded_outside_of_a_trainer(tmp_path: Path) -> None:
    fit(config(tmp_path, "a", "trainer.max_steps=2", "training.lr=0.01", "seed=3"))
    module = LanguageModeling.load_from_checkpoint(tmp_path / "a")
    expected = memlm.load(tmp_path / "a").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in module.model.state_dict().items())
    assert (module.settings.lr, module.seed, module.replay) == (0.01, 3, None)
    again = LanguageModeling.load_from_checkpoint(checkpoints(tmp_path / "a")[-1], seed=5)
    assert again.seed == 5
    with pytest.raises(ConfigError, match=r"takes no model: .*memlm\.load"):
        LanguageModeling.load_from_checkpoint(tmp_path / "a", model=module.model)


def test_no_checkpoint_is_told_of_where_none_was_written(tmp_path: Path) -> None:
    def spoil(module: LanguageModeling, batch: Any) -> None:
        if batch.step == 5:
            module.model.norm.weight.data.fill_(float("nan"))

    with pytest.raises(NonFiniteLoss) as caught:
        fit(config(tmp_path, "a", "checkpoint.every=100"), before_step=spoil)
    assert "checkpoint is kept" not in str(caught.value)
    assert "Lower training.lr" in str(caught.value)
