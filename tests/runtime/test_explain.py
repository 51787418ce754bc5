from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import tapeline
from tapeline.errors import UsageError
from tapeline.planner.explanation import Explanation, TapeExplanation
from tapeline.runtime.blocks import find_blocks
from tapeline.runtime.candidates import Candidates
from tapeline.runtime.predict import FakeStep
from tapeline.tape.explain import NAMED_POLICIES
from tests.models import FAMILIES, TinyModel


def explain(tiny: TinyModel, mode: str = "cheap", **options: Any) -> Explanation:
    return tapeline.explain(tiny.model, tiny.batch, mode, loss_fn=tiny.loss_fn, **options)


def narrow_lora() -> TinyModel:
    tiny = FAMILIES["llama_lora"]()
    return TinyModel(tiny.model.to(torch.bfloat16), tiny.batch)


class Residual(nn.Module):
    """A block that does something of its own between two products."""

    def __init__(self, middle: Any) -> None:
        super().__init__()
        self.first, self.second, self.middle = nn.Linear(16, 32), nn.Linear(32, 16), middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(self.middle(self.first(x)))


def stack(middle: Any, num_blocks: int = 3) -> TinyModel:
    model = nn.Sequential(*(Residual(middle) for _ in range(num_blocks)))
    return TinyModel(model, torch.randn(8, 16), loss_fn=lambda m, x: m(x).pow(2).mean())


def reason(tape: TapeExplanation, made_by: str) -> str:
    return next(row.reason for row in tape.rows if row.made_by == made_by)


@pytest.mark.parametrize(
    ("name", "mode"),
    [*(("llama", mode) for mode in NAMED_POLICIES), ("albert", "cheap"), ("unet", "recompute"), ("encoder", "least")],
)
def test_rows_add_up_to_what_the_planner_says(name: str, mode: str) -> None:
    family = FAMILIES[name]()
    explanation = explain(family, mode)
    names = find_blocks(family.model)
    candidates = Candidates(FakeStep(family.model, family.batch, names, loss_fn=family.loss_fn))
    tapes = {tape.digest: tape for tape in candidates.tapes[explanation.block]}
    assert [tape.digest for tape in explanation.tapes] == list(tapes)
    for tape in explanation.tapes:
        recorded, choice = tapes[tape.digest], candidates.step.library.recipe(tapes[tape.digest], NAMED_POLICIES[mode])
        held = [row for row in tape.rows if row.placement == "device" or row.placement.startswith("held as")]
        assert tape.held_bytes == sum(row.held_bytes for row in held) == sum(row.held_bytes for row in tape.rows)
        if mode != "none":
            assert tape.held_bytes == choice.choice.held_bytes
        assert tape.replay_flops == choice.choice.replay_flops
        assert tape.num_phases == len(choice.programs)
        assert sum(tape.replayed_ops.values()) == sum(program.num_ops for program in choice.programs)
        values = recorded.values
        made = [
            r for r in tape.rows if r.num_saved and values[r.value].source is None and not values[r.value].is_output
        ]
        assert tape.saved_bytes == sum(row.storage_bytes for row in made)
        assert tape.num_saved == sum(row.num_saved for row in tape.rows)
        counted = [row.storage for row in tape.rows if row.storage_bytes]
        assert len(counted) == len(set(counted))
        assert all(row.reason and row.placement for row in tape.rows)
        assert sum(row.is_chosen for row in tape.front) == 1


@pytest.mark.parametrize("mode", ["least", "none"])
def test_every_replayed_row_names_a_phase_that_there_is(llama: TinyModel, mode: str) -> None:
    (tape,) = explain(llama, mode).tapes
    phases = [row.placement.partition("phase")[2] for row in tape.rows if row.placement.startswith("recompute")]
    assert all(1 <= int(phase.strip("s ")) <= tape.num_phases for phase in phases if "," not in phase)
    assert bool(phases) == (mode != "none")


def test_what_is_cheap_takes_no_matrix_product_and_what_is_held_says_which(llama: TinyModel) -> None:
    (tape,) = explain(llama, "cheap").tapes
    for row in tape.rows:
        if row.placement.startswith("recompute"):
            assert row.replay_flops == 0
            assert "no matrix product" in row.reason
    assert "1 matrix product" in reason(tape, "mm")
    assert "never held" in reason(tape, "parameter 'weight'")


def test_a_value_that_is_held_in_its_narrow_dtype_says_so() -> None:
    (tape,) = explain(narrow_lora(), "cheap").tapes
    narrow = [row for row in tape.rows if row.placement == "held as bf16"]
    assert narrow
    for row in narrow:
        wide = next(other for other in tape.rows if f"%{other.value}:" in row.reason)
        assert (row.dtype, wide.dtype, row.num_saved) == ("bfloat16", "float32", 0)
        assert wide.storage_bytes == 2 * row.held_bytes
        assert wide.placement.startswith("recompute")
        assert f"replays from %{row.value} in 1 op," in wide.reason


def test_keep_and_drop_are_the_reasons_where_they_decide(llama: TinyModel) -> None:
    (tape,) = explain(llama, "recompute", keep=["mlp.act_fn"]).tapes
    assert reason(tape, "silu") == "keep=['mlp.act_fn']"
    (tape,) = explain(llama, "none", drop=["mlp.act_fn"]).tapes
    row = next(row for row in tape.rows if row.made_by == "silu")
    assert row.placement == "recompute in phase 1"
    assert row.reason.startswith("drop=['mlp.act_fn']: replays from ")


def test_an_op_that_must_not_be_replayed_is_held_and_says_why() -> None:
    (tape,) = explain(FAMILIES["unet"](), "recompute").tapes
    held = [row for row in tape.rows if "must not be replayed: it writes into a buffer" in row.reason]
    assert held
    assert all(row.placement == "device" and row.replay_ops is None for row in held)


@pytest.mark.parametrize("mode", ["none", "recompute"])
def test_dropping_what_cannot_be_made_again_is_an_error(mode: str) -> None:
    with pytest.raises(UsageError, match="cannot be made again"):
        explain(FAMILIES["unet"](), mode, drop=["native_batch_norm"])


def test_dropping_products_has_no_front_under_cheap_but_is_explained(llama: TinyModel) -> None:
    (tape,) = explain(llama, "recompute", drop=["matmul"]).tapes
    assert [row.name for row in tape.front if row.is_chosen] == ["this choice"]


def test_random_ops_replay_with_the_random_state_of_the_call() -> None:
    (tape,) = explain(stack(nn.Dropout(0.5)), "recompute").tapes
    assert any(row.reason.endswith("with the random state of the call") for row in tape.rows)


def test_a_block_without_a_tape_falls_back_and_says_why() -> None:
    tiny = stack(lambda x: x * int(torch.arange(3).sum()))
    whole = explain(tiny, "recompute")
    assert whole.tapes == ()
    assert "reads the values of tensors" in whole.reason
    assert "the whole block is run again" in str(whole)
    assert "is held" in explain(tiny, "cheap").fallback


def test_the_first_block_that_records_something_is_taken() -> None:
    tiny = stack(nn.GELU())
    tiny.model[0].requires_grad_(False)
    assert explain(tiny).block == "1"
    frozen = explain(tiny, block="0")
    assert frozen.tapes == ()
    assert frozen.reason == "autograd records nothing here"
    assert frozen.fallback == ""


def test_other_blocks_can_be_named(llama: TinyModel) -> None:
    assert explain(llama, block="model.layers.4").block == "model.layers.4"
    assert explain(llama, blocks=["model.layers.*.mlp"]).kind == "LlamaMLP"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "recomputed"}, r"did you mean 'recompute'\?\): use one of cheap, recompute, least, none"),
        ({"mode": "auto"}, "use one of cheap, recompute, least, none"),
        ({"block": "model.layer.1"}, r"No block is called 'model.layer.1' \(did you mean 'model.layers.1'\?\)"),
        ({"keep": ["self_atn"]}, r"did you mean 'self_attn'\?"),
        ({"drop": "mlp"}, "must be a list of names"),
    ],
)
def test_unknown_names_are_errors_with_the_nearest_known_one(
    llama: TinyModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        explain(llama, **options)


def test_json_has_the_same_content(llama: TinyModel) -> None:
    explanation = explain(llama, "least")
    data = json.loads(explanation.to_json())
    assert data["block"] == explanation.block
    assert [row["placement"] for row in data["tapes"][0]["rows"]] == [r.placement for r in explanation.tapes[0].rows]
    assert len(data["tapes"][0]["front"]) == len(explanation.tapes[0].front)


def test_text_has_a_line_for_every_row_and_the_front_on_demand(llama: TinyModel) -> None:
    explanation = explain(llama)
    (tape,) = explanation.tapes
    text = str(explanation)
    assert all(any(line.split()[:1] == [f"%{row.value}"] for line in text.splitlines()) for row in tape.rows)
    assert "replayed FLOPs" in text
    assert "replayed FLOPs" not in explanation.text(front=False)


def test_explaining_changes_nothing(llama: TinyModel) -> None:
    before = llama.step()
    state = torch.get_rng_state()
    explain(llama, "recompute")
    assert torch.equal(torch.get_rng_state(), state)
    after = llama.step()
    assert all(torch.equal(before[name], after[name]) for name in before)
