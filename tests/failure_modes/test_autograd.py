"""Autograd as people call it: tensors in keyword arguments, inputs without gradients, second backwards, parts of a graph, several graphs.

Each case runs on a managed model, or on one whose blocks are called through `tapeline.checkpoint`, and on an untouched copy.
"""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import tapeline
from tapeline.errors import UsageError
from tests.failure_modes.surfaces import (
    SURFACES,
    WIDTH,
    Block,
    Stack,
    log_probs,
    offloading,
    plain,
    small_llama,
    total,
    twins,
)
from tests.models import assert_equal, token_batch

# -- F26: tensors in keyword arguments -----------------------------------------------------------------------------


def with_keywords(block: Block, x: torch.Tensor, *, scale: Any = None, tables: Any = None) -> torch.Tensor:
    h = F.gelu(block.up(x))
    h = h if scale is None else h * scale.exp()
    h = h if tables is None else h * tables[0].cos() + tables[1][0].sin()
    return x + F.dropout(block.down(h.sin()), 0.2, block.training)


@pytest.mark.parametrize("surface", SURFACES)
def test_f26_tensors_in_keyword_arguments_have_gradients(surface: str) -> None:
    """Also inside tuples, and in some calls only."""

    def run(model: nn.Module) -> list[torch.Tensor]:
        given = {name: torch.rand(2 * WIDTH).requires_grad_() for name in ("scale", "cos", "sin")}
        tables = (given["cos"], (given["sin"], None))
        total(model, pair.batch, scale=given["scale"], tables=tables).backward()
        total(model, pair.batch, tables=tables).backward()
        total(model, pair.batch, scale=given["scale"]).backward()
        return [tensor.grad for tensor in given.values()]

    with twins(surface, with_keywords) as pair:
        for seed in range(3):
            pair.check(run, seed)
            pair.check(seed=seed)
        pair.assert_replayed()


@pytest.mark.parametrize("surface", SURFACES)
def test_f26_a_keyword_tensor_written_before_backward_is_an_error(surface: str) -> None:
    def run(model: nn.Module) -> None:
        scale = torch.rand(2 * WIDTH)
        loss = total(model, pair.batch, scale=scale)
        scale.add_(1)
        loss.backward()

    with twins(surface, with_keywords) as pair:
        expected = pair.outcome(pair.untouched, run)
        assert isinstance(expected, dict)  # autograd saves only its exponential
        for _ in range(2):
            got = pair.outcome(pair.managed, run)
            if isinstance(got, str):
                assert "modified by an inplace operation" in got
            else:
                assert_equal(got, expected)


def test_f26_a_keyword_tensor_is_held_by_hooks_alone() -> None:
    """So that hooks can move it: neither the checkpoint nor its function holds on to the original."""
    x, scale, seen = torch.randn(3, requires_grad=True), torch.rand(3), []
    given, expected = weakref.ref(scale), torch.cos(x.detach() * scale) * scale
    with offloading(seen):
        out = tapeline.checkpoint(lambda x, scale: (x * scale).sin(), x, scale=scale)
    del scale
    assert given() is None
    assert len(seen) == 2
    out.sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("kind", ["positional", "keyword"])
def test_f30_a_checkpoint_takes_a_mask_made_in_inference_mode(kind: str) -> None:
    with torch.inference_mode():
        mask = torch.rand(3)
    x = torch.randn(3, requires_grad=True)
    args, kwargs = ((mask,), {}) if kind == "positional" else ((), {"mask": mask})
    tapeline.checkpoint(lambda x, mask: (x + mask).sin(), x, *args, **kwargs).sum().backward()
    assert torch.equal(x.grad, (x.detach() + mask).cos())


# -- F27: gradients although no input requires grad ----------------------------------------------------------------


def test_f27_reentrant_checkpointing_is_refused() -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(UsageError, match="no gradients, without an error, when no input requires grad"):
        tapeline.checkpoint(layer, torch.ones(2, WIDTH), use_reentrant=True)
    tapeline.checkpoint(layer, torch.ones(2, WIDTH), use_reentrant=False).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("surface", SURFACES)
def test_f27_gradients_although_no_input_requires_grad(surface: str) -> None:
    """Embeddings are frozen and nobody has called `enable_input_require_grads` (transformers#21381, trl#3089)."""
    with twins(surface) as pair:
        for layer in (pair.managed.layers[0], pair.untouched.layers[0]):
            layer.up.requires_grad_(False)
        assert not pair.batch.requires_grad
        pair.check()
        assert "grad.layers.0.down.weight" in pair.result(pair.managed)
        assert pair.session is None or pair.session.report().recomputed_calls == 6
        pair.assert_replayed()


@dataclass
class Output:
    hidden: torch.Tensor
    squares: torch.Tensor


@pytest.mark.parametrize("surface", SURFACES)
def test_f27_outputs_in_a_dataclass_have_gradients(surface: str) -> None:
    """Tensors that a block hands out in an object of its own (pytorch#124725)."""

    class Unpacking(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            squares: Any = 0
            for layer in self.layers:
                out = layer(x)
                x, squares = out.hidden, squares + out.squares.mean()
            return x + squares

    def body(block: Block, x: torch.Tensor) -> Output:
        h = block.up(x).sin()
        return Output(x + block.down(h.exp()), h * h)

    with twins(surface, Unpacking(body)) as pair:
        for _ in range(3):
            pair.check()


@pytest.mark.parametrize("mode", ["cheap", "recompute"])
def test_f27_a_model_set_to_reentrant_checkpointing_has_all_its_gradients_in_a_session(mode: str) -> None:
    """Under reentrant checkpointing alone, nothing below frozen embeddings is given a gradient."""
    model, batch = small_llama().train(), token_batch(2, 12)
    model.get_input_embeddings().requires_grad_(False)
    untouched = copy.deepcopy(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    model.disable_input_require_grads()
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        model(**batch)
    with tapeline.fit(model, batch, mode=mode, measure=False) as session:
        for one in (model, untouched):
            torch.manual_seed(1)
            one(**batch).loss.backward()
        assert session.report().recomputed_calls == 2
    got, expected = ({n: p.grad for n, p in one.named_parameters() if p.grad is not None} for one in (model, untouched))
    assert "model.layers.0.mlp.up_proj.weight" in expected
    assert_equal(got, expected)


# -- F28: second backwards -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("surface", SURFACES)
def test_f28_a_gradient_penalty_by_double_backward(surface: str) -> None:
    def run(model: nn.Module) -> list[torch.Tensor]:
        x = pair.batch.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        ((slope.norm(dim=-1) - 1) ** 2).mean().backward()
        return [slope, x.grad]

    with twins(surface) as pair:
        for _ in range(3):
            pair.check(run)
        pair.assert_replayed()


@pytest.mark.parametrize("surface", SURFACES)
def test_f28_a_retained_graph_runs_backward_as_often_as_asked(surface: str) -> None:
    def run(model: nn.Module) -> None:
        loss = total(model, pair.batch)
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()

    with twins(surface) as pair:
        for _ in range(3):
            pair.check(run)
        pair.assert_replayed()


@pytest.mark.parametrize("surface", SURFACES)
def test_f28_what_a_replay_starts_from_lives_as_long_as_the_graph_and_no_longer(surface: str) -> None:
    seen: list[weakref.ref[Any]] = []

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        if block.number == 0:
            seen.append(weakref.ref(x.untyped_storage()))
        return plain(block, x)

    with twins(surface, body) as pair:
        for _ in range(2):  # while it is recorded, and from then on
            seen.clear()
            gc.disable()
            try:
                loss = total(pair.managed, pair.batch)
                loss.backward(retain_graph=True)
                assert seen[0]() is not None
                loss.backward()
                del loss
                assert seen[0]() is None
            finally:
                gc.enable()


def test_f28_a_second_backward_through_selective_checkpointing_is_an_error() -> None:
    """A limit of torch's own: what it has cached is given out once."""
    layer, x = nn.Linear(WIDTH, WIDTH), torch.randn(2, WIDTH)
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    loss = tapeline.checkpoint(lambda v: layer(v).sin(), x, context_fn=contexts).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward an extra time"):
        loss.backward()


# -- F29: parts of a graph -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("surface", SURFACES)
def test_f29_autograd_grad_of_an_input_and_of_single_weights(surface: str) -> None:
    def run(model: nn.Module) -> list[torch.Tensor]:
        x, (first, _, last) = pair.batch.clone().requires_grad_(True), model.layers
        loss = total(model, x)
        parts = [[x], [last.down.weight], [first.up.weight, x], [last.up.bias], list(model.parameters())]
        return [grad for part in parts for grad in torch.autograd.grad(loss, part, retain_graph=True)]

    with twins(surface) as pair:
        for _ in range(3):
            pair.check(run)
        assert all(p.grad is None for p in pair.managed.parameters())
        pair.assert_replayed()


@pytest.mark.parametrize("surface", SURFACES)
def test_f29_backward_with_inputs_fills_only_those(surface: str) -> None:
    def run(model: nn.Module) -> list[torch.Tensor]:
        x, middle = pair.batch.clone().requires_grad_(True), model.layers[1]
        total(model, x).backward(inputs=[middle.up.weight, x])
        assert [name for name, p in model.named_parameters() if p.grad is not None] == ["layers.1.up.weight"]
        return [x.grad]

    with twins(surface) as pair:
        for _ in range(3):
            pair.check(run)
        pair.assert_replayed()


# -- F34: gradient accumulation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("surface", SURFACES)
def test_f34_micro_batches_of_different_shapes_accumulate_and_are_recorded_once(surface: str) -> None:
    def run(model: nn.Module) -> None:
        for part in parts:
            (total(model, part) / len(parts)).backward()

    with twins(surface) as pair:
        parts = [pair.batch, pair.batch[:1, :3], pair.batch[:3], pair.batch[..., :2, :], pair.batch, pair.batch[:1, :3]]
        pair.check(run)
        recorded = pair.session and pair.session.report().recorded_calls
        for seed in range(3):
            pair.check(run, seed)
        assert (pair.session and pair.session.report().recorded_calls) == recorded
        pair.assert_replayed()


@pytest.mark.parametrize("surface", SURFACES)
def test_f34_forwards_and_backwards_of_micro_batches_may_interleave(surface: str) -> None:
    """One forward, one backward, with two graphs in flight and the last one first."""

    def run(model: nn.Module) -> None:
        first, second = total(model, pair.batch), total(model, pair.batch[:1])
        first.backward()
        third = total(model, pair.batch[:, :2])
        third.backward()
        second.backward()

    with twins(surface) as pair:
        for seed in range(3):
            pair.check(run, seed)
        pair.assert_replayed()


# -- F35: several graphs, several models ---------------------------------------------------------------------------


def preference_loss(
    model: nn.Module, reference: nn.Module, chosen: torch.Tensor, rejected: torch.Tensor
) -> torch.Tensor:
    """DPO: two forwards of the policy and two of the reference before one backward."""
    margin = log_probs(model, chosen).sum() - log_probs(model, rejected).sum()
    with torch.no_grad():
        known = log_probs(reference, chosen).sum() - log_probs(reference, rejected).sum()
    return -F.logsigmoid(0.1 * (margin - known))


@pytest.mark.parametrize("surface", SURFACES)
def test_f35_a_policy_and_a_reference_copied_from_it_while_it_is_managed(surface: str) -> None:
    def run(model: nn.Module) -> list[torch.Tensor]:
        preference_loss(model, references[model], pair.batch, pair.batch[:3].flip(1)).backward()
        total(references[model], pair.batch).backward()  # a copy belongs to no session
        return [p.grad for p in references[model].parameters()]

    with twins(surface) as pair:
        references = {model: copy.deepcopy(model) for model in (pair.managed, pair.untouched)}
        for seed in range(3):
            pair.check(run, seed)
        assert pair.session is None or pair.session.report().recomputed_calls == 18
        pair.assert_replayed()


@pytest.mark.parametrize("surface", SURFACES)
def test_f35_two_managed_models_trained_by_one_backward(surface: str) -> None:
    """A student and a teacher that is trained too: equal blocks and shapes, their forwards interleaved."""

    def run(model: nn.Module) -> list[torch.Tensor]:
        teacher = other.managed if model is pair.managed else other.untouched
        first, second = model(pair.batch), teacher(pair.batch)
        third, fourth = model(second), teacher(first)
        ((third - fourth).pow(2).sum() + (first * second).sum()).backward()
        found = [p.grad.clone() for p in teacher.parameters()]
        teacher.zero_grad()
        return found

    with twins(surface) as pair, twins(surface) as other:
        for seed in range(3):
            pair.check(run, seed)
        pair.assert_replayed()
        other.assert_replayed()


@pytest.mark.parametrize("surface", SURFACES)
def test_f35_the_reference_is_the_policy_with_its_adapters_off(surface: str) -> None:
    """They are off while two graphs wait for their backward, and on again when it runs."""

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        h = block.up(x)
        if block.has_adapter:
            h = h + 0.5 * block.adapter(F.dropout(x, 0.1, block.training))
        return x + block.down(F.gelu(h))

    def switch(model: nn.Module, *, is_on: bool) -> None:
        for layer in model.layers:
            layer.has_adapter = is_on

    def run(model: nn.Module) -> None:
        chosen, rejected = log_probs(model, pair.batch).sum(), log_probs(model, pair.batch[:3]).sum()
        switch(model, is_on=False)
        with torch.no_grad():
            reference = log_probs(model, pair.batch).sum()
        switch(model, is_on=True)
        F.softplus(chosen - rejected - reference).backward()

    model = Stack(body)
    for layer in model.layers:
        layer.adapter = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        layer.up.requires_grad_(False)
    switch(model, is_on=True)
    with twins(surface, model) as pair:
        for seed in range(3):
            pair.check(run, seed)
        pair.assert_replayed()
