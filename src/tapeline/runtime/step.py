"""One optimizer step, run as a training loop runs it and measured by a ledger: on fake tensors or on real ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from tapeline.cost.price import count_flops
from tapeline.errors import UsageError
from tapeline.ledger import BACKWARD, FORWARD, OPTIMIZER, RECOMPUTE, Ledger, Span
from tapeline.planner.profile import BlockFacts, Point, StepProfile
from tapeline.runtime.ambient import outside_autocast
from tapeline.runtime.block import BlockSeam
from tapeline.tape.beside import end_forward
from tapeline.tape.sources import attached

LossFn = Callable[[nn.Module, Any], torch.Tensor]


def model_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """The loss of a model that computes it itself: ``model(**batch).loss``, or a scalar output.

    Raises:
        UsageError: if the output has no loss.
    """
    if isinstance(batch, Mapping):
        out = model(**batch)
    elif isinstance(batch, list | tuple):
        out = model(*batch)
    else:
        out = model(batch)
    loss = out if isinstance(out, torch.Tensor) else getattr(out, "loss", None)
    if loss is None and isinstance(out, Mapping):
        loss = out.get("loss")
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise UsageError(
            f"{type(model).__name__} returned no scalar loss ({type(out).__name__}): add 'labels' to the batch, or pass "
            "loss_fn=lambda model, batch: ... that returns one."
        )
    return loss


class StepMeter:
    """Runs steps of one model under a ledger and says what they did.

    Args:
        model: the model, real or fake.
        block_names: the modules that time and bytes are attributed to.
        device: the device whose bytes are counted.
    """

    def __init__(self, model: nn.Module, block_names: Sequence[str], device: torch.device) -> None:
        self.model, self.block_names, self.device = model, list(block_names), device
        self.flops: Counter[tuple[str, str | None]] = Counter()

    def run(
        self,
        micro_batches: Sequence[Any],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        loss_fn: LossFn = model_loss,
        seams: Mapping[str, BlockSeam] | None = None,
        optimizer_step: Callable[[], None] | None = None,
        others: Sequence[torch.Tensor] = (),
        before_batch: Callable[[int], None] | None = None,
    ) -> StepProfile:
        """Forward and backward of each micro-batch, then the optimizer step, gradients set to none.

        Args:
            micro_batches: given to `loss_fn` one by one.
            optimizer: stepped at the end; ``None`` leaves that part out.
            loss_fn: called as ``loss_fn(model, batch)``, returns a scalar.
            seams: the block seams in force, for facts about their calls.
            optimizer_step: called instead of ``optimizer.step``.
            others: what else is alive all the time.
            before_batch: called with the number of each micro-batch before its forward.
        """
        self.flops.clear()
        ledger = Ledger(self.device, observe=self._count)
        track_training_state(ledger, self.model, optimizer)
        ledger.track((leaf for leaf in tree_leaves(micro_batches) if isinstance(leaf, torch.Tensor)), "batch")
        ledger.track(others, "other")
        ledger.begin_window()
        with ledger, ledger.watch(self.model, self.block_names):
            for number, batch in enumerate(micro_batches):
                if before_batch is not None:
                    before_batch(number)
                with ledger.scope(FORWARD):
                    loss = loss_fn(self.model, batch)
                    if len(micro_batches) > 1:
                        loss = loss / len(micro_batches)
                    end_forward()
                with outside_autocast():
                    loss.backward()
                del loss
            ledger.track((p.grad for p in self.model.parameters()), "gradients")
            with ledger.scope(OPTIMIZER):
                if optimizer is not None:
                    (optimizer_step or optimizer.step)()
                _track_state(ledger, optimizer)
                self.model.zero_grad(set_to_none=True)
        return StepProfile(
            peak_bytes=ledger.peak_bytes(),
            flops=sum(self.flops.values()),
            memory=_memory(ledger),
            points=tuple(_points(ledger.spans)),
            blocks={name: self._facts(name, seams or {}) for name in self.block_names},
            outside_flops=sum(flops for (_, block), flops in self.flops.items() if block is None),
        )

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, span: Span) -> None:
        flops = count_flops(func, args, kwargs, out)
        if flops:
            self.flops[span.phase, span.block] += flops

    def _facts(self, name: str, seams: Mapping[str, BlockSeam]) -> BlockFacts:
        seam = seams.get(name)
        return BlockFacts(
            recompute_flops=self.flops[RECOMPUTE, name],
            num_calls=seam.num_calls if seam else 0,
            num_chained=seam.num_chained if seam else 0,
            reason="; ".join(seam.reasons) if seam else "",
        )


def track_training_state(ledger: Ledger, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Count what exists before a step: weights, gradients, optimizer state."""
    for parameter in model.parameters():
        ledger.track([parameter, *(tensor for _, tensor in attached(parameter))], "weights")
    ledger.track(model.buffers(), "weights")
    ledger.track((p.grad for p in model.parameters()), "gradients")
    _track_state(ledger, optimizer)


def _track_state(ledger: Ledger, optimizer: torch.optim.Optimizer | None) -> None:
    if optimizer is not None:
        state = (leaf for entry in optimizer.state.values() for leaf in tree_leaves(entry))
        ledger.track((leaf for leaf in state if isinstance(leaf, torch.Tensor)), "optimizer")


def _memory(ledger: Ledger) -> dict[str, int]:
    kinds = Counter(dict.fromkeys(("weights", "gradients", "optimizer", "batch", "activations", "head and loss"), 0))
    for allocation in ledger.peak_holders():
        if allocation.category is not None:
            kinds[allocation.category] += allocation.num_bytes
        elif allocation.phase == OPTIMIZER:
            kinds["optimizer"] += allocation.num_bytes
        else:
            kinds["activations" if allocation.block is not None else "head and loss"] += allocation.num_bytes
    return dict(kinds)


def _points(spans: list[Span]) -> Iterable[Point]:
    """Join neighbouring spans of one phase and block; a recompute is part of its block's backward."""
    joined: list[Span] = []
    for span in spans:
        phase = BACKWARD if span.phase == RECOMPUTE else span.phase
        if joined and joined[-1].phase == phase and joined[-1].block == span.block:
            joined[-1].peak_bytes = max(joined[-1].peak_bytes, span.peak_bytes)
            joined[-1].end_bytes = span.end_bytes
        else:
            joined.append(Span(phase, span.block, span.start_bytes, span.peak_bytes, span.end_bytes))
    for span in joined:
        yield Point(
            phase=span.phase,
            block=span.block,
            start_bytes=span.start_bytes,
            peak_bytes=span.peak_bytes,
            end_bytes=span.end_bytes,
        )
