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

from tapeline.compat import forget_stale_modes
from tapeline.errors import InfeasibleBudgetError, TapelineError, UsageError
from tapeline.planner.schema import Plan
from tapeline.runtime.search import Search
from tapeline.runtime.shapes import Shape, cut, cut_shape, lay_over, named_tensors, shape_of
from tapeline.tape.beside import CancelledError, Demand, SharedStateError

logger = logging.getLogger(__name__)

_PER_SHAPE = "per_shape makes plans for other shapes"
_MAX_PLANS = 256
_PACKED = ("position_ids", "cu_seq", "seq_idx", "max_length_q")
"""Several sequences in a row of tokens: what they cost does not show in the shape."""


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
        UsageError: if there is nothing to choose per shape, or planning beside training could change it.
    """

    def __init__(self, search: Search, base: Plan) -> None:
        if search.wanted.name != "auto":
            raise UsageError(
                f"{_PER_SHAPE} only in mode 'auto' with a budget: mode {search.wanted.mode_text!r} does the same for every shape."
            )
        if (obstacle := search.obstacle_beside_training()) is not None:
            raise UsageError(f"{_PER_SHAPE} while training runs, and {obstacle}. Use per_shape=False.")
        largest, (call,) = shape_of(search.batch), search.calls
        assert largest is not None, "an obstacle otherwise"
        self.search, self.base, self.largest = search, base, largest
        self._base_call = call
        self.plans: dict[Shape, Plan] = {largest: base}
        """The plan of each bucket that has one; replaced as a whole."""
        self.reasons: dict[Shape, str] = {}
        """Why other buckets have none; replaced as a whole."""
        self._batch = tree_map(_hold, search.step.fake_batch())
        search.batch = search.step.batch = None  # of the user's device
        self._coming: dict[Shape, threading.Event] = {}
        """Buckets in the queue or being planned."""
        self._queue: deque[tuple[Shape, Mapping[str, Any]]] = deque()
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._is_stopped = False
        self._num_waiting = 0

    def serve(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Plan:
        """The plan for a call of the model with these arguments; takes microseconds."""
        tensors = named_tensors(args, kwargs)
        shape = shape_of(tensors)
        if shape is None:
            return self.base
        bucket = shape.bucket(self.largest)
        if bucket.batch > self.largest.batch or bucket.length > self.largest.length:
            self._note(
                bucket, f"the plan was made for batches of up to {self.largest}, and larger ones may exceed the budget"
            )
            return self.base
        if not self._is_within(tensors, bucket):
            return self.base
        plans = self.plans
        plan = plans.get(bucket)
        if plan is not None:
            return plan
        serving = self._next_larger(plans, bucket)
        is_covered = serving.covers(bucket)
        if not (is_covered and plans[serving].keeps_all):
            done = self._request(bucket, kwargs, is_first=not is_covered)
            if done is not None and not is_covered and torch._C._current_autograd_node() is None:
                self._wait_for(done)  # no plan that there is keeps the budget with this call
                return self.plans.get(bucket, plans[serving])
        return plans[serving]

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
        forget_stale_modes()

    def notes(self) -> list[str]:
        """Which shapes have no plan of their own, and why."""
        by_reason: dict[str, list[str]] = {}
        for shape, reason in self.reasons.items():
            by_reason.setdefault(reason, []).append(str(shape))
        return [f"no plan of its own for {', '.join(shapes)}: {reason}" for reason, shapes in by_reason.items()]

    def _is_within(self, tensors: Mapping[str, torch.Tensor], bucket: Shape) -> bool:
        """Whether every tensor of a call is one of the largest batch's, and no larger than the bucket's plan is for."""
        for name, tensor in tensors.items():
            known = self._base_call.get(name)
            if known is None or len(known) != tensor.dim() or name.startswith(_PACKED):
                return False
            if any(
                size > most for size, most in zip(tensor.shape, cut_shape(known, self.largest, bucket), strict=True)
            ):
                return False
        return True

    def _next_larger(self, plans: Mapping[Shape, Plan], bucket: Shape) -> Shape:
        """Whose plan serves; the base, if none is large enough."""
        covering = [shape for shape in plans if shape.covers(bucket)]
        return min(covering, key=lambda shape: (shape.batch * shape.length, shape.is_padded), default=self.largest)

    def _request(self, bucket: Shape, call: Mapping[str, Any], *, is_first: bool) -> threading.Event | None:
        """Queue a bucket, once; returns what is set when it is done, ``None`` if no plan will come."""
        with self._lock:
            if bucket in self._coming:
                return self._coming[bucket]
            if bucket in self.reasons or self._is_stopped or len(self.plans) >= _MAX_PLANS:
                return None
            tensors = {n: t.detach().cpu() for n, t in call.items() if isinstance(t, torch.Tensor) and _is_small(t)}
            (self._queue.appendleft if is_first else self._queue.append)((bucket, tensors))
            done = self._coming[bucket] = threading.Event()
            if self._thread is None:
                # it holds neither the model nor the session; a process that ends waits for it to notice
                thread = threading.Thread(target=self._work, name="tapeline-plans", daemon=False)
                try:
                    thread.start()
                except RuntimeError as error:
                    self._queue.clear()
                    del self._coming[bucket]
                    self._note(bucket, f"no thread can be started ({error})")
                    return None
                self._thread = thread
            return done

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._thread = None
                    return
                bucket, call = self._queue.popleft()
            try:
                serving = self._next_larger(self.plans, bucket)
                if not (serving.covers(bucket) and self.plans[serving].keeps_all):  # one that came since then
                    self._make(bucket, call)
            finally:
                with self._lock:
                    self._coming.pop(bucket).set()

    def _make(self, bucket: Shape, call: Mapping[str, Any]) -> None:
        step = self.search.step
        try:
            batch = lay_over(self._cut(bucket), call, is_padded=bucket.is_padded)
            with step.beside_training(self._demand):
                plan = self.search.plan_for(batch)
        except CancelledError:
            return
        except InfeasibleBudgetError as error:
            self._note(bucket, f"it needs {error.smallest_feasible_bytes} bytes, more than the budget")
        except SharedStateError as error:
            self._note(bucket, f"planning it would change the training: {error}")
        except TapelineError as error:
            self._note(bucket, f"its step cannot be run on tensors without data ({error})")
        except Exception as error:  # whatever a model raises with a batch that it did not expect must not end training
            logger.debug("no plan for batches of %s", bucket, exc_info=True)
            self._note(bucket, f"{type(error).__name__}: {error}")
        else:
            self.plans = {**self.plans, bucket: plan}
            logger.info("batches of up to %s: %.3fx FLOPs", bucket, plan.slowdown)
        finally:
            step.batch = None

    def _note(self, bucket: Shape, reason: str) -> None:
        if bucket not in self.reasons and len(self.reasons) < _MAX_PLANS:
            self.reasons = {**self.reasons, bucket: reason}

    def _wait_for(self, done: threading.Event) -> None:
        self._num_waiting += 1
        try:
            done.wait()
        finally:
            self._num_waiting -= 1

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
