"""What happens around the steps of a run: measuring, reporting, stopping, and saying what ran out of memory."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from tapeline.compat import is_out_of_memory
from tapeline.errors import OutOfMemoryError, UsageError
from tapeline.integrations.transformers import StepMeasurer
from tapeline.planner.schema import Plan
from tapeline.runtime.predict import FakeStep
from tapeline.runtime.session import Session
from tapeline.train.interrupt import GracefulStop
from tapeline.train.output import PLAN_FILE
from tapeline.units import format_bytes

_NUM_MEASURED_FIRST = 2  # the first step has no optimizer state yet, the second one has
_MEASURED_EVERY = 50
_WRITE_FAILURES = ("No space left on device", "PytorchStreamWriter failed")


class Observer(Protocol):
    """What a front end is told while a run goes on."""

    def said(self, text: str) -> None:
        """One line for people."""

    def planned(self, plan: Plan) -> None:
        """The plan, before the first step."""

    def measured(self, measurement: Measurement) -> None:
        """One step was measured."""

    def stepped(self, step: int, num_steps: int) -> None:
        """An optimizer step is done."""

    def logged(self, step: int, values: dict[str, float]) -> None:
        """The loss was reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """The peak of one step against the prediction for the shape of its batches."""

    step: int
    """Number of the optimizer step, from 1."""
    batch_shape: tuple[int, ...]
    """(sequences, tokens) of its largest micro-batch."""
    predicted_bytes: int
    """Predicted for that shape."""
    measured_bytes: int
    """Measured."""

    @property
    def deviation(self) -> float:
        """Measured relative to predicted, minus 1."""
        return self.measured_bytes / self.predicted_bytes - 1


class TrainingLoop:
    """Watches one `Trainer.train`.

    Args:
        session: the plan in force.
        predictor: predicts the peak for the shape of a measured batch.
        observer: told about everything.
        stop: asked after each step whether to stop.
        first_step: number of the first step of this run, 1 unless it resumes.
        output_dir: where the Trainer writes its checkpoints.
    """

    def __init__(
        self,
        session: Session,
        predictor: FakeStep,
        observer: Observer,
        stop: GracefulStop,
        *,
        first_step: int,
        output_dir: Path,
    ) -> None:
        self.session, self.predictor, self.observer, self.stop = session, predictor, observer, stop
        self.first_step, self.output_dir = first_step, output_dir
        self.num_steps = 0
        self.measurements: list[Measurement] = []
        self.losses: list[tuple[int, float]] = []
        self._measurer = StepMeasurer(session, self._measures, self._measured)

    def callbacks(self) -> list[Any]:
        """Callbacks for the trainer."""
        from transformers import TrainerCallback

        loop = self

        class Relay(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                loop.num_steps = state.max_steps

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                loop.observer.stepped(state.global_step, state.max_steps)
                if loop.stop.is_requested:
                    control.should_save = control.should_training_stop = True

            def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                loop.logged(state.global_step, kwargs.get("logs") or {})

            def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                folder = loop.output_dir / f"checkpoint-{state.global_step}"
                (folder / PLAN_FILE).write_text(loop.session.plan.to_json(), encoding="utf-8")

        return [Relay(), self._measurer.callback()]

    def close(self) -> None:
        """End an open measurement, as after an exception."""
        self._measurer.abandon()

    def logged(self, step: int, values: dict[str, float]) -> None:
        if "loss" in values:
            self.losses.append((step, float(values["loss"])))
            self.observer.logged(step, values)

    def _is_reported(self, step: int) -> bool:
        is_early = step < self.first_step + _NUM_MEASURED_FIRST
        return is_early or step % _MEASURED_EVERY == 0 or step == self.num_steps

    def _measures(self, step: int) -> bool:
        return self.session.is_measuring_free or self._is_reported(step)

    def _measured(self, step: int, peak: int, micro_batches: list[dict[str, torch.Tensor]]) -> None:
        if not self._is_reported(step):
            return
        profile = self.predictor.run(
            self.session.plan.blocks,
            micro_batches=micro_batches,
            placements=self.session.placements,
            in_flight_bytes=self.session.plan.in_flight_bytes,
        )
        predicted = self.predictor.first_step_peak(profile) if step == 1 else profile.peak_bytes
        measurement = Measurement(
            step=step,
            batch_shape=max((tuple(batch["input_ids"].shape) for batch in micro_batches), key=math.prod),
            predicted_bytes=predicted,
            measured_bytes=peak,
        )
        self.measurements.append(measurement)
        self.observer.measured(measurement)


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Turn an allocation failure into an error that says during what it happened."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        is_failure = is_out_of_memory(error)
        if not is_failure:
            raise
        first_line = str(error).strip().partition("\n")[0]
        raise OutOfMemoryError(
            f"Out of memory during {what}: {first_line} Something else holds memory on the device, or the prediction missed "
            "something: use a smaller --budget or batch. The last checkpoint is intact."
        ) from error


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a failure to write into an error that says where; safetensors and torch have exceptions of their own for it."""
    try:
        yield
    except Exception as error:
        is_failure = isinstance(error, OSError) or any(sign in str(error) for sign in _WRITE_FAILURES)
        if not is_failure:
            raise
        raise UsageError(
            f"Cannot write to {str(folder)!r}: {error} ({format_bytes(shutil.disk_usage(folder).free)} free). Make room and "
            "continue with --resume_from_checkpoint last; complete checkpoints are intact."
        ) from error
