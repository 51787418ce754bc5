"""A tape as a stage of the planner over tiers: every operation with its cost in both directions, and the few values worth a choice.

A tape knows the forward exactly. Of the backward it knows which values each operation saved; time and gradients follow from the
operation: a matrix product has one product of the same size per operand that needs a gradient, fused attention takes two and a half
times its forward, what moves bytes moves them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tapeline.cost.price import ATTENTION, MATMUL
from tapeline.cost.rates import Rates
from tapeline.planner.block import BlockGraph, choose, front
from tapeline.planner.policy import CHEAP
from tapeline.planner.stage import Stage, StageOp
from tapeline.tape.graph import PARAMETER, Op, Source, Tape, Value, uses
from tapeline.tape.nested import leaves
from tapeline.tape.options import block_graph, is_input

_ATTENTION_BACKWARD = 2.5
_CAUSAL = 0.5
_MAX_UNITS = 8
_SMALL = 0.002
Trained = Callable[[Source], bool]
Placed = tuple[frozenset[int], frozenset[int]]


def stage_of(tape: Tape, rates: Rates, is_trained: Trained) -> Stage:
    """What one call of a block is to the planner over tiers.

    Args:
        tape: the call.
        rates: rates of the device to plan for.
        is_trained: whether a parameter requires grad.
    """
    graph = block_graph(tape, rates)
    order = _order(tape, graph)
    numbers = {value: number for number, value in enumerate(order)}
    outside = {v for v in order[1:] if tape.values[v].producer is None or (tape.values[v].is_output and v != order[-1])}
    carrying = _carrying(tape, is_trained)
    needs = _needs(tape)
    incoming, running = _gradients(tape, carrying)
    ops = [
        StageOp(
            name=_label(op),
            seconds=_forward_seconds(graph, op),
            backward_seconds=_backward_seconds(tape, op, rates, carrying),
            reads=tuple(numbers[v] for v in op.reads if v in numbers),
            makes=tuple(numbers[v] for v in op.makes if v in numbers),
            needs=tuple(numbers[v] for v in needs[op.index] if v in numbers),
            incoming_bytes=incoming[op.index],
            backward_bytes=running[op.index],
            flops=op.flops,
            can_replay=graph.steps[op.index].can_replay,
        )
        for op in tape.ops
    ]
    units, held = _units(graph, order)
    return Stage(
        names=tuple(_name(tape, value) for value in order),
        sizes=tuple(0 if value in outside else tape.values[value].num_bytes for value in order),
        ops=tuple(ops),
        halves=_halves(tape, graph),
        units=tuple(frozenset(numbers[v] for v in unit) for unit in units),
        held=frozenset(numbers[v] for v in held | outside),
    )


def placement_of(tape: Tape, rates: Rates, held: Iterable[int], moved: Iterable[int]) -> Placed:
    """A choice for a tape as the planner over tiers says it: values of the stage kept on the device, and values moved.

    Args:
        tape: the call.
        rates: as in `stage_of`.
        held: values of the tape that are held on the device, its input among them.
        moved: values that are moved.
    """
    graph = block_graph(tape, rates)
    order = _order(tape, graph)
    numbers = {value: number for number, value in enumerate(order)}
    away = frozenset(numbers[value] for value in moved if value in numbers)
    outside = {numbers[v] for v in order[1:] if tape.values[v].producer is None or tape.values[v].is_output}
    return frozenset(numbers[value] for value in held if value in numbers) | outside - away, away


def _order(tape: Tape, graph: BlockGraph) -> list[int]:
    """The values that matter: the block's own input, what it makes, its output last.

    Raises:
        ValueError: if the block has no input or no output of its own.
    """
    inputs = [v.index for v in tape.values if v.producer is None and is_input(v) and not graph.values[v.index].is_free]
    made = [v.index for v in tape.values if v.producer is not None]
    outputs = [index for index, _ in tape.outputs if index in set(made)]
    if not inputs or not outputs:
        raise ValueError("the block has no input of its own, or returns nothing that it makes")
    return [*inputs, *(value for value in made if value != outputs[0]), outputs[0]]


def _carrying(tape: Tape, is_trained: Trained) -> set[int]:
    """Values that gradients flow through."""
    found = {v.index for v in tape.values if v.producer is None and (v.requires_grad or _is_weight(v, is_trained))}
    for op in tape.ops:
        if op.has_grad and found.intersection(op.reads):
            found.update(v for v in op.makes if tape.values[v].base.dtype.is_floating_point)
    return found


def _is_weight(value: Value, is_trained: Trained) -> bool:
    return value.source is not None and value.source.kind == PARAMETER and is_trained(value.source)


def _needs(tape: Tape) -> list[list[int]]:
    """The values that the backward of each operation reads: inputs are saved before it, results after it."""
    needs: list[list[int]] = [[] for _ in tape.ops]
    for pack in tape.packs:
        after = min(pack.position, len(tape.ops) - 1)
        reads_it = pack.position < len(tape.ops) and pack.value in tape.ops[pack.position].reads
        place = after if reads_it else max(0, pack.position - 1)
        if pack.value not in needs[place]:
            needs[place].append(pack.value)
    return needs


def _forward_seconds(graph: BlockGraph, op: Op) -> float:
    return graph.steps[op.index].seconds * (_CAUSAL if _is_causal(op) else 1.0)


def _is_causal(op: Op) -> bool:
    """Fused attention under a causal mask that it knows of does half of the operations that its shapes say."""
    flags = [leaf for leaf in leaves((op.args, op.kwargs)) if isinstance(leaf, bool)]
    return op.kind == ATTENTION and any(flags)


def _backward_seconds(tape: Tape, op: Op, rates: Rates, carrying: set[int]) -> float:
    flows = [v for v in op.reads if v in carrying]
    if not flows or not carrying.intersection(op.makes):
        return 0.0
    if op.kind == ATTENTION:
        flops = _ATTENTION_BACKWARD * op.flops * (_CAUSAL if _is_causal(op) else 1.0)
        return flops / rates.attention_backward_flops + rates.op_seconds
    if op.kind == MATMUL:
        each = max(op.flops / rates.matmul_flops, op.moved_bytes / rates.memory_bytes) + rates.op_seconds
        operands = [(use.geometry or tape.values[use.value].base, use.value) for use in uses((op.args, op.kwargs))]
        return each * sum(value in carrying and len(look.shape) > 1 for look, value in operands)  # a bias takes a sum
    return op.moved_bytes / rates.memory_bytes + rates.op_seconds


def _gradients(tape: Tape, carrying: set[int]) -> tuple[list[int], list[int]]:
    """Bytes of the gradients of values that are there before and during the backward of each operation."""
    weights = {v.index for v in tape.values if v.producer is None and not is_input(v)}
    alive = {index for index, _ in tape.outputs if index in carrying}
    before, during = [0] * len(tape.ops), [0] * len(tape.ops)

    def total(values: Iterable[int]) -> int:
        return sum(tape.values[value].num_bytes for value in values)

    for op in reversed(tape.ops):
        before[op.index] = total(alive)
        if carrying.intersection(op.makes):
            flows = {v for v in op.reads if v in carrying and v not in weights}
            again = total(flows & alive)  # a second gradient of the same value, before the two are added
            alive |= flows
            during[op.index] = total(alive) + again
            alive -= set(op.makes) - set(op.reads)
        else:
            during[op.index] = before[op.index]
    return before, during


def _units(graph: BlockGraph, order: Sequence[int]) -> tuple[list[frozenset[int]], set[int]]:
    """Groups of values to place together, and the values that are held whatever is chosen.

    What replays for nothing is one group: it is worth holding only where everything is. What takes a matrix product or
    attention to make again is placed value by value; of too many, neighbours of the least bytes are joined. Values of next to no
    bytes are held.
    """
    dear = {value for policy, choice in front(graph) if not policy.keeps_all for value in choice.held}
    cheap_choice = choose(graph, CHEAP).held
    total = sum(graph.values[v].num_bytes for v in graph.saved) or 1
    must = {v for v in order[1:] if graph.values[v].must_hold}
    open_ = [v for v in order[1:] if graph.values[v].can_hold and v not in must]
    small = {v for v in open_ if graph.values[v].num_bytes < _SMALL * total}
    groups = [{v} for v in open_ if v in cheap_choice and v in dear and v not in small]
    while len(groups) > _MAX_UNITS - 1:
        sizes = [sum(graph.values[v].num_bytes for v in group) for group in groups]
        place = min(range(len(groups) - 1), key=lambda i: sizes[i] + sizes[i + 1])
        groups[place : place + 2] = [groups[place] | groups[place + 1]]
    cheap = {v for v in open_ if v in graph.saved and v not in small and not any(v in group for group in groups)}
    return [frozenset(group) for group in (*groups, cheap) if group], small | must


def _halves(tape: Tape, graph: BlockGraph) -> tuple[int, ...]:
    """Where the fewest bytes pass from one operation to the next, in the middle of the block."""
    seconds = [graph.steps[op.index].seconds for op in tape.ops]
    total, gone, best = sum(seconds), 0.0, (float("inf"), 0)
    last = {value: op.index for op in tape.ops for value in op.reads}
    first = {value: op.index for op in tape.ops for value in op.makes}
    for cut in range(1, len(tape.ops)):
        gone += seconds[cut - 1]
        passing = sum(tape.values[v].num_bytes for v, made in first.items() if made < cut <= last.get(v, -1))
        if 0.15 * total <= gone <= 0.85 * total:
            best = min(best, (passing, cut))
    return (best[1],) if best[1] else ()


def _name(tape: Tape, value: int) -> str:
    found = tape.values[value]
    if found.producer is None:
        return "input" if is_input(found) else str(found.source)
    return _label(tape.ops[found.producer])


def _label(op: Op) -> str:
    """As `keep` names operations: which attention kernel runs is the device's business."""
    return f"{op.module}.{'attention' if op.kind == ATTENTION else op.label}".strip(".")
