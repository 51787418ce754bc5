"""Rows F59 and F60: tensors of unusual kind, and weights that are tied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.exact.families import token_ids
from tests.failure_modes.twins import MODES, WIDTH, Block, Body, Stack, tiny, transformer, twins

# -- F59: unusual kinds --------------------------------------------------------------------------------------------


def empty_part(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x)
    nothing = h[:, :0].sin().exp()
    return x + b.down(torch.cat([h.sin(), nothing.cos() * nothing], 1).exp())


def complex_numbers(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = torch.fft.rfft(b.up(x).sin(), dim=1)
    h = torch.conj_physical(h * torch.polar(b.shift, b.shift.exp())) * 1j
    return x + b.down(
        torch.fft.irfft(h.exp(), n=6, dim=1) + torch.view_as_real(h).sin().sum((-1, 1), keepdim=True)[..., 0]
    )


def scalars(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x).sin()
    scale = h.mean().exp() * torch.tensor(1.5)
    return x + b.down((h * scale).cos() / scale.sqrt())


def masks(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x)
    mask = h.detach() > 0
    rank = h.detach().argsort(-1).to(torch.uint8)
    return x + b.down(torch.where(mask, h.sin(), h.exp()) * (~mask) + h.cos() * rank)


KINDS: dict[str, Body] = {body.__name__: body for body in (empty_part, complex_numbers, scalars, masks)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", KINDS)
def test_f59_tensors_without_elements_complex_ones_scalars_and_masks(name: str, mode: str) -> None:
    with twins(KINDS[name], mode) as pair:
        for seed in range(2):
            pair.check(seed=seed)
        pair.check_on_tape()


@pytest.mark.parametrize("mode", MODES)
def test_f59_a_conjugate_that_is_only_a_bit_is_not_its_original(mode: str) -> None:
    """The first batch cannot tell them apart: its numbers have no imaginary part."""

    def body(block: Block, x: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
        h = torch.polar(block.up(x).sin().exp(), phase)
        h = (h.conj() * 2.0).exp()
        return x + block.down(h.real + h.imag)

    with twins(body, mode, (torch.randn(4, 6, WIDTH), torch.zeros(4, 6, 2 * WIDTH))) as pair:
        for phase in (0.0, 0.3):
            pair.batch = (torch.randn(4, 6, WIDTH), torch.full((4, 6, 2 * WIDTH), phase))
            pair.check()


def halves(b: Block, x: torch.Tensor) -> torch.Tensor:
    one, two = b.up(x).chunk(2, -1)
    return x + b.down(torch.cat([one.sin() * two, two.cos().exp()], -1))


@pytest.mark.parametrize("mode", MODES)
def test_f59_a_batch_without_elements(mode: str) -> None:
    with twins(halves, mode) as pair:
        for shape in ((4, 6, WIDTH), (0, 6, WIDTH), (4, 0, WIDTH), (0, 6, WIDTH)):
            pair.batch = (torch.randn(shape),)
            pair.check()
        pair.check_on_tape()


@pytest.mark.parametrize("mode", MODES)
def test_f59_a_sparse_matrix_among_the_arguments_and_a_sparse_gradient(mode: str) -> None:
    """A graph's neighbours, and an embedding whose gradient has only the rows that were asked for."""

    def body(block: Block, x: torch.Tensor, neighbours: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        h = torch.sparse.mm(neighbours, block.up(x.flatten(0, 1)).sin())
        return x + block.down((h + F.embedding(rows, block.table, sparse=True)).exp()).view_as(x)

    def gradients(model: nn.Module) -> list[torch.Tensor]:
        pair.loss(model).backward()
        tables = [layer.table.grad.coalesce() for layer in model.layers]
        assert all(grad.is_sparse for grad in tables)
        for layer in model.layers:
            layer.table.grad = None
        return [part for grad in tables for part in (grad.indices(), grad.values())]

    stack = Stack(body)
    for layer in stack.layers:
        layer.table = nn.Parameter(torch.randn(20, 2 * WIDTH))
    neighbours = (torch.rand(24, 24) * (torch.rand(24, 24) > 0.8)).to_sparse()
    with twins(stack, mode, (torch.randn(4, 6, WIDTH), neighbours, torch.randint(0, 9, (24,)))) as pair:
        for seed in range(3):
            pair.check(gradients, seed)
        assert "sparse" in pair.reasons


@pytest.mark.parametrize("mode", MODES)
def test_f59_a_random_state_among_the_arguments_passes_through(mode: str) -> None:
    """Bytes on the CPU, wherever the model is; the block itself draws from them."""

    def body(block: Block, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        h = block.up(x).sin()
        with torch.random.fork_rng():
            torch.set_rng_state(state)
            h = F.dropout(h, 0.3)
        return x + F.dropout(block.down(h.exp()), 0.3)

    with twins(body, mode, (torch.randn(4, 6, WIDTH), torch.get_rng_state())) as pair:
        for seed in range(3):
            pair.batch = (pair.batch[0], torch.Generator().manual_seed(seed).get_state())
            pair.check(seed=seed)


# -- F60: tied weights ---------------------------------------------------------------------------------------------


class Language(nn.Module):
    """Embedding and head are one parameter; two blocks share a projection, and the third has one under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, WIDTH)
        self.layers = nn.ModuleList([Block(self.body, number) for number in range(3)])
        self.layers[1].up = self.layers[0].up
        self.layers[2].other = self.layers[2].up.weight
        self.head = nn.Linear(WIDTH, 512, bias=False)
        self.head.weight = self.embed.weight

    @staticmethod
    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(block.up(x).sin())
        if block.number == 2:
            h = F.linear(F.linear(h, block.other.t()).cos(), block.up.weight).sin()
        return x + block.down(h.exp())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def language_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch)


def as_one_object(model: Any) -> None:
    assert model.head.weight is model.embed.weight


def as_one_storage(model: Any) -> None:
    model.head.weight = nn.Parameter(model.embed.weight.data)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tied", [as_one_object, as_one_storage])
def test_f60_tied_weights_are_exact_and_counted_once(tied: Callable[[Any], None], mode: str) -> None:
    batch, plans = torch.randint(0, 512, (4, 6)), mode == "recompute"
    with twins(Language(), mode, batch, loss_fn=language_loss, prepare=tied, plans=plans) as pair:
        for seed in range(2):
            pair.check(seed=seed)
        pair.check_on_tape()
        if plans:
            tensors = [*pair.managed.parameters(), *pair.managed.buffers()]
            storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
            assert len(storages) == len(tensors) - (tied is as_one_storage)
            assert pair.session.plan.memory["weights"] == sum(storages.values())
            pair.managed.zero_grad()
            with pair.session.measure():
                pair.loss(pair.managed).backward()
            deviation = pair.session.report().deviation
            assert deviation is not None
            assert abs(deviation) < 0.01


def test_f60_transformers_with_tied_embeddings() -> None:
    with transformer(tiny("llama", tie_word_embeddings=True), "recompute", token_ids(2, 24)) as pair:
        for seed in range(2):
            pair.check(seed=seed)
        assert pair.managed.lm_head.weight is pair.managed.model.embed_tokens.weight
        pair.check_on_tape()
