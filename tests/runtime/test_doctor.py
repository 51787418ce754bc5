"""Every verdict of the doctor, and a model that is afterwards as it was before."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tapeline
from tapeline.errors import UsageError
from tapeline.planner.diagnosis import Diagnosis
from tapeline.runtime.install import managed_module
from tests.exact.families import token_ids
from tests.failure_modes.twins import MODES, Block, Stack, tiny, total

BATCH = (torch.linspace(-1, 1, 4 * 6 * 8).reshape(4, 6, 8), torch.tensor([3, 5]))
hidden = {"shift": 0.0, "calls": 0.0}
"""What the model looks at behind everybody's back."""


@pytest.fixture(autouse=True)
def _nothing_hidden() -> Iterator[None]:
    hidden.update(shift=0.0, calls=0.0)
    yield
    torch.set_num_threads(1)


@torch.library.custom_op("tapeline_doctor_tests::shifted", mutates_args=())
def shifted(x: torch.Tensor) -> torch.Tensor:
    return x + hidden["shift"]


@shifted.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


shifted.register_autograd(lambda context, grad: grad)


def plain(block: Block, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return x + block.down(block.up(x).sin())


def reading(block: Block, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    scale = 2.0 if lengths.max().item() > 9 else 1.0
    return x + block.down(block.up(x).sin()) * scale


def reading_in_one(block: Block, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return reading(block, x, lengths) if block.number == 2 else plain(block, x, lengths)


def counting(block: Block, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Running it again would write its buffer again."""
    block.shift += lengths.max().item()
    return x + block.down(block.up(x).sin() * 0.5)


def diagnosed(body: Callable[..., torch.Tensor], modes: Any = MODES, **options: Any) -> Diagnosis:
    return tapeline.diagnose(Stack(body), BATCH, modes=modes, **{"loss_fn": total, "blocks": ["layers.*"]} | options)


# -- verdicts ------------------------------------------------------------------------------------------------------


def test_a_llama_is_exact_on_the_tape_in_every_mode_and_its_peak_is_the_predicted_one() -> None:
    model = tiny("llama", attention_dropout=0.1)
    found = tapeline.diagnose(model, token_ids(2, 12))
    assert found.verdict == "exact on the tape"
    assert found.is_exact
    assert found.is_deterministic
    assert [row.mode for row in found.rows] == ["cheap", "recompute", "least", "segments"]
    assert (found.model, found.num_blocks, found.device) == ("LlamaForCausalLM", 2, "cpu")
    assert found.num_parameters == found.num_trainable == sum(p.numel() for p in model.parameters())
    num_gradients, num_buffers = len(list(model.parameters())), len(list(model.named_buffers()))
    for row in found.rows:
        assert row.num_compared == 1 + num_gradients + num_buffers + 3
        assert (row.num_taped, row.num_rerun, row.num_kept, row.num_idle) == (2, 0, 0, 0)
        assert row.measured_peak_bytes == row.predicted_peak_bytes < found.untouched_peak_bytes
        assert row.measured_first_step_peak_bytes == row.predicted_first_step_peak_bytes
        assert not row.reasons
        assert not row.notes
    by_mode = {row.mode: row.flops_ratio for row in found.rows}
    assert by_mode["cheap"] == 1.0 < by_mode["recompute"] <= by_mode["least"]


def test_a_block_that_reads_values_is_exact_by_fall_back_and_the_reason_names_it() -> None:
    found = diagnosed(reading_in_one, ["cheap", "recompute"])
    cheap, recompute = found.rows
    assert found.verdict == "exact by fall-back"
    assert found.is_exact
    assert (cheap.num_taped, cheap.num_rerun, cheap.num_kept) == (2, 0, 1)
    assert (recompute.num_taped, recompute.num_rerun, recompute.num_kept) == (2, 1, 0)
    for row in found.rows:
        (reason,) = row.reasons
        assert reason.blocks == ("layers.2",)
        assert "reads the values of tensors" in reason.reason
    assert str(found).count("layers.2: it reads the values of tensors") == 1, "what both modes say is said once"


def test_a_block_that_changes_its_buffer_is_kept_and_its_buffer_compared() -> None:
    model = Stack(counting)
    before = [layer.shift.clone() for layer in model.layers]
    found = tapeline.diagnose(model, BATCH, modes=["recompute"], loss_fn=total, blocks=["layers.*"])
    assert found.verdict == "exact by fall-back"
    assert (found.rows[0].num_rerun, found.rows[0].num_kept) == (0, 3)
    assert all(torch.equal(layer.shift, one) for layer, one in zip(model.layers, before, strict=True))


def test_frozen_blocks_are_neither_taped_nor_a_fall_back() -> None:
    model = Stack(plain)
    model.layers[0].requires_grad_(False)
    found = tapeline.diagnose(model, BATCH, modes=["least"], loss_fn=total, blocks=["layers.*"])
    assert found.verdict == "exact on the tape"
    assert (found.rows[0].num_taped, found.rows[0].num_idle) == (2, 1)
    assert "nothing to drop in 1 blocks" in str(found)
    assert [p.requires_grad for p in model.layers[0].parameters()] == [False] * 4


def test_blocks_that_a_mode_keeps_by_choice_are_no_fall_back() -> None:
    """Gradients need more than what the blocks save of one token: `least` drops nothing."""
    model, batch = Stack(plain), (torch.ones(1, 1, 8), torch.tensor([1]))
    options: dict[str, Any] = {"loss_fn": total, "blocks": ["layers.*"]}
    found = tapeline.diagnose(model, batch, modes=["recompute", "least"], **options)
    recompute, least = found.rows
    assert found.verdict == "exact on the tape"
    assert (recompute.num_taped, recompute.num_spared) == (3, 0)
    assert (least.num_taped, least.num_kept, least.num_spared) == (0, 0, 3)
    assert "least: kept by choice in 3 blocks" in str(found)
    alone = tapeline.diagnose(model, batch, modes=["least"], **options)
    assert alone.verdict == "exact by fall-back", "nothing was replayed at all"


def test_a_replay_that_gives_something_else_is_wrong_and_the_tensors_are_named() -> None:
    """The operation looks at a number that nothing can see, and that changes between forward and backward."""

    def body(block: Block, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return x + block.down(shifted(block.up(x)).sin())

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        hidden["shift"] = 0.0
        loss = total(model, batch)
        hidden["shift"] = 0.5
        return loss

    found = diagnosed(body, ["recompute"], loss_fn=loss_fn)
    (row,) = found.rows
    assert found.is_deterministic, "the untouched model runs the operation in its forward only"
    assert (found.verdict, row.is_exact, found.is_exact) == ("wrong", False, False)
    assert row.num_different > len(row.different) == 3
    assert row.different[0].startswith("grad of layers.0.")
    assert f"WRONG: {row.num_different} of {row.num_compared} differ: grad of layers.0." in str(found)


@pytest.mark.parametrize("is_blind", [False, True])
def test_what_the_first_check_would_have_kept_is_wrong_without_it(
    monkeypatch: pytest.MonkeyPatch, *, is_blind: bool
) -> None:
    """The reference is the untouched model, not what the runtime says of itself."""

    def body(block: Block, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        hidden["shift"] = 0.0
        h = shifted(block.up(x))
        hidden["shift"] = 0.5
        return x + block.down(h.sin())

    if is_blind:
        monkeypatch.setattr("tapeline.runtime.verifier.same_bits", lambda replayed, saved: True)
    found = diagnosed(body, ["recompute"])
    assert found.verdict == ("wrong" if is_blind else "exact on the tape")
    assert bool(found.rows[0].kept_instead) is not is_blind
    assert ("kept instead: block 'layers.0'" in str(found)) is not is_blind


def test_a_model_that_does_not_repeat_itself_is_named_and_nothing_is_claimed() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        hidden["calls"] += 1
        return total(model, batch) * hidden["calls"]

    found = diagnosed(plain, ["cheap"], loss_fn=loss_fn)
    assert (found.verdict, found.is_exact, found.is_deterministic) == ("not deterministic", False, False)
    assert found.different[0] == "loss"
    assert found.rows[0].is_exact is None
    assert found.rows[0].num_taped == 3, "blocks and bytes are still told"
    assert "differ between two runs of the untouched model from the same seed: loss, grad of" in str(found)


def test_shapes_that_depend_on_values_are_not_supported_and_the_row_says_so() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        out = model(*batch)
        return out[out > 0].pow(2).sum()

    found = diagnosed(plain, loss_fn=loss_fn)
    assert found.verdict == "not supported"
    assert [row.is_exact for row in found.rows] == [None] * 4
    assert all("depends on the values of activations" in row.error for row in found.rows)
    assert str(found).count("not supported: ") == 2, "in the headline, and once for all modes"


def test_one_wrong_mode_outweighs_those_that_are_exact() -> None:
    exact = diagnosed(plain, ["cheap"])
    (row,) = exact.rows
    for error, is_exact, verdict in (
        ("", False, "wrong"),
        ("no", None, "not supported"),
        ("", None, "not deterministic"),
    ):
        worse = replace(row, error=error, is_exact=is_exact)
        assert replace(exact, rows=(row, worse)).verdict == verdict
    assert exact.is_exact


def test_a_model_without_blocks_is_a_row_for_every_mode() -> None:
    found = tapeline.diagnose(nn.Linear(4, 4), torch.ones(2, 4), loss_fn=lambda m, x: m(x).sum())
    assert found.verdict == "not supported"
    assert all("No blocks found in Linear" in row.error for row in found.rows)


def test_nans_with_the_same_bits_are_equal_and_said() -> None:
    found = diagnosed(plain, ["recompute"], loss_fn=lambda model, batch: total(model, batch) * float("nan"))
    assert found.verdict == "exact on the tape"
    assert "the loss is nan" in str(found)


def test_json_has_the_verdicts_and_every_field() -> None:
    found = diagnosed(reading, ["cheap", "recompute"])
    data = json.loads(found.to_json())
    assert data["verdict"] == "exact by fall-back"
    assert data["is_exact"] is True
    assert [row["verdict"] for row in data["rows"]] == ["exact by fall-back"] * 2
    assert data["rows"][1]["reasons"][0]["blocks"] == ["layers.0", "layers.1", "layers.2"]
    assert data["rows"][1]["measured_peak_bytes"] == found.rows[1].measured_peak_bytes


# -- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": ["cheep"]}, "did you mean 'cheap'"),
        ({"modes": ["none"]}, "nothing to try"),
        ({"modes": "cheap"}, "must be a list of modes"),
        ({"modes": []}, "must be a list of modes"),
        ({"blocks": ["layer.*"]}, "No module matches"),
        ({"loss_fn": lambda model, batch: model(*batch).sum() * torch.ones(2)}, "grad can be implicitly created"),
    ],
)
def test_arguments_that_make_no_sense_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, RuntimeError), match=message):
        diagnosed(plain, **options)


def test_a_model_that_nothing_can_be_learnt_of_is_refused() -> None:
    model = Stack(plain).requires_grad_(False)
    with pytest.raises(UsageError, match="Nothing is trained"):
        tapeline.diagnose(model, BATCH, loss_fn=total)
    model.requires_grad_(True)
    plan = tapeline.plan(model, BATCH, mode="cheap", loss_fn=total, blocks=["layers.*"])
    with tapeline.apply(model, plan, measure=False), pytest.raises(UsageError, match="is in force on this model"):
        tapeline.diagnose(model, BATCH, loss_fn=total)


# -- afterwards ----------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """Running statistics, dropout, a draw from each generator, and a weight that the forward itself changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout()) for _ in range(2)])
        self.centre = nn.Parameter(torch.zeros(8), requires_grad=False)
        self.register_buffer("seen", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.centre += 1
        self.seen = x.detach().clone()
        x = x * (1 + random.random() + np.random.random())
        for layer in self.layers:
            x = layer(x)
        return (x - self.centre).pow(2).mean()


def photograph(model: nn.Module) -> dict[str, Any]:
    """All that must be as before, by value and by identity."""
    tensors = {n: (id(t), t.clone()) for n, t in (*model.named_parameters(), *model.named_buffers())}
    return {
        "tensors": {name: (which, value.tolist()) for name, (which, value) in tensors.items()},
        "gradients": {
            n: None if p.grad is None else (id(p.grad), p.grad.tolist()) for n, p in model.named_parameters()
        },
        "flags": [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
        "managed": managed_module(model),
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
    }


@pytest.mark.parametrize(
    ("failing", "error"), [(0, None), (1, ValueError), (2, KeyboardInterrupt), (4, KeyboardInterrupt), (5, ValueError)]
)
def test_afterwards_the_model_is_as_before(failing: int, error: type[BaseException] | None) -> None:
    """Also if a step fails: untouched, while planning, or under a plan."""
    model, x = Normed().eval(), torch.randn(6, 8)
    model.layers[1].train()
    model.layers[0][0].weight.grad = torch.ones(8, 8)
    before = photograph(model)
    calls = 0

    def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = model(x)
        if calls == failing:
            raise error("on purpose")
        return loss

    is_row = failing > 2 and error is ValueError
    if error is None or is_row:
        found = tapeline.diagnose(model, x, modes=["recompute", "cheap"], loss_fn=loss_fn, blocks=["layers.*"])
        assert [bool(row.error) for row in found.rows] == [is_row, False]
        assert is_row or found.verdict == "exact on the tape"
    else:
        with pytest.raises(error, match="on purpose"):
            tapeline.diagnose(model, x, modes=["recompute"], loss_fn=loss_fn, blocks=["layers.*"])
    assert photograph(model) == before


def test_the_reference_makes_no_cache_and_the_configuration_stays() -> None:
    model, seen = tiny("llama"), []
    assert model.config.use_cache
    model.model.register_forward_hook(lambda module, args, out: seen.append(out.past_key_values))
    found = tapeline.diagnose(model, token_ids(1, 8), modes=["cheap"])
    assert found.is_exact
    assert model.config.use_cache is True
    num_real = 2 + 3
    assert len(seen) > num_real
    assert seen[:2] == [None, None]
    assert seen[-3:] == [None, None, None]


def test_it_works_under_no_grad_and_leaves_it_on() -> None:
    with torch.no_grad():
        assert diagnosed(plain, ["cheap"]).is_exact
        assert not torch.is_grad_enabled()
