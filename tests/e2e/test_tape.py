"""The facts that replaying from a tape promises, on an 8-layer Llama with adapters, on GPT-2, and under autocast."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import tapeline
from tapeline.cost.device import nominal_rates
from tapeline.cost.price import count_flops, op_class
from tapeline.ledger import RECOMPUTE, Ledger
from tapeline.planner.block import front
from tapeline.planner.policy import Policy
from tapeline.planner.schema import BlockPlan
from tapeline.runtime.blocks import find_blocks
from tapeline.runtime.install import Patches, install_blocks
from tapeline.runtime.library import Library
from tapeline.runtime.predict import FakeStep
from tapeline.runtime.step import track_training_state
from tapeline.table import text_table
from tapeline.tape.graph import Tape
from tapeline.tape.options import block_graph
from tapeline.tape.program import Recipe
from tapeline.units import format_bytes, format_flops
from tests.models import TinyModel

CPU = torch.device("cpu")
MODES = ("cheap", "recompute", "least")


def tokens(batch_size: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, vocabulary, (batch_size, length))
    return {"input_ids": ids, "labels": ids}


def llama_lora(num_layers: int = 8, length: int = 512, batch_size: int = 4, lora_dropout: float = 0.0) -> TinyModel:
    """Adapters on every linear layer of a bf16 model, as in the sketch that the tape began with."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=1000,
        use_cache=False,
    )
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", lora_dropout=lora_dropout))
    model.enable_input_require_grads()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return TinyModel(model, tokens(batch_size, length, 1000))


def gpt2() -> TinyModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=6, n_embd=256, n_head=4, vocab_size=1000, n_positions=256, use_cache=False)
    assert config.resid_pdrop == config.attn_pdrop == 0.1
    return TinyModel(GPT2LMHeadModel(config), tokens(4, 256, 1000))


# -- measuring -----------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """One step under the ledger."""

    peak_bytes: int
    weight_bytes: int
    flops: int
    num_replayed: dict[str, int]
    """Replayed ops by class."""
    result: dict[str, torch.Tensor]

    @property
    def activation_bytes(self) -> int:
        return self.peak_bytes - self.weight_bytes


def measured(tiny: TinyModel) -> Measured:
    """A step under the same ledger for everybody, with bytes, operations and what was replayed."""
    flops, replayed = 0, dict.fromkeys(("matmul", "attention", "other", "memory"), 0)

    def observe(func: Any, args: Any, kwargs: Any, out: Any, span: Any) -> None:
        nonlocal flops
        flops += count_flops(func, args, kwargs, out)
        if span.phase == RECOMPUTE:
            replayed[op_class(func)] += 1

    tiny.model.zero_grad(set_to_none=True)
    ledger = Ledger(observe=observe)
    track_training_state(ledger, tiny.model, None)
    ledger.track(tiny.batch.values(), "batch")
    ledger.begin_window()
    weights = ledger.live_bytes()
    gc.disable()
    try:
        torch.manual_seed(tiny.seed)
        with ledger:
            loss = tiny.loss_fn(tiny.model, tiny.batch)
            loss.backward()
    finally:
        gc.enable()
    result = {n: p.grad.clone() for n, p in tiny.model.named_parameters() if p.grad is not None}
    result |= {"loss": loss.detach(), "random state": torch.get_rng_state()}
    return Measured(ledger.peak_bytes(), weights, flops, replayed, result)


def gradients(tiny: TinyModel) -> dict[str, torch.Tensor]:
    """The untouched step, without a ledger."""
    tiny.model.zero_grad(set_to_none=True)
    torch.manual_seed(tiny.seed)
    loss = tiny.loss_fn(tiny.model, tiny.batch)
    loss.backward()
    result = {n: p.grad.clone() for n, p in tiny.model.named_parameters() if p.grad is not None}
    return result | {"loss": loss.detach(), "random state": torch.get_rng_state()}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(got[name], expected[name])]


def checkpointed(tiny: TinyModel) -> Measured:
    """Torch's own checkpoint, switched on by transformers."""
    tiny.model.activation_checkpointing_enable()
    try:
        return measured(tiny)
    finally:
        tiny.model.activation_checkpointing_disable()


def under(tiny: TinyModel, mode: str) -> tuple[Measured, list[Recipe]]:
    """The second step under a mode, and the recipes that were made on the way."""
    plan = tapeline.plan(tiny.model, tiny.batch, mode=mode)
    session = tapeline.apply(tiny.model, plan, measure=False)
    try:
        gradients(tiny)
        found = measured(tiny)
        assert abs(plan.peak_bytes / found.peak_bytes - 1) < 0.02
        return found, list(session._library._recipes.values())
    finally:
        session.remove()


def show(title: str, rows: dict[str, Measured]) -> None:
    header = (title, "peak", "beside weights", "FLOPs", "matmuls replayed", "attention replayed")
    cells = [
        (
            name,
            format_bytes(row.peak_bytes),
            format_bytes(row.activation_bytes),
            format_flops(row.flops),
            str(row.num_replayed["matmul"]),
            str(row.num_replayed["attention"]),
        )
        for name, row in rows.items()
    ]
    print("\n" + text_table(header, cells))


# -- the sketch's case ---------------------------------------------------------------------------------------------


@functools.cache
def sketch_rows() -> tuple[dict[str, Measured], dict[str, list[Recipe]]]:
    """The sketch's model, untouched, under torch's checkpoint and under each mode."""
    torch.set_num_threads(1)
    tiny = llama_lora()
    rows = {"untouched": measured(tiny), "torch's checkpoint": checkpointed(tiny)}
    recipes = {}
    for mode in MODES:
        rows[mode], recipes[mode] = under(tiny, mode)
    show("8-layer Llama with LoRA, 4 x 512", rows)
    return rows, recipes


@pytest.mark.parametrize("mode", MODES)
def test_the_gradients_of_the_sketch_are_exact(mode: str) -> None:
    rows, _ = sketch_rows()
    assert_same(rows[mode].result, rows["untouched"].result)


def test_cheap_holds_little_and_replays_no_product() -> None:
    rows, recipes = sketch_rows()
    assert recipes["cheap"]
    for recipe in recipes["cheap"]:
        tape, choice = recipe.tape, recipe.choice
        made = [value for value in choice.held if tape.values[value].producer is not None]
        held_bytes = sum(recipe.graph.values[value].num_bytes for value in made)
        share = held_bytes / tape.saved_bytes()
        print(f"\ncheap holds {share:.1%} of {format_bytes(tape.saved_bytes())}: ", end="")
        print(", ".join(f"{tape.values[v].base}" for v in sorted(made)))
        assert share <= 0.30
        assert choice.num_costly == 0
        assert choice.replay_flops == 0
    assert rows["cheap"].num_replayed["matmul"] == rows["cheap"].num_replayed["attention"] == 0
    assert rows["cheap"].flops == rows["untouched"].flops


def test_recompute_needs_no_more_than_the_checkpoint_of_torch() -> None:
    rows, _ = sketch_rows()
    assert rows["recompute"].peak_bytes <= rows["torch's checkpoint"].peak_bytes
    assert rows["recompute"].flops <= rows["torch's checkpoint"].flops


def test_least_needs_three_quarters_of_recompute() -> None:
    rows, _ = sketch_rows()
    assert rows["least"].activation_bytes <= 0.75 * rows["recompute"].activation_bytes


@pytest.mark.parametrize("make", [functools.partial(llama_lora, 4, 512, 4, 0.1), gpt2], ids=["lora_dropout", "gpt2"])
def test_with_dropout_recompute_needs_no_more_than_the_checkpoint_of_torch(make: Callable[[], TinyModel]) -> None:
    tiny = make()
    rows = {"untouched": measured(tiny), "torch's checkpoint": checkpointed(tiny)}
    for mode in MODES:
        rows[mode], _ = under(tiny, mode)
    show(type(tiny.model).__name__, rows)
    for mode in MODES:
        assert_same(rows[mode].result, rows["untouched"].result)
    assert rows["recompute"].peak_bytes <= rows["torch's checkpoint"].peak_bytes
    assert rows["recompute"].flops <= rows["torch's checkpoint"].flops
    assert rows["cheap"].num_replayed["matmul"] == rows["cheap"].num_replayed["attention"] == 0
    assert rows["least"].peak_bytes <= rows["recompute"].peak_bytes


@pytest.mark.parametrize("mode", MODES)
def test_a_session_measures_the_same(mode: str) -> None:
    tiny = gpt2()
    plan = tapeline.plan(tiny.model, tiny.batch, mode=mode)
    with tapeline.apply(tiny.model, plan, measure=False) as session:
        gradients(tiny)
        found = measured(tiny)
        tiny.model.zero_grad(set_to_none=True)
        with session.measure():
            tiny.loss_fn(tiny.model, tiny.batch).backward()
    assert session.last_peak_bytes == pytest.approx(found.peak_bytes, rel=0.002)


# -- the front -----------------------------------------------------------------------------------------------------


def uniform(model: nn.Module, names: list[str], policy: Policy) -> list[BlockPlan]:
    return [
        BlockPlan(
            name=name,
            kind=type(model.get_submodule(name)).__name__,
            policy=policy,
            input="device",
            held_bytes=0,
            recompute_flops=0,
        )
        for name in names
    ]


def recorded(tiny: TinyModel, names: list[str], step: FakeStep) -> Tape:
    """The tape of a block, which all blocks of the model have."""
    step.record(uniform(tiny.model, names, Policy(price=0.0)))
    tapes = [known.tape for r in step.library.blocks.values() for known in r.classes.values()]
    assert len({tape.digest for tape in tapes if tape is not None}) == 1
    assert tapes[0] is not None
    return tapes[0]


def check_front(tiny: TinyModel, *, min_points: int) -> None:
    expected = gradients(tiny)
    names = find_blocks(tiny.model)
    step = FakeStep(tiny.model, tiny.batch, names)
    tape = recorded(tiny, names, step)
    rows, cells, failed = front(block_graph(tape, nominal_rates(CPU))), [], []
    for policy, choice in rows:
        blocks = uniform(tiny.model, names, policy)
        predicted = step.run(blocks)
        patches, library = Patches(), Library(nominal_rates(CPU))
        try:
            install_blocks(patches, tiny.model, blocks, library)
            gradients(tiny)
            found = measured(tiny)
        finally:
            patches.undo()
        assert_same(found.result, expected)
        error = predicted.peak_bytes / found.peak_bytes - 1
        if abs(error) > 0.02:
            failed.append((policy, predicted.peak_bytes, found.peak_bytes))
        cells.append(
            (
                f"{policy.price:.1e}{' cheap' if policy.is_cheap else ''} rerun {policy.rerun:g}",
                format_bytes(choice.held_bytes),
                format_bytes(choice.working_set_bytes),
                format_flops(choice.replay_flops),
                f"{len(choice.groups)}",
                format_bytes(predicted.peak_bytes),
                format_bytes(found.peak_bytes),
                f"{error:+.2%}",
                format_flops(found.flops),
            )
        )
    header = ("policy", "held", "working set", "replayed", "phases", "predicted", "measured", "off", "FLOPs of a step")
    print(f"\n{len(tape.ops)} ops, {format_bytes(tape.saved_bytes())} saved by a block\n" + text_table(header, cells))
    assert not failed
    assert len(rows) >= min_points


def test_every_point_of_the_front_is_predicted_and_exact_in_two_layers() -> None:
    check_front(llama_lora(2, 128), min_points=8)


@pytest.mark.slow
def test_every_point_of_the_front_is_predicted_and_exact() -> None:
    check_front(llama_lora(), min_points=8)


@pytest.mark.slow
def test_every_point_of_the_front_is_predicted_and_exact_with_dropout() -> None:
    check_front(gpt2(), min_points=5)


# -- autocast with master weights ----------------------------------------------------------------------------------


def wide_llama() -> TinyModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        use_cache=False,
    )
    return TinyModel(LlamaForCausalLM(config), tokens(2, 48, 100))  # no activation has the shape of a weight


def autocast_loss(tiny: TinyModel, model: nn.Module) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return tiny.loss_fn(model, tiny.batch)


@pytest.mark.parametrize("mode", MODES)
def test_casts_of_master_weights_do_not_live_until_backward(mode: str) -> None:
    tiny = wide_llama()
    names = find_blocks(tiny.model)
    linears = [
        part for name in names for part in tiny.model.get_submodule(name).modules() if isinstance(part, nn.Linear)
    ]
    cast_bytes = sum(2 * part.weight.numel() for part in linears)

    def after_forward() -> tuple[int, set[int]]:
        """Live bytes between forward and backward, and sizes of live bf16 tensors that look like weights."""
        tiny.model.zero_grad(set_to_none=True)
        ledger = Ledger()
        track_training_state(ledger, tiny.model, None)
        with ledger:
            loss = autocast_loss(tiny, tiny.model)
        live = ledger.live_bytes()
        shapes = {tuple(part.weight.shape) for part in linears}
        copies = [a for _, a in ledger._live.values() if a.dtype == "bfloat16" and a.category is None]
        loss.backward()
        return live, {a.num_bytes for a in copies if a.shape in shapes or a.shape[::-1] in shapes}

    untouched, casts = after_forward()
    assert casts, "autograd keeps them where nothing is dropped"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = tapeline.plan(tiny.model, tiny.batch, mode=mode)
    with tapeline.apply(tiny.model, plan, measure=False):
        autocast_loss(tiny, tiny.model).backward()
        managed, casts = after_forward()
    print(
        f"\n{mode}: {format_bytes(managed)} between forward and backward, {format_bytes(untouched)} untouched", end=""
    )
    assert not casts
    assert untouched - managed > cast_bytes


@pytest.mark.parametrize("mode", MODES)
def test_optimizer_steps_under_autocast_are_those_of_an_untouched_copy(mode: str) -> None:
    tiny = wide_llama()
    copied = copy.deepcopy(tiny.model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = tapeline.plan(tiny.model, tiny.batch, mode=mode)
    with tapeline.apply(tiny.model, plan, measure=False):
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (tiny.model, copied)]
        for number in range(4):
            losses = []
            for model in (tiny.model, copied):
                torch.manual_seed(number)
                loss = autocast_loss(tiny, model)
                loss.backward()
                losses.append(loss.detach())
            pairs = zip(tiny.model.named_parameters(), copied.parameters(), strict=True)
            assert not [name for (name, ours), other in pairs if not torch.equal(ours.grad, other.grad)]
            assert torch.equal(*losses)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert all(
        torch.equal(ours, other) for ours, other in zip(tiny.model.parameters(), copied.parameters(), strict=True)
    )
