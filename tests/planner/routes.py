"""Small chains of stages for tests of the programmes that need no other tier."""

from __future__ import annotations

from hypothesis import strategies as st

from tapeline.planner.route import Route
from tapeline.planner.stage import Stage, StageOp

few = st.integers(min_value=0, max_value=6)
some = st.integers(min_value=1, max_value=6)
widths = st.sampled_from(
    [1, 2, 4]
)  # slots are a power of two times the largest input: small bytes are then counted exactly


def block(
    *,
    width: int = 2,
    out: int | None = None,
    middle: int = 3,
    seconds: tuple[float, float] = (1.0, 1.0),
    needs: tuple[tuple[int, ...], tuple[int, ...]] = ((0,), (1,)),
    working: tuple[int, int] = (0, 0),
    temporary: int = 0,
    gradients: int = 0,
    is_frozen: bool = False,
    can_replay: bool = True,
    held: frozenset[int] = frozenset(),
) -> Stage:
    """Two operations with a value between them; backward takes twice the time of forward."""
    out = width if out is None else out
    ops = tuple(
        StageOp(
            name=name,
            seconds=seconds[number],
            backward_seconds=2 * seconds[number],
            reads=(number,),
            makes=(number + 1,),
            needs=needs[number],
            incoming_bytes=(middle, out)[number],
            backward_bytes=width + middle if number == 0 else middle + out + working[1],
            temporary_bytes=temporary if number == 0 else working[0],
            can_replay=can_replay or number == 0,
        )
        for number, name in enumerate(("first", "second"))
    )
    return Stage(
        names=("x", "h", "y"),
        sizes=(width, middle, out),
        ops=ops,
        gradient_bytes=gradients,
        is_frozen=is_frozen,
        held=held,
    )


@st.composite
def routes(draw: st.DrawFn, max_stages: int = 4, *, is_uniform: bool = False) -> Route:
    """Up to four stages of random sizes, of which the first may be frozen."""
    count = draw(st.integers(min_value=1, max_value=max_stages))
    bounds = [draw(widths)] * (count + 1) if is_uniform else [draw(widths) for _ in range(count + 1)]
    num_frozen = draw(st.integers(min_value=0, max_value=1)) if count > 1 else 0
    stages = [
        block(
            width=bounds[place],
            out=bounds[place + 1],
            middle=draw(few),
            seconds=(draw(some), draw(some)),
            needs=(draw(st.sampled_from([(0,), (0, 1), ()])), draw(st.sampled_from([(1,), (0, 1), ()]))),
            working=(draw(few), draw(few)),
            temporary=draw(few),
            gradients=draw(few),
            is_frozen=place < num_frozen,
            held=frozenset({1}) if draw(st.integers(min_value=0, max_value=5)) == 5 else frozenset(),
            can_replay=draw(st.integers(min_value=0, max_value=5)) < 5,
        )
        for place in range(count)
    ]
    if is_uniform:
        stages = [stages[0]] * num_frozen + [stages[-1]] * (count - num_frozen)
    return Route(
        stages=tuple(stages),
        loss_seconds=1.0,
        loss_bytes=draw(few),
        base_bytes=draw(few),
        optimizer_bytes=draw(few),
        optimizer_seconds=1.0,
        keeps_gradients=draw(st.booleans()),
    )
