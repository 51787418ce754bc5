"""Rows F55 to F58: storages seen through many tensors, addresses used again, transposes, and layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tapeline.ledger import Ledger
from tests.failure_modes.twins import MODES, WIDTH, Block, Body, Stack, Twins, twins

INPUT = 4 * 6 * WIDTH * 4
INSIDE = 2 * INPUT
DEPTH = 3
hidden: dict[str, Any] = {}
"""What blocks look at beside their arguments."""


@pytest.fixture(autouse=True)
def _nothing_hidden() -> Iterator[None]:
    hidden.clear()
    yield
    hidden.clear()


def held_bytes(pair: Twins) -> int:
    """What is alive after a forward, beside weights, batch, loss and the output of the last block."""
    ledger = Ledger()
    with ledger:
        ledger.track([*pair.managed.parameters(), *pair.managed.buffers(), *pair.batch], "weights")
        before = ledger.live_bytes()
        loss = pair.loss(pair.managed)
        ledger.track([torch.zeros(1)], "other")  # seen, and gone
        return ledger.live_bytes() - before - loss.nbytes - INPUT


def saved_by(loss: torch.Tensor, kind: str) -> list[torch.Tensor]:
    """The tensor that each node of a kind saves as its input, newest first."""
    nodes, stack = {}, [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and id(node) not in nodes:
            nodes[id(node)] = node
            stack += [before for before, _ in node.next_functions]
    return [node._saved_self for node in nodes.values() if node.name() == kind]


# -- F55: one storage, many tensors --------------------------------------------------------------------------------


def in_parts(block: Block, x: torch.Tensor) -> torch.Tensor:
    """Backward asks for eight views of what `up` makes; `down` takes something else."""
    one, two, three, four = block.up(x).chunk(4, -1)
    parts = [one.sin(), two.sin(), three.exp().log(), four.cos(), one.cos() + two.sin() + three.sin() + four.sin()]
    return x + block.down(torch.cat([*parts[:3], parts[3] * parts[4]], -1))


@pytest.mark.parametrize("mode", ["cheap", "recompute"])
def test_f55_a_storage_is_held_once_however_many_tensors_look_at_it(mode: str) -> None:
    expected = {"cheap": INPUT + INSIDE, "recompute": INPUT}
    with twins(in_parts, mode) as pair:
        for seed in range(2):
            pair.check(seed=seed)
        assert held_bytes(pair) == DEPTH * expected[mode]
        pair.check_on_tape()


def test_f55_a_storage_is_counted_once_on_the_tape() -> None:
    """Of what the block makes: what `up` gives, one exp, its log's argument is the same, two factors, and the cat."""
    with twins(in_parts, "recompute") as pair:
        pair.check()
        tapes = [recipe.tape for recipe in pair.recipes]
        storages = {tape.values[p.value].storage for tape in tapes[:1] for p in tape.packs if _is_made(tape, p.value)}
        assert len(storages) < sum(_is_made(tapes[0], pack.value) for pack in tapes[0].packs)
        assert {tape.saved_bytes() for tape in tapes} == {INSIDE + 3 * INSIDE // 4 + INSIDE}


def _is_made(tape: Any, value: int) -> bool:
    return tape.values[value].producer is not None


def test_f55_views_that_are_replayed_come_back_as_views_of_one_storage() -> None:
    with twins(in_parts, "recompute") as pair:
        pair.check()
        replayed = saved_by(pair.loss(pair.managed), "CosBackward0")[:2]
        assert len({tensor.untyped_storage()._cdata for tensor in replayed}) == 1
        assert replayed[0].storage_offset() != replayed[1].storage_offset()
        pair.check_on_tape()


# -- F56: an address used again ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_f56_a_storage_at_the_address_of_a_dead_one_is_another(mode: str) -> None:
    addresses: list[int] = []

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        h = block.up(x)
        for _ in range(4):
            passing = (h.detach() * 0.5).cos()  # dies in each round
            addresses.append(passing.untyped_storage()._cdata)
            h = (h * 1.1 + passing).sin()
            del passing
        return x + block.down(h.exp())

    with twins(body, mode) as pair:
        for seed in range(3):
            pair.check(seed=seed)
        pair.check_on_tape()
    assert len(set(addresses[: 4 * DEPTH])) < 4 * DEPTH


def test_f56_the_ledger_does_not_take_a_new_storage_for_the_dead_one_at_its_address() -> None:
    pointers = set()
    with Ledger() as ledger:
        for size in (64, 32, 64, 16) * 4:
            tensor = torch.zeros(size)
            pointers.add(tensor.untyped_storage()._cdata)
            assert ledger.live_bytes() == 4 * size
            del tensor
    assert len(pointers) < 16


# -- F57: a transpose of the same shape ----------------------------------------------------------------------------

SQUARE = (torch.linspace(-1, 1, 16 * WIDTH).view(2, 8, WIDTH),)


def both_ways(block: Block, x: torch.Tensor) -> torch.Tensor:
    """A square matrix, of which backward needs the matrix and its transpose."""
    h = block.up(x.flatten(0, 1)).sin()
    assert h.shape == h.t().shape
    return x + block.down(torch.mm(h.t(), torch.mm(h, h.t()).cos()).sin()).view_as(x)


def only_transposed(block: Block, x: torch.Tensor) -> torch.Tensor:
    """Backward needs the transpose of the matrix, and something that is made of the matrix itself."""
    h = block.up(x.flatten(0, 1))
    return x + block.down(torch.mm(h.relu(), h.t()) + h.relu().exp()).view_as(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("body", [both_ways, only_transposed])
def test_f57_a_square_matrix_and_its_transpose_are_told_apart(body: Body, mode: str) -> None:
    with twins(body, mode, SQUARE) as pair:
        for seed in range(3):
            pair.check(seed=seed)
        pair.check_on_tape()
        seen = {pack.geometry.stride for recipe in pair.recipes for pack in recipe.tape.packs}
        assert {(16, 1), (1, 16)} <= seen


@pytest.mark.parametrize("mode", MODES)
def test_f57_a_call_that_saves_the_transpose_instead_is_recovered(mode: str) -> None:
    """The same shapes, the same number of nodes; only the strides tell."""

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        h = block.up(x.flatten(0, 1)).sin()
        h = (h.transpose(0, hidden.get("dim", 0)) * 1.5).sin()
        return x + block.down(h.cos()).view_as(x)

    with twins(body, mode, SQUARE) as pair:
        pair.check()
        hidden["dim"] = 1
        pair.check()
        assert "differed from the tape" in pair.reasons


@pytest.mark.parametrize("mode", MODES)
def test_f57_a_transposed_input_of_the_same_shape_is_another_class_of_calls(mode: str) -> None:
    """No saved tensor shows it: the block copies its input first, and what is replayed starts from the input itself."""

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        return x + block.down(block.up(x.exp().contiguous()).sin())

    class Plain(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    square = torch.randn(WIDTH, WIDTH)
    with twins(Plain(body), mode, (square,)) as pair:
        for batch in (square, square.t(), square.clone(), square.t()):
            pair.batch = (batch,)
            pair.check()
        pair.check_on_tape()


# -- F58: layouts --------------------------------------------------------------------------------------------------


def expanded(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x).mean((0, 1), keepdim=True).exp().expand(4, 6, -1)
    return x + b.down((b.up(x).sin() * h).cos() * h)


def sliced(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x).exp()
    return x + b.down(torch.cat([h[..., ::2].sin() * h[..., 1::2], h.flip(-1)[..., 3:11].cos()], -1))


def permuted(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x).sin().permute(2, 0, 1)
    return x + b.down((h.exp() * h).transpose(1, 2).permute(2, 1, 0).cos())


def overlapping(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x).sin().flatten(1).unfold(1, 24, 12)
    return x + b.down((h.exp() * h).mean((1, 2))[:, None, None] * b.up(x).cos())


def written_in_part(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = torch.zeros(4, 6, 40)
    window = h.as_strided((4, 6, 16), (240, 40, 2), 3)
    window.copy_(b.up(x))
    window.exp_()
    return x + b.down(h[..., 3:35:2].sin() * h[..., 4:36:2].cos() + h.amax(-1, keepdim=True))


def spaced(b: Block, x: torch.Tensor) -> torch.Tensor:
    """Memory with gaps, written in place after backward was promised what was there."""
    h = torch.empty_strided((4, 6, 16), (240, 40, 2)).copy_(b.up(x))
    kept = h.exp()
    h.mul_(2.0).sin_()
    return x + b.down((h * kept).cos())


LAYOUTS: dict[str, Body] = {
    body.__name__: body for body in (expanded, sliced, permuted, overlapping, written_in_part, spaced)
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_f58_saved_tensors_of_any_layout_are_replayed(name: str, mode: str) -> None:
    with twins(LAYOUTS[name], mode) as pair:
        for seed in range(2):
            pair.check(seed=seed)
        pair.check_on_tape()


ARGUMENTS: dict[str, Callable[[], torch.Tensor]] = {
    "transposed": lambda: torch.randn(6, 4, WIDTH).transpose(0, 1),
    "expanded": lambda: torch.randn(1, 6, 1).expand(4, 6, WIDTH),
    "overlapping": lambda: torch.randn(40).as_strided((4, 6, WIDTH), (3, 2, 1)),
    "a part": lambda: torch.randn(5, 9, 3 * WIDTH)[1:, ::1, ::3][:, :6],
}


@pytest.mark.parametrize("mode", ["cheap", "recompute", "segments:2"])
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_f58_arguments_of_any_layout(kind: str, mode: str) -> None:
    def body(block: Block, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return x + block.down(block.up(x * other.sin()).sin() + torch.cat([other, other.exp()], -1))

    with twins(body, mode, (ARGUMENTS[kind](), ARGUMENTS[kind]())) as pair:
        for other in ("transposed", kind, kind):
            pair.batch = (ARGUMENTS[kind](), ARGUMENTS[other]())
            pair.check()
        pair.check_on_tape()


def test_f58_an_expanded_tensor_costs_its_storage_and_no_more() -> None:
    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        return block.down(block.up(x) * block.up(x.mean((0, 1))).expand(4, 6, -1))

    with twins(body, "cheap") as pair:
        pair.check()
        row = 2 * WIDTH * 4
        assert held_bytes(pair) == DEPTH * (INPUT + INSIDE + row)
        pair.check_on_tape()
