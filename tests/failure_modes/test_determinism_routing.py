"""Rows F42, F42b and F42c: routing in mixtures of experts, kernels that give something else the second time, collectives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import _functional_collectives as functional

from tapeline.errors import PlanDriftError
from tapeline.ledger import BACKWARD, FORWARD, RECOMPUTE, Ledger
from tests.exact.families import token_ids
from tests.failure_modes.twins import MODES, Block, Twins, tiny, transformer, twins

REPLAYS_PRODUCTS = ("recompute", "least", "segments:2")
hidden: dict[str, Any] = {}
"""What blocks look at beside their arguments."""


@pytest.fixture(autouse=True)
def _nothing_hidden() -> Iterator[None]:
    hidden.clear()
    yield
    hidden.clear()


def with_noise(x: torch.Tensor, name: str) -> torch.Tensor:
    """As it is the first time in a step, and a little different from the second time on; until then like any kernel."""
    if hidden.get("is_noisy"):
        times = hidden.setdefault("times", Counter())
        times[name, x.numpy().tobytes()] += 1
        x = x + 1e-3 * (times[name, x.numpy().tobytes()] - 1) * torch.linspace(-1, 1, x.numel()).view_as(x)
    return x


@torch.library.custom_op("tapeline_failure_modes::noisy_linear", mutates_args=())
def noisy_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return with_noise(x, "linear") @ weight.t()


def _linear_grad(ctx: Any, grad: torch.Tensor) -> Any:
    x, weight = ctx.saved_tensors
    return grad @ weight, grad.t() @ x


noisy_linear.register_fake(lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]))
noisy_linear.register_autograd(_linear_grad, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@torch.library.custom_op("tapeline_failure_modes::noisy_exp", mutates_args=())
def noisy_exp(x: torch.Tensor) -> torch.Tensor:
    return with_noise(x, "exp").exp()


noisy_exp.register_fake(torch.empty_like)
noisy_exp.register_autograd(
    lambda ctx, grad: grad * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
)


class Noisy(Twins):
    """Every run of either twin is a step of its own for the noise."""

    def result(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        hidden.pop("times", None)
        return super().result(*args, **kwargs)


# -- F42: routing --------------------------------------------------------------------------------------------------

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "router_jitter_noise": 0.1},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def tie(model: nn.Module) -> None:
    """Routers whose experts are so close that the last bit of a product decides."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.copy_(parameter[:1] + 1e-7 * parameter)


def routes(pair: Twins) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The indices that the forward of a step chooses, and those that its replays choose again."""
    found: dict[str, list[torch.Tensor]] = {FORWARD: [], RECOMPUTE: [], BACKWARD: []}

    def observe(func: Any, args: Any, kwargs: Any, out: Any, span: Any) -> None:
        if func is torch.ops.aten.topk.default:
            found[span.phase].append(out[1].clone())

    ledger = Ledger(observe=observe)
    with ledger, ledger.watch(pair.managed, [seam.name for seam in pair.seams]):
        pair.result(pair.managed)
    assert not found[BACKWARD]
    return found[FORWARD], found[RECOMPUTE]


@pytest.mark.parametrize("mode", ["cheap", "recompute"])
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", MIXTURES)
def test_f42_experts_are_chosen_once_or_chosen_again_alike(family: str, implementation: str, mode: str) -> None:
    """With noise on the input of the router where the model has it, other tokens in every step, and near ties."""
    model = tiny(family, **MIXTURES[family])
    model.set_experts_implementation(implementation)
    with transformer(model, mode, token_ids(2, 24), prepare=tie) as pair:
        for seed in range(2):
            pair.check(seed=seed)
            pair.batch = token_ids(2, 24)
        chosen, again = routes(pair)
        assert len(chosen) == 2
        assert len(again) == (2 if mode == "recompute" else 0)
        assert all(map(torch.equal, again, chosen[::-1]))
        pair.check_on_tape()


@pytest.mark.parametrize("mode", ["cheap", "recompute"])
@pytest.mark.parametrize("since", ["before the plan", "after it"])
def test_f42_experts_called_one_by_one_are_exact(since: str, mode: str) -> None:
    """Which of them are called, and with how many tokens, depends on the routing: another list of operations each time."""

    def one_by_one(model: Any) -> None:
        model.set_experts_implementation("eager")

    model = tiny("qwen3_moe", **MIXTURES["qwen3_moe"])
    model.set_experts_implementation("grouped_mm")
    if is_before := since == "before the plan":
        one_by_one(model)
    with transformer(model, mode, token_ids(2, 24), prepare=tie, plans=is_before) as pair:
        one_by_one(pair.managed)
        one_by_one(pair.untouched)
        for seed in range(3):
            pair.batch = token_ids(2, 24)
            pair.check(seed=seed)
        notes = " ".join([*pair.session.plan.notes, *pair.session.report().notes])
        assert "values of tensors" in notes
        assert bool(pair.session.report().rerun_calls) == (mode == "recompute")


def mixture(block: Block, x: torch.Tensor) -> torch.Tensor:
    """Four experts, of which the two with the largest logits are taken; they are nearly equal."""
    h = x.flatten(0, 1)
    if hidden.get("reads"):
        h.detach().sum().item()
    logits = noisy_linear(h.sin(), block.up.weight[:1] + 1e-6 * block.up.weight[:4])
    top, index = logits.softmax(-1).topk(2, -1)
    experts = block.down.weight.unflatten(1, (4, 4))[:, index]  # of shape [width, token, chosen, 4]
    return x + torch.einsum("tw,wtce,tc->te", h, experts, top).repeat(1, 2).view_as(x).sin()


@pytest.mark.parametrize("mode", MODES)
def test_f42_a_router_that_is_not_the_same_twice_is_not_asked_twice(mode: str) -> None:
    with twins(mixture, mode, kind=Noisy) as pair:
        hidden["is_noisy"] = True
        for seed in range(3):
            pair.check(seed=seed)
        chosen, again = routes(pair)
        assert len(chosen) == 3
        assert all(any(torch.equal(index, one) for one in chosen) for index in again)
        assert not any("noisy" in name for name in pair.replayed())
        kept = " ".join(pair.session.report().kept_instead)
        assert ("softmax" in kept or "noisy_linear" in kept) == (mode in REPLAYS_PRODUCTS)


@pytest.mark.parametrize("mode", ["recompute", "segments:2"])
def test_f42_a_router_that_is_not_the_same_twice_in_a_block_that_is_run_again_as_a_whole(mode: str) -> None:
    """Exact, or an error."""
    with twins(mixture, mode, kind=Noisy) as pair:
        hidden.update(is_noisy=True, reads=True)
        try:
            pair.check()
        except PlanDriftError:
            return
        pair.check()


# -- F42b: kernels that give something else the second time --------------------------------------------------------


def noisy(block: Block, x: torch.Tensor) -> torch.Tensor:
    h = noisy_linear(x.sin().exp().flatten(0, 1), block.up.weight).view(*x.shape[:-1], -1)
    return x + block.down(F.gelu(noisy_exp(h.sin())).cos())


@pytest.mark.parametrize("mode", MODES)
def test_f42b_what_a_kernel_makes_differently_the_second_time_is_kept_and_named(mode: str) -> None:
    with twins(noisy, mode, kind=Noisy) as pair:
        hidden["is_noisy"] = True
        for seed in range(3):
            pair.check(seed=seed)
        report = pair.session.report()
        assert any("noisy" in what for what in report.kept_instead) == (mode in REPLAYS_PRODUCTS)
        assert pair.replayed()
        assert not any("noisy" in name for name in pair.replayed())


def test_f42b_strict_names_the_first_op_that_differs() -> None:
    with twins(noisy, "recompute", kind=Noisy, strict=True) as pair:
        for seed in range(2):
            pair.check(seed=seed)
        hidden["is_noisy"] = True
        with pytest.raises(PlanDriftError, match=r"'layers\.0'.*op \d+, tapeline_failure_modes\.noisy_linear") as error:
            pair.loss(pair.managed)
        assert "noisy_exp" not in str(error.value)


def test_f42b_a_kernel_that_turns_later_is_found_by_the_audits_some_steps_on() -> None:
    with twins(noisy, "recompute", kind=Noisy, audit_every=1) as pair:
        for seed in range(2):
            pair.check(seed=seed)
        assert not pair.session.report().kept_instead
        hidden["is_noisy"] = True
        for _ in range(2):  # one block at a time: the first has a tape of its own, because its input has no gradient
            pair.result(pair.managed)
        assert any("noisy" in what for what in pair.session.report().kept_instead)
        for seed in range(2):
            pair.check(seed=seed)


# -- F42c: collectives ---------------------------------------------------------------------------------------------


@pytest.fixture
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Exchange(torch.autograd.Function):
    """Tokens on their way to the experts of other ranks, and back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return Exchange.apply(grad)


def shared_scale(h: torch.Tensor) -> torch.Tensor:
    """A largest value that all ranks agree on, as for a cast to fp8."""
    largest = h.detach().abs().amax()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return h / largest


COLLECTIVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "functional": lambda h: functional.all_reduce(h * 1.0, "sum", dist.group.WORLD) * 1.0,
    "with a gradient": lambda h: functional.all_to_all_single_autograd(h * 1.0, None, None, dist.group.WORLD) * 1.0,
    "in a Function": Exchange.apply,
    "in place": shared_scale,
}


def communicating(block: Block, x: torch.Tensor) -> torch.Tensor:
    h = block.up(x).sin()
    if hidden.get("reads"):
        h.detach().sum().item()
    return block.down(COLLECTIVES[hidden["kind"]](h).cos().exp())


def num_collectives(pair: Twins, model: nn.Module) -> int:
    seen = []

    def observe(func: Any, args: Any, kwargs: Any, out: Any, span: Any) -> None:
        if "c10d" in func.namespace and "wait" not in func.__name__:
            seen.append(func)

    with Ledger(observe=observe):
        pair.result(model)
    assert seen
    return len(seen)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", COLLECTIVES)
def test_f42c_collectives_are_on_the_tape_and_never_replayed(kind: str, mode: str) -> None:
    hidden["kind"] = kind
    with twins(communicating, mode) as pair:
        for seed in range(2):
            pair.check(seed=seed)
        managed, untouched = (num_collectives(pair, model) for model in (pair.managed, pair.untouched))
        assert managed == untouched
        pair.check_on_tape()
        for recipe in pair.recipes:
            assert any("collective" in op.obstacle for op in recipe.tape.ops)
            assert not any(recipe.tape.ops[step].obstacle for p in recipe.programs for step in p.steps)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("mode", ["cheap", "recompute"])
@pytest.mark.parametrize("kind", COLLECTIVES)
def test_f42c_collectives_of_a_block_that_reads_values_are_not_repeated_either(kind: str, mode: str) -> None:
    """Other ranks may have no reason to run theirs again, and would be waited for."""
    hidden.update(kind=kind, reads=True)
    with twins(communicating, mode) as pair:
        pair.check()
        managed, untouched = (num_collectives(pair, model) for model in (pair.managed, pair.untouched))
        assert managed == untouched
