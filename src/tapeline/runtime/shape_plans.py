"""Plans for other shapes than the largest: made beside training, each the first time that its bucket is seen."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from tapeline.errors import InfeasibleBudgetError, TapelineError, UsageError
from tapeline.planner.schema import Plan
from tapeline.runtime.search import Search
from tapeline.runtime.shapes import Shape, cut, lay_over, shape_of
from tapeline.tape.beside import CancelledError, Demand, SharedStateError

logger = logging.getLogger(__name__)

_PER_SHAPE = "per_shape makes plans for other shapes"
_MAX_PLANS = 256


@dataclass(frozen=True, slots=True)
class _Held:
    """A tensor of the batch, off the device as long as nothing is planned."""

    tensor: torch.Tensor
    device: torch.device


class ShapePlans:
    """The plans of one session by bucket, and the thread that makes them.

    A bucket that was not seen before is served by the plan of the next larger one, and queued. Plans are made one after
    another in a thread that ends when nothing is left to do.

    Args:
        search: has made `base`, and makes the others.
        base: the plan for the largest batch.

    Raises:
        UsageError: if there is nothing to choose per shape, or the batch has no shape.
    """

    def __init__(self, search: Search, base: Plan) -> None:
        if search.name != "auto":
            raise UsageError(
                f"{_PER_SHAPE} only in mode 'auto' with a budget: mode {search.mode!r} does the same for every shape."
            )
        largest = shape_of(search.batch)
        if largest is None:
            raise UsageError(f"{_PER_SHAPE}, and the batch has none: no tensor in it has a dimension.")
        self.search, self.base, self.largest = search, base, largest
        self.plans: dict[Shape, Plan] = {largest: base}
        """The plan of each bucket that has one."""
        self.reasons: dict[Shape, str] = {}
        """Why other buckets have none."""
        if search.step.draws_numbers:
            raise UsageError(
                f"{_PER_SHAPE} while training runs, and this model draws numbers in Python, NumPy or on the CPU that decide "
                "what it does: drawing for a plan would change the training. Use per_shape=False."
            )
        self._batch = tree_map(_hold, search.step.fake_batch())
        search.batch = search.step.batch = None  # of the user's device
        self._serving: dict[Shape, Shape] = {}
        self._queue: deque[tuple[Shape, Mapping[str, Any]]] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_stopped = False
        self._num_waiting = 0

    def serve(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Plan:
        """The plan for a call of the model with these arguments; takes microseconds."""
        shape = shape_of((args, kwargs))
        if shape is None:
            return self.base
        bucket = shape.bucket(self.largest)
        serving = self._serving.get(bucket)
        if serving is None:
            serving = self._next_larger(bucket)
            if serving != bucket:
                self._request(bucket, kwargs, self.plans[serving])
                if not serving.covers(bucket):
                    self.wait()  # no plan that there is keeps the budget with this call
                    serving = self._next_larger(bucket)
            self._serving[bucket] = serving
        return self.plans[serving]

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until every bucket that was seen has its plan.

        Args:
            timeout: seconds; ``None``: as long as it takes.

        Returns:
            Whether nothing is left to do.
        """
        thread = self._thread
        if thread is None:
            return True
        self._num_waiting += 1
        try:
            thread.join(timeout)
        finally:
            self._num_waiting -= 1
        return not thread.is_alive()

    def stop(self) -> None:
        """Make no more plans; returns when the thread has ended. Safe to call twice."""
        with self._lock:
            self._is_stopped = True
            self._queue.clear()
        self.wait()

    def notes(self) -> list[str]:
        """Which shapes have no plan of their own, and why."""
        by_reason: dict[str, list[str]] = {}
        for shape, reason in self.reasons.items():
            by_reason.setdefault(reason, []).append(str(shape))
        return [f"no plan of its own for {', '.join(shapes)}: {reason}" for reason, shapes in by_reason.items()]

    def _next_larger(self, bucket: Shape) -> Shape:
        """Whose plan serves; the base, if none is large enough."""
        covering = [shape for shape in self.plans if shape.covers(bucket)]
        return min(covering, key=lambda shape: (shape.batch * shape.length, shape.is_padded), default=self.largest)

    def _request(self, bucket: Shape, call: Mapping[str, Any], serving: Plan) -> None:
        if bucket.batch > self.largest.batch or bucket.length > self.largest.length:
            self.reasons[bucket] = f"the plan was made for batches of up to {self.largest}"
            return
        is_better = not serving.keeps_all or not self._next_larger(bucket).covers(bucket)
        with self._lock:
            if not is_better or bucket in self.reasons or self._is_stopped or len(self.plans) >= _MAX_PLANS:
                return
            tensors = {n: t.detach().cpu() for n, t in call.items() if isinstance(t, torch.Tensor) and _is_small(t)}
            self._queue.append((bucket, tensors))
            if self._thread is None or not self._thread.is_alive():
                # it holds neither the model nor the session; a process that ends waits for it to notice
                self._thread = threading.Thread(target=self._work, name="tapeline-plans", daemon=False)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._thread = None
                    return
                bucket, call = self._queue.popleft()
            self._make(bucket, call)

    def _make(self, bucket: Shape, call: Mapping[str, Any]) -> None:
        step = self.search.step
        try:
            batch = lay_over(self._cut(bucket), call, is_padded=bucket.is_padded)
            with step.beside_training(self._demand):
                plan = self.search.plan_for(batch)
        except CancelledError:
            return
        except InfeasibleBudgetError as error:
            self.reasons[bucket] = f"it needs {error.smallest_feasible_bytes} bytes, more than the budget"
        except SharedStateError as error:
            self.reasons[bucket] = str(error)
        except TapelineError as error:
            self.reasons[bucket] = f"its step cannot be run on tensors without data ({error})"
        except Exception as error:  # whatever a model raises with a batch that it did not expect must not end training
            logger.warning("no plan for batches of %s", bucket, exc_info=True)
            self.reasons[bucket] = f"{type(error).__name__}: {error}"
        else:
            self.plans[bucket] = plan
            self._serving.clear()
            logger.info("batches of up to %s: %.3fx FLOPs", bucket, plan.slowdown)
        finally:
            step.batch = None

    def _cut(self, bucket: Shape) -> Any:
        whole = tree_map(lambda held: held.tensor.to(held.device) if isinstance(held, _Held) else held, self._batch)
        return cut(whole, self.largest, bucket)

    def _demand(self) -> Demand:
        if self._is_stopped or not threading.main_thread().is_alive():
            return Demand.NONE
        return Demand.NOW if self._num_waiting else Demand.LATER


def _hold(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return _Held(leaf if isinstance(leaf, FakeTensor) else leaf.cpu(), leaf.device)


def _is_small(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dim() > 0
