"""What goes through saved-tensor hooks: in-place writes, hooks of others, selective checkpointing."""

from __future__ import annotations

import copy
import functools
import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import tapeline
from tapeline import compat
from tapeline.compat import CHECKPOINT_DEFAULTS
from tests.failure_modes.surfaces import MODES, SURFACES, WIDTH, Block, Stack, offloading, plain, total, twins
from tests.models import assert_equal

ADDMM = torch.ops.aten.addmm.default


def selective(*ops: Any) -> Any:
    return functools.partial(create_selective_checkpoint_contexts, list(ops))


# -- F21: autocast's cache of weights ------------------------------------------------------------------------------


class Twice(Stack):
    """Calls each block twice, so that autocast has a copy of its weights; of some already before."""

    uses_weights_first = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.uses_weights_first:
            x = x + sum(layer.up(x)[..., :WIDTH] for layer in self.layers)
        return super().forward(super().forward(x))


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("uses_weights_first", [True, False])
def test_f21_weights_that_autocast_has_cached_make_no_difference(surface: str, *, uses_weights_first: bool) -> None:
    """The first use of a weight in a step meets an empty cache, the others a full one; weights change between steps."""

    def run(model: nn.Module) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = total(model, pair.batch)
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad, alpha=1e-4)

    model = Twice(plain)
    model.uses_weights_first = uses_weights_first
    with twins(surface, model) as pair:
        num_reruns = []
        for seed in range(3):
            pair.check(run, seed)
            if pair.session is not None:
                report = pair.session.report()
                num_reruns.append(report.rerun_calls)
                assert not report.notes
        assert num_reruns[1:] == num_reruns[:-1]  # only the first step may look at blocks built alike


@pytest.mark.parametrize("op", [ADDMM, torch.ops.aten._to_copy.default])
@pytest.mark.parametrize("is_cached", [True, False])
def test_f21_selective_checkpointing_under_autocast_is_exact_or_an_error(op: Any, *, is_cached: bool) -> None:
    """A cached weight is cast again in the recompute, one operation more (pytorch#193338): never other gradients."""
    first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    x = torch.randn(4, WIDTH)

    def region(y: torch.Tensor) -> torch.Tensor:
        return second(first(y).sin()).cos()

    def run(call: Any) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = second(call(second(x) if is_cached else x))
        return torch.autograd.grad(out.float().sum(), [*first.parameters(), *second.parameters()])

    expected = run(region)
    assert all(map(torch.equal, run(functools.partial(tapeline.checkpoint, region)), expected))
    try:
        got = run(functools.partial(tapeline.checkpoint, region, context_fn=selective(op)))
    except RuntimeError as error:
        assert is_cached
        assert "global state that changed between forward and backward" in str(error)  # noqa: PT017
    else:
        assert all(map(torch.equal, got, expected))


# -- F22: in-place writes ------------------------------------------------------------------------------------------


def write_weight(model: nn.Module, seen: list[torch.Tensor]) -> None:
    model.layers[1].down.weight.mul_(2)


def write_input(model: nn.Module, seen: list[torch.Tensor]) -> None:
    seen[0].add_(1)


def write_bias(model: nn.Module, seen: list[torch.Tensor]) -> None:
    """Autograd does not save it; a replay starts from it."""
    model.layers[1].up.bias.mul_(2)


def write_view_of_input(model: nn.Module, seen: list[torch.Tensor]) -> None:
    seen[0][:, :1].zero_()


def write_output(model: nn.Module, seen: list[torch.Tensor]) -> None:
    seen[1].mul_(2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("write", [write_weight, write_bias, write_input, write_view_of_input, write_output])
def test_f22_an_in_place_write_before_backward_is_an_error(mode: str, write: Any) -> None:
    """Hooks switch autograd's own check off (pytorch#128545, #62717)."""
    seen: list[torch.Tensor] = []

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        y = block.down((block.up(x) * 1.5).exp()).sigmoid()
        if block.number == 1:
            seen[:] = x, y
        return y

    def run(model: nn.Module) -> None:
        loss = total(model, pair.batch)
        with torch.no_grad():
            write(model, seen)
        loss.backward()
        seen.clear()

    with twins(mode, body) as pair:
        start, expected = copy.deepcopy(pair.untouched.state_dict()), pair.result(pair.untouched)
        assert isinstance(pair.outcome(pair.untouched, run), str) == (write is not write_bias)
        for _ in range(2):  # recorded, and as recorded
            got = pair.outcome(pair.managed, run)
            if isinstance(got, str):
                assert "modified by an inplace operation" in got
            else:  # nothing depends on it, or it has been dropped and is made again as it was
                assert write is write_bias or mode in ("least", "segments:2")
                assert_equal(got, expected)
            pair.managed.load_state_dict(start)
            pair.untouched.load_state_dict(start)
            pair.check()


@pytest.mark.parametrize("how", ["positional", "keyword", "in a tuple", "in a list"])
def test_f22_in_place_write_to_an_input_of_a_checkpoint_is_an_error(how: str) -> None:
    def fn(x: torch.Tensor, scale: Any = None) -> torch.Tensor:
        return (x * (scale if isinstance(scale, torch.Tensor) else scale[0])).sin()

    x, scale = torch.randn(3, requires_grad=True), torch.rand(3)
    given = {"positional": scale, "keyword": scale, "in a tuple": (scale, 1), "in a list": [scale]}[how]
    args, kwargs = ((given,), {}) if how == "positional" else ((), {"scale": given})
    tapeline.checkpoint(fn, x, *args, **kwargs).sum().backward()
    out = tapeline.checkpoint(fn, x, *args, **kwargs)
    scale.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# -- F23: in-place operations inside -------------------------------------------------------------------------------


def in_place(block: Block, x: torch.Tensor) -> torch.Tensor:
    """Legal: what is written has not been saved before."""
    scores = block.up(x)
    scores += 0.5
    weights = F.dropout(scores.softmax(-1), 0.2, block.training).exp_()
    return x + block.down(F.relu(weights.sin().mul_(2), inplace=True).cos())


@pytest.mark.parametrize("surface", SURFACES)
def test_f23_in_place_operations_inside_a_block_are_replayed_in_their_order(surface: str) -> None:
    with twins(surface, in_place) as pair:
        for seed in range(3):
            pair.check(seed=seed)
        pair.assert_replayed()


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize(
    "kind", ["from the first call on", "in later calls", "in a block that is run again as a whole"]
)
def test_f23_writing_over_what_was_saved_is_an_error_or_makes_no_difference(surface: str, kind: str) -> None:
    """An error, as in the untouched model, or the gradient that there is without writing in place."""

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        h = block.up(x)
        if kind == "in a block that is run again as a whole":
            h = h * (1.0 if h.detach().isnan().any() else 1.5)
        y = h.sin()
        h = h.mul_(2) if writes else h * 2
        return block.down(y.cos() + h)

    writes = False
    with twins(surface, body) as pair:
        expected = pair.result(pair.untouched)
        if kind != "from the first call on":
            pair.check()
        writes = True
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            pair.result(pair.untouched)
        for _ in range(2):
            got = pair.outcome(pair.managed)
            if isinstance(got, str):
                assert "modified by an inplace operation" in got
            else:
                assert_equal(got, expected)


@pytest.mark.parametrize("op", [ADDMM, torch.ops.aten.mul_.Tensor])
def test_f23_selective_checkpointing_does_not_take_what_was_overwritten(op: Any) -> None:
    """pytorch#113737: the check of what is cached is never switched off."""
    layer = nn.Linear(WIDTH, WIDTH)
    out = tapeline.checkpoint(lambda x: layer(x).mul_(2).cos(), torch.randn(2, WIDTH), context_fn=selective(op))
    with pytest.raises(RuntimeError, match="has been mutated"):
        out.sum().backward()


# -- F24: hooks inside hooks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("surface", SURFACES)
def test_f24_hooks_around_the_model_are_given_what_is_kept(surface: str) -> None:
    seen: dict[nn.Module, list[torch.Size]] = {}

    def run(model: nn.Module) -> None:
        seen[model] = []
        with offloading(seen[model]):
            loss = total(model, pair.batch)
        loss.backward()

    with twins(surface) as pair:
        for seed in range(3):
            pair.check(run, seed)
        num_outside = 1  # the loss
        assert num_outside < len(seen[pair.managed]) < len(seen[pair.untouched])
        pair.check()
        pair.assert_replayed()


@pytest.mark.parametrize("mode", MODES)
def test_f24_what_hooks_of_others_compute_is_no_part_of_the_block(mode: str) -> None:
    """Hooks that quantise read values; a block that does so could not be replayed from a tape."""

    def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, float]:
        scale = float(tensor.detach().abs().max())
        return tensor.detach() / 2.0, scale

    def run(model: nn.Module) -> None:
        with saved_tensors_hooks(pack, lambda packed: packed[0] * 2.0):
            loss = total(model, pair.batch)
        loss.backward()

    with twins(mode) as pair:
        for way in (run, run, None):
            pair.check(way)
        pair.assert_replayed()


@pytest.mark.parametrize("surface", SURFACES)
def test_f24_hooks_inside_a_block_replace_ours_for_what_they_enclose(surface: str) -> None:
    seen: list[torch.Size] = []

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        with offloading(seen):
            h = F.gelu(block.up(x)).sin()
        return x + F.dropout(block.down(h.cos()), 0.2)

    with twins(surface, body) as pair:
        for seed in range(3):
            pair.check(seed=seed)
        counts = []
        for model in (pair.managed, pair.untouched):
            seen.clear()
            pair.result(model)
            counts.append(seen.copy())
        assert counts[0][: len(counts[1])] == counts[1]  # a checkpoint enters them again


@pytest.mark.parametrize("mode", MODES)
def test_f24_a_checkpoint_around_a_managed_model_is_left_to_itself_and_reported(mode: str) -> None:
    def run(model: nn.Module) -> None:
        tapeline.checkpoint(model, pair.batch).pow(2).sum().backward()

    with twins(mode) as pair:
        for way in (run, None, run):
            pair.check(way)
        assert "somebody else checkpoints" in pair.session.report().notes[0]


@pytest.mark.parametrize("mode", MODES)
def test_f24_a_checkpoint_inside_a_managed_block(mode: str) -> None:
    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        h = tapeline.checkpoint(lambda y: F.dropout(F.gelu(block.up(y)), 0.2), x * block.down.bias.exp())
        return x + F.dropout(block.down(h.cos()), 0.2)

    with twins(mode, body) as pair:
        for seed in range(3):
            pair.check(seed=seed)


# -- F25: selective checkpointing and hooks ------------------------------------------------------------------------


@pytest.mark.parametrize("op", [ADDMM, torch.ops.aten.gelu.default])
def test_f25_selective_checkpointing_under_hooks_is_exact(op: Any) -> None:
    """What torch caches goes through hooks only from the release on that has an option for it (pytorch#190581)."""
    seen: list[torch.Size] = []

    def run(model: nn.Module) -> None:
        with offloading(seen):
            loss = total(model, pair.batch)
        loss.backward()

    with twins("checkpoint") as pair:
        for layer in pair.managed.layers:
            layer.forward = functools.partial(layer.forward, context_fn=selective(op))
        pair.check(run)
        seen.clear()
        pair.result(pair.managed, run)
        has_cached = any(shape.numel() == 4 * 6 * 2 * WIDTH for shape in seen)
        assert has_cached == bool(CHECKPOINT_DEFAULTS)
        assert seen.count(pair.batch.shape) >= len(pair.managed.layers)


@pytest.mark.parametrize("has_option", [True, False])
def test_f25_the_option_is_passed_where_torch_has_it(monkeypatch: pytest.MonkeyPatch, *, has_option: bool) -> None:
    """Its default will change; what we ask for does not."""
    given: list[dict[str, Any]] = []

    def newer(function: Any, *args: Any, respect_saved_tensors_hooks: bool = False, **kwargs: Any) -> Any:
        given.append({"respect_saved_tensors_hooks": respect_saved_tensors_hooks})
        return function(*args)

    def older(function: Any, *args: Any, **kwargs: Any) -> Any:
        given.append({name: value for name, value in kwargs.items() if name != "use_reentrant"})
        return function(*args)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", newer if has_option else older)
    spec = importlib.util.spec_from_file_location("compat_of_another_torch", compat.__file__)
    read_again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(read_again)
    monkeypatch.setattr("tapeline.runtime.checkpoint.CHECKPOINT_DEFAULTS", read_again.CHECKPOINT_DEFAULTS)
    monkeypatch.setattr("tapeline.runtime.checkpoint.torch_checkpoint", torch.utils.checkpoint.checkpoint)
    tapeline.checkpoint(torch.sin, torch.ones(1))
    assert given == ([{"respect_saved_tensors_hooks": True}] if has_option else [{}])


def test_f25_matrix_products_that_a_plan_keeps_go_through_hooks() -> None:
    """No selective checkpointing is involved: what is kept is what autograd saves."""
    seen: list[torch.Size] = []

    def run(model: nn.Module) -> None:
        with offloading(seen):
            loss = total(model, pair.batch)
        loss.backward()

    with twins("cheap") as pair:
        pair.check()
        pair.check(run)
        seen.clear()
        pair.result(pair.managed, run)
        assert seen.count(torch.Size([4, 6, 2 * WIDTH])) == len(pair.managed.layers)
