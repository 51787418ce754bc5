"""What a person sees while a run goes on: the plan, a progress bar, losses, and promise against measurement."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tapeline.table import text_table
from tapeline.units import format_bytes, format_deviation

if TYPE_CHECKING:
    from tapeline.planner.schema import Plan
    from tapeline.train.config import TrainConfig
    from tapeline.train.loop import Measurement
    from tapeline.train.run import Result


class ConsoleObserver:
    """Writes to a console; on a terminal with a progress bar, elsewhere line by line."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> ConsoleObserver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def said(self, text: str) -> None:
        self._print(text)

    def planned(self, plan: Plan) -> None:
        self._print(f"\n{plan}\n")

    def measured(self, measurement: Measurement) -> None:
        shape = "x".join(str(size) for size in measurement.batch_shape)
        self._print(
            f"step {measurement.step} ({shape} tokens): predicted peak {format_bytes(measurement.predicted_bytes)}, "
            f"measured {format_bytes(measurement.measured_bytes)} ({format_deviation(measurement.deviation)})"
        )

    def stepped(self, step: int, num_steps: int) -> None:
        if self._task is None:
            self._task = self._progress.add_task("training", total=num_steps, loss="")
            self._progress.start()
        self._progress.update(self._task, completed=step)

    def logged(self, step: int, values: dict[str, float]) -> None:
        loss = f"loss {values['loss']:.4f}"
        if self._task is not None:
            self._progress.update(self._task, loss=loss)
        if not self.console.is_terminal:
            self._print(f"step {step}: {loss}")

    def finished(self, config: TrainConfig, result: Result) -> None:
        """The last words of a run."""
        self._print("\n" + _promise(result))
        if result.losses:
            first, last = result.losses[0], result.losses[-1]
            self._print(f"loss {first[1]:.4f} at step {first[0]}, {last[1]:.4f} at step {last[0]}")
        if result.eval_loss is not None:
            self._print(f"loss on the evaluation data: {result.eval_loss:.4f}")
        if result.status == "interrupted":
            self._print(
                f"Interrupted at step {result.num_steps}, saved in {result.checkpoint}. Continue with the same command and "
                "--resume_from_checkpoint last"
            )
        else:
            self._print(f"saved in {config.output_dir}")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _promise(result: Result) -> str:
    """Predicted against measured, over the steps that were measured."""
    report, measured = result.report, result.measurements
    budget = "none" if report.budget_bytes is None else format_bytes(report.budget_bytes)
    rows = [("budget", budget), ("planned for the largest batch", format_bytes(report.predicted_peak_bytes))]
    if measured:
        largest = max(measured, key=lambda m: m.measured_bytes)
        worst = max((m.deviation for m in measured), key=abs)
        rows.append(("predicted for the largest step measured", format_bytes(largest.predicted_bytes)))
        rows.append(
            (f"measured peak, in {len(measured)} of {result.num_steps} steps", format_bytes(largest.measured_bytes))
        )
        rows.append(("largest deviation from a prediction", format_deviation(worst)))
    if report.measured_reserved_bytes is not None:
        rows.append(("reserved by the allocator", format_bytes(report.measured_reserved_bytes)))
    rows += [row for tier in result.report.tiers for row in tier.rows()]
    table = text_table(("promise and measurement", "bytes"), rows)
    return "\n".join([table, *(f"note: {note}" for note in report.notes)])
