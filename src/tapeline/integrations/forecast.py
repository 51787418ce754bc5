"""A fine-tuning run forecast from a model's name: nothing is loaded, nothing runs, any device of the catalogue will do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from tapeline.cost.catalogue import CPU, Device, find_device
from tapeline.cost.links import links_of
from tapeline.errors import InfeasibleBudgetError, UnsupportedModelError, UsageError, did_you_mean
from tapeline.integrations.configs import find_config
from tapeline.integrations.depth import Size, full_size, shortened
from tapeline.integrations.peft import add_lora
from tapeline.integrations.transformers import model_without_weights, random_tokens
from tapeline.planner.described import described
from tapeline.planner.forecast import OURS, Forecast, Row
from tapeline.planner.hybrid import Hybrid, Infeasible, solve
from tapeline.planner.route import Budgets, Links
from tapeline.planner.strategies import Outcome, outcomes
from tapeline.planner.tightest import Smallest, smallest
from tapeline.runtime.blocks import find_blocks
from tapeline.runtime.candidates import Candidates
from tapeline.runtime.predict import FakeStep
from tapeline.runtime.route import Whole, Workload, workload
from tapeline.units import Budget, format_bytes, parse_budget, parse_bytes

_DTYPES = ("bfloat16", "float16", "float32")
_MARGIN = 0.05
_GIB = 2**30
_ALPHA = 16
ALL_LINEAR = "all-linear"
_LEAST = {"max_length": 2, "batch_size": 1, "lora_r": 0, "gradient_accumulation_steps": 1, "frozen_layers": 0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A fine-tuning run to forecast.

    Args:
        model: a built-in name (``llama-3.1-8b``), a local directory with a config.json, or a hub name.
        max_length: tokens of a sequence.
        batch_size: sequences of a micro-batch.
        lora_r: rank of adapters; 0 trains all weights.
        load_in_4bit: the base is quantised to nf4.
        optimizer: name of a class of `torch.optim`.
        dtype: of weights and activations.
        gradient_accumulation_steps: micro-batches in an optimizer step.
        frozen_layers: the first so many layers are not trained, nor are the embeddings; adapters are on the others.
        lora_target_modules: ``"all-linear"``, or names separated by commas.
    """

    model: str
    max_length: int = 2048
    batch_size: int = 1
    lora_r: int = 0
    load_in_4bit: bool = False
    optimizer: str = "AdamW"
    dtype: str = "bfloat16"
    gradient_accumulation_steps: int = 1
    frozen_layers: int = 0
    lora_target_modules: str = ALL_LINEAR

    def __post_init__(self) -> None:
        if self.load_in_4bit and not self.lora_r:
            raise UsageError(
                "load_in_4bit trains adapters only: a 4-bit base cannot be trained itself. Give lora_r=16."
            )
        if self.dtype not in _DTYPES:
            raise UsageError(
                f"Unknown dtype {self.dtype!r}{did_you_mean(self.dtype, _DTYPES)}: use {', '.join(_DTYPES)}."
            )
        if self.lora_target_modules != ALL_LINEAR and not self.lora_r:
            raise UsageError("lora_target_modules names what gets adapters, and lora_r is 0: there are none.")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}.")

    @property
    def training(self) -> str:
        what = f"LoRA r{self.lora_r}" if self.lora_r else "full fine-tuning"
        what += f" on {self.lora_target_modules}" if self.lora_target_modules != ALL_LINEAR else ""
        what += f" above layer {self.frozen_layers}" if self.frozen_layers else ""
        what += f", {self.gradient_accumulation_steps} micro-batches" if self.gradient_accumulation_steps > 1 else ""
        return f"{what}, 4-bit base" if self.load_in_4bit else what


def forecast(
    model: str,
    *,
    device: str = "this",
    budget: str | int | float | Budget | None = None,
    host_budget: str | int | None = None,
    disk_budget: str | int = 0,
    max_length: int = 2048,
    batch_size: int = 1,
    lora_r: int = 0,
    load_in_4bit: bool = False,
    optimizer: str = "AdamW",
    dtype: str = "bfloat16",
    gradient_accumulation_steps: int = 1,
    frozen_layers: int = 0,
    lora_target_modules: str = ALL_LINEAR,
    longest: bool = False,
) -> Forecast:
    """Say whether a fine-tuning run fits a device, at what cost, and what the known settings would give.

    The model is built without weights, with two layers of each kind; their tapes and a ledger give bytes and operations, the
    catalogue gives the device's rates. The step time is a roofline estimate.

    Args:
        model: a built-in name, a local directory, or a hub name.
        device: a name of the catalogue, or ``"this"``.
        budget: bytes of the device that may be used, ``"22GiB"``, or ``"60%"`` of its memory. Default: all but 5 %.
        host_budget: bytes on the host; default: no limit. A CPU has no host beside it.
        disk_budget: bytes on the disk.
        max_length: tokens of a sequence.
        batch_size: sequences of a micro-batch.
        lora_r: rank of adapters on all linear layers; 0 trains all weights.
        load_in_4bit: the base is quantised to nf4.
        optimizer: name of a class of `torch.optim`.
        dtype: of weights and activations.
        gradient_accumulation_steps: micro-batches in an optimizer step; times are those of one of them.
        frozen_layers: the first so many layers are not trained, nor are the embeddings; adapters are on the others.
        lora_target_modules: ``"all-linear"``, or names of modules separated by commas.
        longest: find out the longest sequence of each setting; takes another recording.

    Returns:
        A frozen `Forecast`; also where nothing fits.

    Raises:
        UsageError: for an unknown model or device, or options that contradict each other.
        UnsupportedModelError: if the model cannot be planned.

    Example:
        >>> import tapeline
        >>> found = tapeline.forecast("qwen3-0.6b", device="rtx-4090", max_length=128, lora_r=8)
        >>> found.fits, found.advice
        (True, "'none' is within 3% of the plan: no activation checkpointing.")
    """
    run = Run(
        model=model,
        max_length=max_length,
        batch_size=batch_size,
        lora_r=lora_r,
        load_in_4bit=load_in_4bit,
        optimizer=optimizer,
        dtype=dtype,
        gradient_accumulation_steps=gradient_accumulation_steps,
        frozen_layers=frozen_layers,
        lora_target_modules=lora_target_modules,
    )
    target = find_device(device)
    budgets = _budgets(target, budget, host_budget, disk_budget)
    links = links_of(target)
    work, size = _workload(run, target)
    return _Forecaster(run, target, budgets, links, work, size).forecast(longest=longest)


def _budgets(
    device: Device, budget: str | int | float | Budget | None, host: str | int | None, disk: str | int
) -> Budgets:
    wanted = parse_budget(budget) or Budget(auto=True)
    if wanted.num_bytes is not None:
        own = wanted.num_bytes
    else:
        share = 1 - _MARGIN if wanted.fraction is None else wanted.fraction
        own = int(device.memory_bytes * share)
    if own > device.memory_bytes:
        raise UsageError(
            f"The budget {format_bytes(own)} is more than {device.name} has: {format_bytes(device.memory_bytes)}. Name a larger "
            "device, or a smaller budget."
        )
    if device.name == CPU:
        return Budgets(device=own, host=0, disk=_bytes(disk))
    return Budgets(device=own, host=math.inf if host is None else _bytes(host), disk=_bytes(disk))


def _bytes(size: str | int) -> int:
    return parse_bytes(size) if isinstance(size, str) and size != "0" else int(size)


def _workload(run: Run, device: Device) -> tuple[Workload, Size]:
    config, kinds = shortened(find_config(run.model))
    model = model_without_weights(config, dtype=run.dtype, load_in_4bit=run.load_in_4bit)
    if run.lora_r:
        model = add_lora(model, r=run.lora_r, alpha=_ALPHA, dropout=0.0, target_modules=run.lora_target_modules)
    if run.frozen_layers >= len(kinds):
        raise UsageError(
            f"frozen_layers is {run.frozen_layers}, and {run.model} has {len(kinds)}: nothing would be trained."
        )
    if run.frozen_layers:
        model.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
    model.train()
    batch = random_tokens(model, run.batch_size, run.max_length)
    step = FakeStep(model, batch, find_blocks(model, None), optimizer=run.optimizer)
    size = _size(model, kinds, run)
    whole = Whole(
        layers=tuple(kinds),
        weight_bytes=size.weight_bytes,
        trainable_bytes=size.trainable_bytes,
        num_frozen=run.frozen_layers,
        accumulation=run.gradient_accumulation_steps,
    )
    try:
        return workload(Candidates(step), device, run.dtype, whole), size
    except UnsupportedModelError as error:
        if not run.lora_r or run.lora_target_modules != ALL_LINEAR:
            raise
        raise UnsupportedModelError(
            f"{error} Adapters on fused experts cannot be planned: name others, such as "
            'lora_target_modules="q_proj,k_proj,v_proj,o_proj".'
        ) from error


def _size(model: nn.Module, kinds: Sequence[int], run: Run) -> Size:
    """The size of the full model; frozen layers have no adapters."""
    full, trained = full_size(model, kinds), full_size(model, kinds[run.frozen_layers :])
    num_absent = full.num_trainable - trained.num_trainable if run.lora_r else 0
    absent_bytes = full.trainable_bytes - trained.trainable_bytes if run.lora_r else 0
    return Size(
        num_parameters=full.num_parameters - num_absent,
        weight_bytes=full.weight_bytes - absent_bytes,
        num_trainable=trained.num_trainable,
        trainable_bytes=trained.trainable_bytes,
    )


class _Forecaster:
    """One run on one device, and what to say of it."""

    def __init__(self, run: Run, device: Device, budgets: Budgets, links: Links, work: Workload, size: Size) -> None:
        self.run, self.device, self.budgets, self.links = run, device, budgets, links
        self.work, self.size, self.route = work, size, work.route

    def forecast(self, *, longest: bool) -> Forecast:
        """Run every setting on paper, and the plan."""
        known = outcomes(self.route, self.budgets, self.links)
        rows = [self._row(outcome) for outcome in known]
        plan, least = self._solve(self.budgets)
        rows.append(self._own_row(plan, least))
        if longest:
            rows = self._with_longest(rows)
        return Forecast(
            model=self.run.model,
            training=self.run.training,
            num_parameters=self.size.num_parameters,
            num_trainable=self.size.num_trainable,
            num_layers=len(self.route.stages),
            device=self.device.name,
            dtype=self.run.dtype,
            batch_size=self.run.batch_size,
            max_length=self.run.max_length,
            budget_bytes=int(self.budgets.device),
            device_bytes=self.device.memory_bytes,
            host_budget_bytes=None if math.isinf(self.budgets.host) else int(self.budgets.host),
            disk_budget_bytes=int(self.budgets.disk),
            memory=self._memory(known[0]),
            rows=tuple(rows),
            bound_seconds=None if plan is None else plan.lower_bound,
            blocks=() if plan is None else tuple(described(self.route, plan)),
            next_gib=self._next_gib(plan),
            phases=self._phases(rows[-1]),
            provenance=dict(self.device.provenance),
            notes=tuple(self._notes(plan)),
        )

    def _solve(self, budgets: Budgets) -> tuple[Hybrid | None, Smallest | None]:
        try:
            return solve(self.route, budgets, self.links), None
        except Infeasible as answer:
            return None, answer.smallest

    def _row(self, outcome: Outcome) -> Row:
        found = outcome.timeline
        row = Row(
            name=outcome.name,
            words=outcome.words,
            device_bytes=math.ceil(outcome.device_bytes),
            fits=found is not None,
            slowdown_if_it_fits=outcome.free_seconds / self.route.base_seconds,
        )
        if found is None:
            return row
        return replace(
            row,
            seconds=found.seconds,
            slowdown=found.seconds / self.route.base_seconds,
            host_bytes=int(found.host_peak),
            disk_bytes=int(found.disk_peak),
            recompute_seconds=found.recompute_seconds,
            waiting_seconds=sum(found.waits.values()),
        )

    def _own_row(self, plan: Hybrid | None, least: Smallest | None) -> Row:
        tightest = least or smallest(self.route, self.budgets, self.links)
        needed = math.inf if tightest is None else tightest.device_bytes
        outcome = Outcome(
            name=OURS,
            words='tapeline mode="auto"',
            device_bytes=needed,
            free_seconds=self.route.base_seconds,
            timeline=None if plan is None else plan.timeline,
        )
        return self._row(outcome)

    def _memory(self, untouched: Outcome) -> dict[str, int]:
        """What is there at the peak with everything kept: at the loss, or later, where gradients take its place."""
        fixed = sum(self.work.memory.values())
        rest = math.ceil(untouched.device_bytes) - fixed
        kept = sum(stage.sizes[v] for stage in self.route.stages for v in stage.held | set(stage.needed))
        gradients = 0 if kept + self.work.head_bytes >= rest else min(rest, self.route.gradient_bytes[-1])
        activations = min(kept, rest - gradients)
        return {
            **self.work.memory,
            "gradients": self.work.memory["gradients"] + gradients,
            "activations": activations,
            "head and loss": rest - gradients - activations,
        }

    def _next_gib(self, plan: Hybrid | None) -> float | None:
        if plan is None or plan.timeline.seconds <= self.route.base_seconds * 1.001:
            return None
        more, _ = self._solve(replace(self.budgets, device=self.budgets.device + _GIB))
        return None if more is None else max(0.0, 1 - more.timeline.seconds / plan.timeline.seconds)

    def _phases(self, plan: Row) -> dict[str, dict[str, int]]:
        fixed = sum(self.work.memory.values())
        block = max(int(options.forward_peak_safe.min(axis=0).max()) for options in self.route.choices)
        state = self.size.trainable_bytes + self.work.memory["optimizer"]
        return {
            "train": {
                "device": plan.device_bytes if plan.seconds is None else int(self.budgets.device),
                "host": plan.host_bytes,
            },
            "evaluate": {"device": fixed + max(block, self.work.head_forward_bytes), "host": 0},
            "save": {"device": fixed, "host": state},
            "resume": {"device": fixed, "host": state},
        }

    def _with_longest(self, rows: Sequence[Row]) -> list[Row]:
        """Bytes grow with the tokens along a line; a recording at twice the length gives its slope."""
        twice, _ = _workload(replace(self.run, max_length=2 * self.run.max_length), self.device)
        other = {o.name: o.device_bytes for o in outcomes(twice.route, self.budgets, self.links)}
        least = smallest(twice.route, self.budgets, self.links)
        other[OURS] = math.inf if least is None else least.device_bytes
        found = []
        for row in rows:
            slope = (other[row.name] - row.device_bytes) / self.run.max_length
            tokens = (
                self.run.max_length + (self.budgets.device - row.device_bytes) / slope if 0 < slope < math.inf else 0
            )
            tokens = max(0, int(tokens))
            found.append(
                replace(row, longest=tokens, largest_batch=tokens * self.run.batch_size // self.run.max_length)
            )
        return found

    def _notes(self, plan: Hybrid | None) -> list[str]:
        notes = [
            "step times are estimates from rates, and no device has confirmed them",
            "bytes are those of tensors: what the allocator wastes comes on top",
        ]
        if plan is not None and plan.timeline.host_peak:
            notes.append(f"the host needs {format_bytes(plan.timeline.host_peak)} of pinned memory")
        if self.device.note:
            notes.append(self.device.note)
        return notes


def check(forecast: Forecast) -> None:
    """Raise unless the plan fits.

    Raises:
        InfeasibleBudgetError: with the smallest device budget that would do.
    """
    if not forecast.plan.fits:
        raise InfeasibleBudgetError(
            f"{forecast.model}, {forecast.training}: {forecast.verdict}. Use a shorter max_length, a smaller batch, "
            "adapters or a 4-bit base, or a larger device.",
            budget_bytes=forecast.budget_bytes,
            smallest_feasible_bytes=forecast.plan.device_bytes,
        )
