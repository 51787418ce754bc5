from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from tapeline.tape.graph import ARGUMENT, ATTRIBUTE, BUFFER, PARAMETER, UNKNOWN, WRITES_SOURCE, Op, Tape, Value
from tapeline.tape.record import Recorder

WIDTH = 4


class Part(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.table = torch.ones(WIDTH)
        self.run = run

    def forward(self, *args: Any) -> Any:
        return self.run(self, *args)


def record(run: Callable[..., Any], *args: Any, module: nn.Module | None = None) -> Tape:
    part = module if module is not None else Part(run)
    given = args or (torch.randn(3, WIDTH, requires_grad=True),)
    recorder = Recorder(part, given)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        recorder.pack(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), recorder:
        out = part(*given)
    return recorder.finish(out)


def names(tape: Tape) -> list[str]:
    return [op.name for op in tape.ops]


def op(tape: Tape, name: str) -> Op:
    return next(op for op in tape.ops if op.name.startswith(name))


def sources(tape: Tape, kind: str) -> list[Value]:
    return [value for value in tape.values if value.source is not None and value.source.kind == kind]


def test_views_share_the_value_and_are_no_operations() -> None:
    tape = record(lambda part, x: (x.sin().view(-1)[1:].unsqueeze(0).t() * x.sin().view(-1)[1:].unsqueeze(-1)).sum())
    assert names(tape) == ["sin.default", "sin.default", "mul.Tensor", "sum.default"]
    first, second = op(tape, "mul").reads
    assert first == tape.ops[0].makes[0]
    assert second == tape.ops[1].makes[0]
    assert op(tape, "mul").args[0].geometry.offset == 1


def test_writing_in_place_makes_a_new_value_that_every_alias_sees() -> None:
    def run(part: Part, x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        alias = y.view(-1)
        y.add_(1)
        return alias.cos()

    tape = record(run)
    sine, added, cosine = tape.ops
    assert added.writes == sine.makes
    assert cosine.reads == added.makes
    before, after = tape.values[sine.makes[0]], tape.values[added.makes[0]]
    assert after.previous == before.index
    assert after.storage == before.storage
    assert (before.is_last, after.is_last) == (False, True)


def test_sources_are_named() -> None:
    def run(part: Part, x: torch.Tensor, other: Any) -> torch.Tensor:
        return part.linear(x) * part.mean + part.table * other["a"][0] + hidden

    hidden = torch.ones(WIDTH)
    tape = record(run, torch.randn(3, WIDTH), {"a": [torch.ones(WIDTH)]})
    assert [(v.source.module, v.source.name) for v in sources(tape, PARAMETER)] == [
        ("linear", "weight"),
        ("linear", "bias"),
    ]
    assert [v.source.name for v in sources(tape, BUFFER)] == ["mean"]
    assert [v.source.name for v in sources(tape, ATTRIBUTE)] == ["table"]
    assert [v.source.place for v in sources(tape, ARGUMENT)] == [0, 1]
    assert len(sources(tape, UNKNOWN)) == 1


def test_ops_know_their_module() -> None:
    tape = record(lambda part, x: part.linear(x).sin())
    assert [op.module for op in tape.ops] == ["linear", ""]


def test_random_ops_are_flagged() -> None:
    def run(part: Part, x: torch.Tensor) -> torch.Tensor:
        y = F.dropout(x, 0.5) + torch.rand(WIDTH) + torch.empty(WIDTH).bernoulli_(0.5)
        q = y.view(1, 1, 3, WIDTH)
        first = F.scaled_dot_product_attention(q, q, q)
        return first + y.sin()

    flags = {op.name: op.is_random for op in record(run).ops}
    random = {name.split(".")[0] for name, is_random in flags.items() if is_random}
    assert random <= {"native_dropout", "rand", "bernoulli_", "bernoulli"}
    assert {"rand", "bernoulli_"} <= random
    assert not flags["sin.default"]


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(x, x.exp(), (x * scale).sin())
        return (x * weight).cos()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * ctx.saved_tensors[1], None, None


bound_early = Function.apply


@pytest.mark.parametrize("apply", [Function.apply, bound_early], ids=["attribute", "bound early"])
def test_a_function_is_one_op_that_makes_its_outputs_and_what_it_saves(apply: Any) -> None:
    tape = record(lambda part, x: apply(x.sin(), part.linear.bias, 2.0).tan())
    sine, function, _ = tape.ops
    assert function.is_function
    assert function.func is Function
    assert function.grad_flags == (True, True)
    assert [tape.values[v].output for v in function.makes] == [0, 2, 3]
    assert [pack.value for pack in tape.packs[1:4]] == [sine.makes[0], *function.makes[1:]]
    assert function.args[2] == 2.0
    assert not function.obstacle


def test_a_function_inside_another_belongs_to_it() -> None:
    class Outer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return Function.apply(x, x.detach(), 1.0)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad

    assert names(record(lambda part, x: Outer.apply(x) + 1)) == ["Outer", "add.Tensor"]


class Reads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return x * x.max().item()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None


class Draws(Reads):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return x * torch.rand_like(x)


class Writes(Reads):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *_: Any) -> torch.Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda part, x: Reads.apply(x), "reads the values"),
        (lambda part, x: Writes.apply(x * 1.0), "writes into its arguments"),
        (lambda part, x: Draws.apply(x), ""),
    ],
)
def test_obstacles_of_functions(run: Any, reason: str) -> None:
    function = next(op for op in record(run).ops if op.is_function)
    assert reason in function.obstacle
    assert bool(reason) == bool(function.obstacle)


@pytest.mark.parametrize("given", [object(), [torch.ones(WIDTH)]], ids=["object", "container"])
def test_a_function_that_is_given_what_no_tape_can_name_is_recorded_op_by_op(given: Any) -> None:
    tape = record(lambda part, x: Draws.apply(x, given).sin())
    assert names(tape) == ["rand_like.default", "mul.Tensor", "sin.default"]
    assert not tape.obstacle


def test_recording_keeps_nothing_alive_and_forgets_what_dies() -> None:
    refs: list[weakref.ref[Any]] = []

    def run(part: Part, x: torch.Tensor) -> torch.Tensor:
        y = x
        for _ in range(4):
            y = y.detach() + 1
            refs.append(weakref.ref(y.untyped_storage()))
            assert all(ref() is None for ref in refs[:-2])
        return y.sum()

    part = Part(run)
    recorder = Recorder(part, (torch.randn(3, WIDTH),))
    with recorder:
        out = part(torch.randn(3, WIDTH))
    tape = recorder.finish(out)
    del out
    assert all(ref() is None for ref in refs)
    assert len({value.storage for value in tape.values}) == len(tape.values)
    known = recorder.table._known
    assert len(known) == 4


def test_a_storage_at_the_address_of_a_dead_one_is_another() -> None:
    def run(part: Part, x: torch.Tensor) -> torch.Tensor:
        total = x.sin()
        for _ in range(8):
            total = total + (x.detach() * 2).cos()
        return total

    tape = record(run)
    made = [value for op in tape.ops for value in op.makes]
    assert len(made) == len(set(made)) == len(tape.ops)
    assert all(
        later.reads[0] == earlier.makes[0]
        for earlier, later in zip(tape.ops, tape.ops[1:], strict=False)
        if later.name == "cos.default"
    )


def test_constants_become_values_of_the_tape() -> None:
    tape = record(lambda part, x: x * torch.tensor(3.0))
    constant = tape.ops[0]
    assert constant.reads == ()
    assert torch.equal(constant.args[0], torch.tensor(3.0))
    assert op(tape, "mul").reads[1] == constant.makes[0]


def test_equal_layers_have_equal_digests() -> None:
    def run(part: Part, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(part.linear(x) * 1.5, 0.25)

    assert len({record(run).digest for _ in range(3)}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda part, x: part.linear(x) * 1.5, lambda part, x: part.linear(x) * 1.5000000000000002),
        (lambda part, x: part.linear(x).sin(), lambda part, x: part.linear(x).cos()),
        (lambda part, x: F.gelu(x), lambda part, x: F.gelu(x, approximate="tanh")),
        (lambda part, x: F.dropout(x, 0.25), lambda part, x: F.dropout(x, 0.26)),
        (lambda part, x: x * torch.tensor(1.5), lambda part, x: x * torch.tensor(1.500001)),
        (lambda part, x: x * part.mean, lambda part, x: x * part.table),
        (lambda part, x: x[:2].sin(), lambda part, x: x[1:].sin()),
        (lambda part, x: x[:2] + 1, lambda part, x: x[1:] + 1),
        (lambda part, x: x[:, :3] + 1, lambda part, x: x[:, :3].t() + 1),
        (lambda part, x: x * torch.tensor([1, 2, 3, 4]), lambda part, x: x * torch.tensor([1, 2, 4, 3])),
        (lambda part, x: x.exp() + x.exp(), lambda part, x: (y := x.exp()) + y),
    ],
    ids=[
        "number",
        "op",
        "text",
        "dropout",
        "constant",
        "source",
        "saved offset",
        "offset",
        "strides",
        "integers",
        "shared",
    ],
)
def test_what_computes_something_else_has_another_digest(one: Any, other: Any) -> None:
    assert record(one).digest != record(other).digest


def test_functions_of_one_name_have_different_digests() -> None:
    def make(factor: float) -> Any:
        class Local(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                return x * factor

            @staticmethod
            def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
                return grad * factor

        return Local

    one, other = make(1.0), make(2.0)
    assert record(lambda part, x: one.apply(x)).digest != record(lambda part, x: other.apply(x)).digest


@pytest.mark.parametrize(
    "run",
    [
        lambda part, x: x * x.detach().max().item(),
        lambda part, x: x.sin() if x.detach().sum() > 0 else x.cos(),
        lambda part, x: x * x.detach().nonzero().shape[0],
        lambda part, x: x * len(x.detach().unique()),
        lambda part, x: x * (2 if torch.equal(x, x + 1) else 3),
        lambda part, x: x * (2 if torch.allclose(x, x + 1) else 3),
        lambda part, x: x * x.detach().sum(0).tolist()[0],
        lambda part, x: x * float(x.detach().numpy().max()),
        lambda part, x: x.detach().clone().resize_(9, WIDTH)[:3] + x,
    ],
    ids=["item", "branch", "nonzero", "unique", "equal", "allclose", "tolist", "numpy", "resize"],
)
def test_a_tape_that_depends_on_data_says_so(run: Any) -> None:
    assert record(run).obstacle


@pytest.mark.parametrize(
    ("run", "what"),
    [
        (lambda part, x: part.mean.add_(x.detach().mean(0)) + x, "add_"),
        (lambda part, x: part.table.mul_(2) + x, "mul_"),
        (lambda part, x: F.batch_norm(x, part.mean, part.table, training=True), "native_batch_norm"),
        (lambda part, x: x.detach().add_(1) + x, "add_"),
    ],
    ids=["buffer", "attribute", "running statistics", "argument"],
)
def test_writing_into_what_was_given_is_an_obstacle(run: Any, what: str) -> None:
    tape = record(run)
    assert op(tape, what).obstacle == WRITES_SOURCE
    assert tape.changes_state


def test_a_generator_of_its_own_is_an_obstacle() -> None:
    generator = torch.Generator()
    tape = record(lambda part, x: x + torch.rand(WIDTH, generator=generator))
    assert "generator" in op(tape, "rand").obstacle


def test_memory_that_nobody_was_seen_to_fill_is_an_obstacle_only_where_it_is_read() -> None:
    def run(part: Part, x: torch.Tensor) -> torch.Tensor:
        seen, unseen = torch.empty_like(x), torch.empty_like(x)
        seen.copy_(x.detach())
        unseen.detach().numpy()[...] = 1
        return x * seen + unseen

    tape = record(run)
    first, second = (op for op in tape.ops if op.name.startswith("empty"))
    assert not first.obstacle
    assert "out of sight" in second.obstacle


def test_memory_that_is_filled_in_part_is_an_obstacle() -> None:
    def run(part: Part, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(3, 2 * WIDTH)
        out[:, :WIDTH] = x.detach()
        out[:, WIDTH:].numpy()[...] = 1
        return x * out[:, WIDTH:]

    assert "out of sight" in op(record(run), "empty").obstacle


def test_what_is_returned_is_marked_with_all_its_contents() -> None:
    def run(part: Part, x: torch.Tensor) -> Any:
        y = x.sin()
        z = y.clone()
        z.add_(1)
        return {"a": (y[:1],), "b": z}

    tape = record(run)
    assert [tape.values[value].is_output for op in tape.ops for value in op.makes] == [True, True, True]
    assert [geometry.shape for _, geometry in tape.outputs] == [(1, WIDTH), (3, WIDTH)]


def test_saved_tensors_are_noted_in_order_with_the_nodes_before_them() -> None:
    tape = record(lambda part, x: part.linear(x.sin()).exp())
    assert len(tape.packs) == 4
    assert [tape.values[pack.value].producer for pack in tape.packs].count(None) == 2
    nodes = [pack.nodes for pack in tape.packs]
    assert nodes == sorted(nodes)
    assert tape.num_nodes >= nodes[-1]


def test_an_argument_that_is_a_part_of_the_block_is_refused() -> None:
    part = Part(lambda part, x: x.sin())
    tape = record(part.run, part.linear.weight[:2], module=part)
    assert "shares its storage" in tape.obstacle


def test_profiling_goes_on_as_before() -> None:
    import cProfile

    profile = cProfile.Profile()
    profile.enable()
    try:
        tape = record(lambda part, x: Function.apply(x, part.linear.bias, 1.0))
    finally:
        profile.disable()
    assert "profiler" in tape.obstacle  # Functions cannot be told apart then: nothing is replayed from this tape
