from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import tapeline
from tapeline.errors import InfeasibleBudgetError, UnsupportedModelError, UsageError
from tapeline.planner.schema import Plan
from tapeline.runtime.candidates import Candidates
from tapeline.runtime.predict import FakeStep
from tapeline.runtime.step import model_loss
from tests.models import FAMILIES, TinyModel, assert_equal
from tests.runtime.test_session import attributes


def plan_for(tiny: TinyModel, budget: Any = None, **options: Any) -> Plan:
    return tapeline.plan(tiny.model, tiny.batch, budget, loss_fn=tiny.loss_fn, **options)


def test_planning_changes_nothing(family: TinyModel) -> None:
    optimizer = torch.optim.AdamW(family.model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # replaces optimizer.step
    family.step()
    optimizer.step()
    scheduler.step()
    state = copy.deepcopy(optimizer.state_dict())
    weights = {n: (p.clone(), p._version, id(p.grad)) for n, p in family.model.named_parameters()}
    before, random_state = attributes(family.model), torch.get_rng_state()
    plan_for(family, mode="recompute", optimizer=optimizer)
    assert attributes(family.model) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, parameter in family.model.named_parameters():
        value, version, gradient = weights[name]
        assert torch.equal(parameter, value)
        assert (parameter._version, id(parameter.grad)) == (version, gradient)
    for key, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(state["state"][key][k])) for k, v in entry.items())


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5", "encoder"])
def test_any_mixture_of_choices_is_composed_as_it_runs(name: str) -> None:
    """The peak that the solver computes for a choice is the peak of that choice when it is executed."""
    tiny = FAMILIES[name]()
    names = [block.name for block in plan_for(tiny, mode="none").blocks]
    candidates = Candidates(FakeStep(tiny.model, tiny.batch, names, optimizer="AdamW"))
    chain = candidates.chain()
    by_choice = {(option.block, option.kind): option for option in chain.options}
    for keep in ({0}, {len(names) - 1}, {1, 2}, set(range(0, len(names), 2))):
        chosen = [by_choice[i, "keep" if i in keep else "recompute"] for i in range(len(names))]
        executed = candidates.profile(candidates.from_options(chosen))
        assert chain.peak_bytes(chosen) == pytest.approx(executed.peak_bytes, rel=0.02)


def test_enough_budget_recomputes_nothing(llama: TinyModel) -> None:
    plan = plan_for(llama, "100%")
    assert plan.flops == plan.untouched_flops
    assert plan.slowdown == 1.0


def test_recompute_does_what_torch_does(llama: TinyModel) -> None:
    """Same floating-point operations and same peak as a non-reentrant checkpoint around every layer."""
    from torch.utils.flop_counter import FlopCounterMode

    from tapeline.ledger import Ledger

    plan = plan_for(llama, mode="recompute")
    llama.model.set_attn_implementation("eager")
    eager = plan_for(llama, mode="recompute")
    llama.model.activation_checkpointing_enable({"use_reentrant": False})
    llama.model.disable_input_require_grads()
    with FlopCounterMode(display=False) as counter:
        llama.loss_fn(llama.model, llama.batch).backward()
    assert eager.flops == counter.get_total_flops()
    llama.model.zero_grad()
    llama.model.set_attn_implementation("sdpa")
    ledger = Ledger()
    ledger.track(llama.model.parameters(), "weights")
    ledger.track(llama.model.buffers(), "weights")
    ledger.track(llama.batch.values(), "batch")
    with ledger:
        llama.loss_fn(llama.model, llama.batch).backward()
    assert plan.peak_bytes <= ledger.peak_bytes()


def test_segments_drop_inputs_where_blocks_are_chained() -> None:
    tiny = FAMILIES["t5"]()
    plan = plan_for(tiny, mode="segments:2")
    assert [b.input for b in plan.blocks] == ["device", "recompute", "device"] * 2  # the decoder starts a new segment


def test_segments_choose_about_the_square_root() -> None:
    plan = plan_for(FAMILIES["llama"](), mode="segments")
    assert sum(block.input == "device" for block in plan.blocks) == 3


def test_long_inputs_make_segments_smaller_than_recompute() -> None:
    """Where block inputs dominate, dropping them goes below the floor of keeping every input."""
    layers = [nn.Sequential(nn.Linear(8, 8, bias=False), nn.Sigmoid()) for _ in range(16)]
    tiny = TinyModel(nn.Sequential(*layers), torch.randn(4096, 8), lambda m, x: m(x).mean())
    recompute, segments = plan_for(tiny, mode="recompute"), plan_for(tiny, mode="segments")
    assert segments.peak_bytes < 0.8 * recompute.peak_bytes
    between = (segments.peak_bytes + recompute.peak_bytes) // 2
    plan = plan_for(tiny, between)
    assert max(plan.first_step_peak_bytes, plan.peak_bytes) <= between
    assert any(block.input == "recompute" for block in plan.blocks)
    expected = tiny.step()
    with tapeline.apply(tiny.model, plan, measure=False) as session:
        for predicted in (plan.first_step_peak_bytes, plan.peak_bytes):
            assert_equal(tiny.step(session.measure()), expected)
            tiny.model.zero_grad()
            assert session.last_peak_bytes == pytest.approx(predicted, rel=0.02)


def test_an_infeasible_budget_carries_the_smallest_feasible_one(llama: TinyModel) -> None:
    with pytest.raises(InfeasibleBudgetError, match="smallest possible") as caught:
        plan_for(llama, "1%")
    smallest = caught.value.smallest_feasible_bytes
    assert caught.value.budget_bytes < smallest
    assert plan_for(llama, smallest).peak_bytes <= smallest
    with pytest.raises(InfeasibleBudgetError):
        plan_for(llama, smallest - 1)


def test_a_mode_that_does_not_fit_says_whether_auto_would(llama: TinyModel) -> None:
    peak = plan_for(llama, mode="none").peak_bytes
    with pytest.raises(InfeasibleBudgetError, match='Mode "auto" fits'):
        plan_for(llama, peak - 1, mode="none")


def test_on_infeasible_warn_gives_the_smallest_plan(llama: TinyModel) -> None:
    with pytest.warns(UserWarning, match="smallest peak"):
        plan = plan_for(llama, "1%", on_infeasible="warn")
    assert plan.peak_bytes > (plan.budget_bytes or 0)


def test_margin_is_taken_off_the_budget(llama: TinyModel) -> None:
    assert plan_for(llama, "10MiB", margin="1MiB").budget_bytes == 9 * 2**20
    assert plan_for(llama, "10MiB", margin="10%").budget_bytes == 9 * 2**20
    assert plan_for(llama, "10MiB", margin=0).budget_bytes == 10 * 2**20
    assert (plan_for(llama).budget_bytes or 0) > 100 * 2**20  # automatic
    assert plan_for(llama, margin="0%").margin_bytes == 0 < plan_for(llama).margin_bytes


def test_optimizer_state_and_accumulation_are_counted(llama: TinyModel) -> None:
    plain = plan_for(llama, mode="none")
    adam = plan_for(llama, mode="none", optimizer="AdamW")
    weights = sum(p.nbytes for p in llama.model.parameters())
    assert adam.peak_bytes - plain.peak_bytes == pytest.approx(2 * weights, rel=0.05)
    assert adam.first_step_peak_bytes < adam.peak_bytes
    made = plan_for(llama, mode="none", optimizer=torch.optim.AdamW)
    assert made.peak_bytes == adam.peak_bytes
    accumulated = plan_for(llama, mode="none", accumulation=2)
    assert accumulated.peak_bytes > plain.peak_bytes
    assert accumulated.flops == 2 * plain.flops


def test_blocks_that_differ_are_planned_under_autocast(llama: TinyModel) -> None:
    """A block that turns out to have another tape than its like runs again in backward, which runs outside autocast."""
    llama.model.get_submodule("model.layers.3.self_attn").attention_dropout = 0.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = plan_for(llama, mode="cheap")
    with tapeline.apply(llama.model, plan, measure=False) as session:
        for _ in range(3):
            llama.model.zero_grad()
            with session.measure():
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = llama.loss_fn(llama.model, llama.batch)
                loss.backward()
                del loss
        assert session.report().rerun_calls
    assert session.last_peak_bytes == pytest.approx(plan.peak_bytes, rel=0.02)


def test_blocks_with_other_trainable_parts_are_not_taken_for_alike(llama: TinyModel) -> None:
    trained = list(llama.model.parameters())
    for parameter in trained[len(trained) // 2 - 4 :]:  # in the middle of a block
        parameter.requires_grad_(False)
    plan = plan_for(llama, mode="cheap")
    with tapeline.apply(llama.model, plan, measure=False) as session:
        llama.step(session.measure())
        assert session.report().rerun_calls == 0
    assert session.last_peak_bytes == pytest.approx(plan.peak_bytes, rel=0.02)


def test_autocast_around_the_call_is_part_of_the_step(llama: TinyModel) -> None:
    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**batch).loss

    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = plan_for(llama, mode="recompute")
    llama.loss_fn = loss_fn
    expected = llama.step()
    with tapeline.apply(llama.model, plan, measure=False) as session:
        got = llama.step(session.measure())
    assert_equal(got, expected)
    assert session.last_peak_bytes == pytest.approx(plan.peak_bytes, rel=0.02)
    llama.loss_fn = model_loss
    assert plan.peak_bytes != plan_for(llama, mode="recompute").peak_bytes


def test_a_model_in_eval_mode_is_planned_for_training(llama: TinyModel) -> None:
    expected = plan_for(llama, mode="recompute")
    llama.model.eval()
    assert plan_for(llama, mode="recompute") == expected
    assert not llama.model.training


def test_plans_are_the_same_every_time(family: TinyModel) -> None:
    assert plan_for(family, mode="recompute") == plan_for(family, mode="recompute")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "Unknown mode"),
        ({"accumulation": 0}, "accumulation must be at least 1"),
        ({"on_infeasible": "ignore"}, "on_infeasible must be"),
        ({"optimizer": "AdamV"}, "did you mean 'Adam"),
        ({"margin": "auto"}, "margin must be"),
        ({"budget": "12 parsecs"}, "Unknown unit"),
        ({"blocks": ["model.layer.*"]}, "No module matches"),
    ],
)
def test_wrong_arguments_are_refused(llama: TinyModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_for(llama, **{"budget": "1GiB"} | options)


def test_a_model_without_a_loss_is_refused(llama: TinyModel) -> None:
    with pytest.raises(UsageError, match="returned no scalar loss"):
        tapeline.plan(llama.model, {"input_ids": llama.batch["input_ids"]}, mode="none")


def test_a_model_without_blocks_can_only_be_measured() -> None:
    model, batch = nn.Linear(4, 1), torch.ones(2, 4)
    with pytest.raises(UnsupportedModelError, match="No blocks found"):
        tapeline.plan(model, batch, loss_fn=lambda m, x: m(x).sum())
    plan = tapeline.plan(model, batch, mode="none", loss_fn=lambda m, x: m(x).sum())
    assert plan.notes[-1] == "no blocks were found: nothing is managed"


def test_a_loss_that_uses_another_model_is_an_error_and_touches_nothing(llama: TinyModel) -> None:
    with pytest.raises(UsageError, match="uses a model of its own"):
        tapeline.plan(llama.model, llama.batch, mode="none", loss_fn=lambda _, batch: llama.model(**batch).loss)
    assert all(p.grad is None for p in llama.model.parameters())


def test_shapes_that_depend_on_values_are_refused() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x[x > 0].sum()

    with pytest.raises(UnsupportedModelError, match="depends on the values"):
        tapeline.plan(Picky(), torch.ones(2, 4), mode="recompute")
