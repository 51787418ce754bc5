"""Fine-tuning steps recorded by name as `tapeline.forecast` records them, with one thing more: the loss may come in chunks.

A forecast runs the model's own code, so it counts the logits of all tokens. Libraries with a fused head never hold them. Here
the same recording is made with a loss that multiplies, compares and forgets some tokens at a time; all other bytes are counted as
before, by the same ledger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from tapeline.cost.catalogue import Device
from tapeline.cost.links import links_of
from tapeline.integrations.configs import find_config
from tapeline.integrations.depth import full_size, shortened
from tapeline.integrations.peft import add_lora
from tapeline.integrations.transformers import model_without_weights, random_tokens
from tapeline.planner.hybrid import Infeasible, solve
from tapeline.planner.route import Budgets, Links, Route
from tapeline.planner.strategies import outcome
from tapeline.planner.tightest import Smallest, smallest
from tapeline.planner.timeline import Timeline
from tapeline.runtime.blocks import find_blocks
from tapeline.runtime.candidates import Candidates
from tapeline.runtime.predict import FakeStep
from tapeline.runtime.route import Whole, Workload, workload
from tapeline.runtime.step import LossFn, model_loss

STOCK, CHUNKED = "stock", "chunked"
CHUNK = 256
"""Tokens whose logits exist at once in a loss in chunks."""
DTYPE, LORA_ALPHA = "bfloat16", 16
ADAM_STATES = 2
"""Numbers that AdamW holds for each trained one."""
UNLIMITED = 2.0**60
SETTINGS = ("none", "recompute", "offload", "offload everything")
HOST_BYTES = 128 * 2**30
"""Of a well-equipped machine: what plans may take of the host where they are printed."""
PLAN, ANY_HOST, SAME_HOST, NO_HOST = "plan", "plan, any host", "plan, host of offload", "plan, no host"
"""The placements that need the least of the device: with `HOST_BYTES`, with any host, with what `offload` takes of it, with none."""
_IGNORED = -100

Point = dict[str, Any]


# -- a loss in chunks --------------------------------------------------------------------------------------------------


class ChunkedLoss(torch.autograd.Function):
    """Cross-entropy of a head without bias; gradients are made with the loss, so that no logits wait for backward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        counted = (wanted != _IGNORED).float()
        share = counted / counted.sum()
        loss = rows.new_zeros((), dtype=torch.float32)
        grad_rows = torch.empty_like(rows)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, rows.shape[0], CHUNK):
            part = slice(start, start + CHUNK)
            index, scale = wanted[part].clamp(min=0)[:, None], share[part, None]
            logs = (rows[part] @ weight.T).float().log_softmax(dim=-1)
            loss -= (logs.gather(1, index) * scale).sum()
            grad = (logs.exp_().scatter_add_(1, index, -torch.ones_like(scale)) * scale).to(rows.dtype)
            grad_rows[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ rows[part]
        ctx.save_for_backward(grad_rows.view_as(hidden), grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grads[0]), None if grad_weight is None else grad_weight.mul_(grads[0]), None


def chunked_loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The loss of a causal language model of transformers, logits of `CHUNK` tokens at a time."""
    core: Any = model
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = core.get_decoder()(**inputs, use_cache=False).last_hidden_state
    targets = torch.full_like(batch["labels"], _IGNORED)
    targets[:, :-1] = batch["labels"][:, 1:]
    loss: torch.Tensor = ChunkedLoss.apply(hidden, core.get_output_embeddings().weight, targets)
    return loss


HEADS: dict[str, LossFn] = {STOCK: model_loss, CHUNKED: chunked_loss}


# -- recording ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A step to record."""

    model: str
    length: int
    """Tokens of its one sequence."""
    lora_r: int = 0
    """Rank of the adapters on all linear layers; 0 trains all weights."""
    load_in_4bit: bool = False
    double_quant: bool = False
    """With 4 bits: the scales are quantised too."""
    head: str = STOCK
    adapters: str = "float32"
    """Their dtype; PEFT makes them float32."""

    @property
    def trained(self) -> str:
        """What is trained, in a word."""
        return "full" if not self.lora_r else "QLoRA" if self.load_in_4bit else "LoRA"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """A recorded step, good for any device."""

    case: Case
    candidates: Candidates
    whole: Whole
    num_parameters: int
    num_trainable: int

    def on(self, device: Device) -> Workload:
        """The step with the rates of a device, and the state of AdamW beside it.

        The optimizer is left out of the recording: where its step is the peak of the two recorded layers, as it is when all weights
        are trained on few tokens, `workload` takes what the step needs for state. Remove this when it tells them apart.
        """
        work = workload(self.candidates, device, DTYPE, self.whole)
        state = ADAM_STATES * self.whole.trainable_bytes
        route = replace(
            work.route,
            base_bytes=work.route.base_bytes + state,
            optimizer_seconds=work.route.optimizer_seconds * (1 + ADAM_STATES),
        )
        return replace(work, route=route, memory=work.memory | {"optimizer": state})


def record(case: Case) -> Recorded:
    """Record a step; nothing is loaded, and two layers of each kind stand for all."""
    config, kinds = shortened(find_config(case.model))
    model = model_without_weights(config, dtype=DTYPE, load_in_4bit=case.load_in_4bit, double_quant=case.double_quant)
    if case.lora_r:
        model = add_lora(model, r=case.lora_r, alpha=LORA_ALPHA, dropout=0.0, target_modules="all-linear")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, case.adapters))
    model.train()
    batch = random_tokens(model, 1, case.length)
    step = FakeStep(model, batch, find_blocks(model, None), loss_fn=HEADS[case.head])
    size = full_size(model, kinds)
    whole = Whole(layers=tuple(kinds), weight_bytes=size.weight_bytes, trainable_bytes=size.trainable_bytes)
    return Recorded(
        case=case,
        candidates=Candidates(step),
        whole=whole,
        num_parameters=size.num_parameters,
        num_trainable=size.num_trainable,
    )


# -- what a step needs -------------------------------------------------------------------------------------------------


def needs(route: Route, links: Links, plans: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """Bytes on device and host, and slowdown, of the known settings, and of the placements that need least.

    Args:
        route: the step.
        links: of the device.
        plans: which of `PLAN`, `ANY_HOST`, `SAME_HOST` and `NO_HOST` are wanted, too.
    """
    base = route.base_seconds
    found: dict[str, dict[str, float]] = {}
    for name in SETTINGS:
        known = outcome(route, name, Budgets(device=UNLIMITED), links)
        assert known.timeline is not None, "nothing is limited"
        found[name] = _row(known.device_bytes, known.timeline.host_peak, known.free_seconds / base)
    limits = {PLAN: HOST_BYTES, ANY_HOST: UNLIMITED, SAME_HOST: found["offload"]["host_bytes"], NO_HOST: 0.0}
    for name in plans:
        least = smallest(route, Budgets(device=UNLIMITED, host=limits[name]), links)
        if least is not None:
            found[name] = _placed(least.device_bytes, least.timeline, base)
    return found


def fastest(route: Route, links: Links, *, device: float, host: float = HOST_BYTES) -> dict[str, float] | None:
    """The plan for some budgets; where none fits, the one that needs least, or ``None`` if the host is too small for all."""
    try:
        plan = solve(route, Budgets(device=device, host=host), links)
    except Infeasible as answer:
        least: Smallest | None = answer.smallest
        return None if least is None else _placed(least.device_bytes, least.timeline, route.base_seconds)
    bound = plan.lower_bound / route.base_seconds
    return _placed(plan.timeline.device_peak, plan.timeline, route.base_seconds) | {"bound": round(bound, 4)}


def _placed(device_bytes: float, timeline: Timeline, base: float) -> dict[str, float]:
    return _row(device_bytes, timeline.host_peak, timeline.seconds / base)


def _row(device_bytes: float, host_bytes: float, slowdown: float) -> dict[str, float]:
    return {"device_bytes": round(device_bytes), "host_bytes": round(host_bytes), "slowdown": round(slowdown, 4)}


def point(recorded: Recorded, device: Device, plans: Sequence[str] = ()) -> Point:
    """What a recorded step needs on a device, as data; `plans` as in `needs`."""
    work = recorded.on(device)
    return {
        "tokens": recorded.case.length,
        "memory": dict(work.memory),
        "gradients": work.route.gradient_bytes[-1],
        "loss_bytes": work.route.loss_bytes,
        "num_parameters": recorded.num_parameters,
        "num_trainable": recorded.num_trainable,
        "rows": needs(work.route, links_of(device), plans),
    }


def blocks_only(route: Route) -> Route:
    """The same step with nothing on the device but activations of blocks: no weights, gradients, optimizer or logits."""
    return replace(route, base_bytes=0, keeps_gradients=True, loss_bytes=0)


# -- between recordings ------------------------------------------------------------------------------------------------

Curve = Sequence[tuple[int, float]]


def reach(curve: Curve, budget: float) -> int:
    """Most tokens whose bytes keep to a budget; 0 if those of the shortest recorded step do not.

    Straight lines between recorded lengths, the last one continued: every part of a step grows with its tokens along a line, and
    the largest of them counts, so that for a setting lines between points are not too low.
    """
    points = sorted(curve)
    if points[0][1] > budget:
        return 0
    (low, start), (high, end) = next((pair for pair in pairwise(points) if pair[1][1] > budget), points[-2:])
    return int(low + (budget - start) * (high - low) / (end - start))


def at(curve: Curve, tokens: float) -> float:
    """Bytes at a number of tokens, between recorded lengths or beyond them."""
    points = sorted(curve)
    (low, start), (high, end) = next((pair for pair in pairwise(points) if pair[1][0] >= tokens), points[-2:])
    return start + (end - start) * (tokens - low) / (high - low)


def slope(curve: Curve) -> tuple[float, float]:
    """Bytes for each token more, and bytes without any, of the two longest steps."""
    (low, start), (high, end) = sorted(curve)[-2:]
    each = (end - start) / (high - low)
    return each, start - each * low
