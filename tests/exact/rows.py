"""The axes of the matrix, the rows that cover them, and how a row becomes a model, a batch and a step."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.exact.families import FAMILIES, Batch
from tests.exact.parts import ADAPTERS, choose_trained, quantise

MODES = ("cheap", "recompute", "least", "segments:2")
AXES: dict[str, tuple[Any, ...]] = {
    "attention": ("sdpa", "sdpa math", "eager"),
    "experts": ("grouped_mm", "batched_mm", "eager"),
    "batch": (2, 1),
    "length": ("long", "short"),
    "mask": ("ones", "padded", "none"),
    "dropout": (0.0, 0.1),
    "precision": ("fp32", "bf16", "autocast"),
    "accumulation": (1, 2),
    "trained": ("all", *ADAPTERS, "first half", "last half", "embeddings", "norms"),
    "base": ("plain", "bnb 4-bit", "bnb 8-bit", "torchao int8", "torchao int4"),
}
Pair = tuple[int, Any, int, Any]
"""Two axes and a value of each."""
NONE = "-"
"""The value of an axis that a family does not have."""


class Row(NamedTuple):
    """One way to train one family."""

    family: str
    mode: str
    attention: str
    experts: str
    batch: int
    length: str
    mask: str
    dropout: float
    precision: str
    accumulation: int
    trained: str
    base: str

    def __str__(self) -> str:
        return ",".join(str(value) for value in self if value != NONE)


def values_of(family: str) -> list[tuple[Any, ...]]:
    """The values that each axis has in a family."""
    lacks = FAMILIES[family].lacks
    return [
        (NONE,) if axis in lacks else tuple(v for v in values if f"{axis}={v}" not in lacks)
        for axis, values in AXES.items()
    ]


def is_possible(values: tuple[Any, ...]) -> bool:
    """Quantised weights are trained through adapters."""
    named = dict(zip(AXES, values, strict=True))
    if named["base"] in ("plain", NONE):
        return True
    return named["trained"] in ADAPTERS and named["trained"] not in ("dora", "prefix")


def pairs(values: tuple[Any, ...]) -> list[Pair]:
    return [(i, values[i], j, values[j]) for i, j in itertools.combinations(range(len(values)), 2)]


def covering_rows(num_candidates: int = 200) -> Iterator[Row]:
    """Every family in every mode; the other axes so that each possible pair of their values comes up early and often."""
    chance = random.Random(0)
    seen: Counter[Pair] = Counter()
    holders = Counter(
        (axis, value) for family in FAMILIES for axis, values in enumerate(values_of(family), 1) for value in values
    )

    def worth(pair: Pair) -> float:
        """More for what has come up less, and for what fewer families have."""
        i, one, j, other = pair
        return 1 / ((1 + seen[pair]) ** 3 * min(holders.get((i, one), 99), holders[j, other]))

    for mode, family in itertools.product(MODES, FAMILIES):
        choices = values_of(family)
        drawn = (tuple(chance.choice(values) for values in choices) for _ in range(num_candidates))
        candidates = [(mode, *values) for values in drawn if is_possible(values)]
        best = max(candidates, key=lambda one: sum(map(worth, pairs(one))))
        seen.update(pairs(best))
        yield Row(family, *best)
    for family in FAMILIES:
        for values in rows_with_every_pair(family):
            if not all(map(seen.__contains__, pairs(values))):
                seen.update(pairs(values))
                yield Row(family, *values)


def covering_rows_of(family: str) -> Iterator[Row]:
    """Rows in which every possible pair of values comes up within one family."""
    choices = [MODES, *values_of(family)]
    possible = {pair for values in rows_with_every_pair(family) for pair in pairs(values)}
    chance = random.Random(family)
    while possible:
        start = chance.choice(sorted(possible, key=repr))
        drawn = ([chance.choice(values) for values in choices] for _ in range(150))
        candidates = []
        for values in drawn:
            values[start[0]], values[start[2]] = start[1], start[3]
            if is_possible(tuple(values[1:])):
                candidates.append(tuple(values))
        best = max(candidates, key=lambda one: len(possible.intersection(pairs(one))))
        possible -= set(pairs(best))
        yield Row(family, *best)


def rows_with_every_pair(family: str) -> Iterator[tuple[Any, ...]]:
    """Each possible pair of values with the first possible rest, the mode included."""
    choices = [MODES, *values_of(family)]
    for (i, ones), (j, others) in itertools.combinations(list(enumerate(choices)), 2):
        for one, other in itertools.product(ones, others):
            narrowed = [(one,) if k == i else (other,) if k == j else values for k, values in enumerate(choices)]
            found = next((row for row in itertools.product(*narrowed) if is_possible(row[1:])), None)
            if found is not None:
                yield found


def build(row: Row) -> tuple[nn.Module, Batch]:
    """The model as the row trains it, and its batch."""
    torch.manual_seed(0)
    family = FAMILIES[row.family]
    model: Any = family.model()
    if row.attention != NONE:
        model.set_attn_implementation(row.attention.split()[0])
    if row.experts != NONE:
        model.set_experts_implementation(row.experts)
    if row.dropout != NONE:
        set_dropout(model, row.dropout)
    switch_cache_off(model)
    batch = family.batch(2 if row.batch == NONE else row.batch, family.lengths[row.length == "short"])
    if row.precision == "bf16":
        model.bfloat16()
        batch = {n: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in batch.items()}
    if row.mask == "none":
        batch.pop("attention_mask", None)
    elif row.mask == "padded":
        batch["attention_mask"][0, -4:] = 0
    if row.base not in ("plain", NONE):
        quantise(model, row.base)
    return choose_trained(model, row.trained).train(), batch


def switch_cache_off(model: nn.Module) -> None:
    """A managed model makes no key-value cache in training; where one is made, eager attention sums in another order."""
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False


def set_dropout(model: nn.Module, p: float) -> None:
    """The same dropout in every place where a model has one."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or (name == "p" and isinstance(module, nn.Dropout))):
                setattr(module, name, p)


def forward_context(row: Row) -> AbstractContextManager[Any]:
    stack = ExitStack()
    if row.precision == "autocast":
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
    if row.attention == "sdpa math":
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    return stack


def loss_fn(model: nn.Module, batch: Batch, row: Row) -> torch.Tensor:
    with forward_context(row):
        loss: torch.Tensor = model(**batch).loss
    return loss


def step(
    model: nn.Module, batch: Batch, row: Row, measured: AbstractContextManager[Any] | None = None
) -> dict[str, Any]:
    """One optimizer step's forwards and backwards from a fixed seed; gradients, losses and the random state after it."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    losses = []
    with measured or nullcontext():
        for _ in range(row.accumulation):
            loss = loss_fn(model, batch, row) / row.accumulation
            loss.backward()
            losses.append(loss.detach())
            del loss
    result = {f"grad.{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return result | {"loss": torch.stack(losses), "random state": torch.get_rng_state()}
