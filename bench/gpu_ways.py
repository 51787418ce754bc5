"""Ways to run a training step in less memory: torch's, those of other libraries, and ours; each in force within a context."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tapeline
from bench.smoke import Batch, Checkpoint, Managed, switched
from tapeline.cost.limits import available_host_bytes, free_disk_bytes
from tapeline.planner.schema import Plan

NONE, CHECKPOINT, OFFLOAD, CHEAP, AUTO = "none", "checkpoint", "offload", "cheap", "auto"
TRANSFORMERS, UNSLOTH, TRL, TORCHTUNE = "transformers offload", "unsloth", "trl", "torchtune"
_DISK_SHARE = 0.5
"""Of what is free on the disk, what a plan may take."""
_MOST_CHARACTERS = 300
"""Of a reason."""


@dataclass(slots=True)
class Setting:
    """What a way is put in force on."""

    model: nn.Module
    batch: Batch
    device: torch.device
    folder: Path
    """Where tensors go that a plan moves to the disk."""
    plans: dict[str, Plan] = field(default_factory=dict)
    """Those made so far, by mode."""

    def plan(self, mode: str) -> Plan:
        """Ours in a mode; ``auto`` gets the memory that ``offload`` needs."""
        if mode not in self.plans:
            limits = {} if mode == CHEAP else self._below()
            if mode == AUTO:
                limits |= {"budget": needed_bytes(self.plan(OFFLOAD)), "margin": 0}
            self.plans[mode] = tapeline.plan(self.model, self.batch, mode=mode, **limits)
        return self.plans[mode]

    def _below(self) -> dict[str, Any]:
        """As much of the tier below as there is."""
        if self.device.type == "cpu":
            return {"disk_budget": int(_DISK_SHARE * free_disk_bytes(self.folder))}
        return {"host_budget": available_host_bytes()}


@dataclass(frozen=True, kw_only=True, slots=True)
class InForce:
    """A way in force on a model."""

    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    """What every step runs in."""
    session: tapeline.Session | None = None
    """Ours, with its plan."""
    plan_seconds: float = 0.0
    """What making the plan took."""


def needed_bytes(plan: Plan) -> int:
    """The predicted peak of all steps, the first included."""
    return max(plan.peak_bytes, plan.first_step_peak_bytes)


# -- torch, and the switches of transformers ---------------------------------------------------------------------------


@contextmanager
def untouched(setting: Setting) -> Iterator[InForce]:
    yield InForce()


@contextmanager
def checkpointed(setting: Setting) -> Iterator[InForce]:
    """torch's checkpoint for every layer, as transformers switches it on."""
    with _inputs_as_before(setting.model), switched(Checkpoint(setting.model)):
        yield InForce()


@contextmanager
def transformers_offload(setting: Setting) -> Iterator[InForce]:
    """The same with what it saves in pinned host memory."""
    load_transformers_offload()
    base = base_model(setting.model)
    with _inputs_as_before(setting.model):
        base.activation_checkpointing_enable({"use_reentrant": False}, offload=True)
        try:
            yield InForce()
        finally:
            base.activation_checkpointing_disable()


@contextmanager
def _inputs_as_before(model: nn.Module) -> Iterator[None]:
    """Switching a checkpoint off leaves the embeddings of a model with adapters requiring gradients, which costs products."""
    try:
        yield
    finally:
        base_model(model).disable_input_require_grads()


def base_model(model: nn.Module) -> Any:
    """The model below the adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


# -- other libraries ---------------------------------------------------------------------------------------------------


@contextmanager
def unsloth(setting: Setting) -> Iterator[InForce]:
    """Unsloth's checkpoint, which moves the inputs of layers to the host; it takes the place of torch's meanwhile."""
    library = load_unsloth()
    library.patch_unsloth_smart_gradient_checkpointing(torch.bfloat16)
    try:
        with checkpointed(setting) as running:
            yield running
    finally:
        library.unpatch_unsloth_smart_gradient_checkpointing()


@contextmanager
def hooked(setting: Setting, load: Callable[[], Callable[[nn.Module], Any]]) -> Iterator[InForce]:
    """Hooks on saved tensors around every step, with torch's checkpoint inside: inputs of layers are moved to the host."""
    with _hooks_as_before(setting.model), checkpointed(setting):
        context = load()(setting.model)
        yield InForce(around=lambda: context)


@contextmanager
def _hooks_as_before(model: nn.Module) -> Iterator[None]:
    """Take off what others register on modules and leave there."""
    tables = [table for part in model.modules() for table in (part._forward_pre_hooks, part._forward_hooks)]
    before = [set(table) for table in tables]
    try:
        yield
    finally:
        for table, known in zip(tables, before, strict=True):
            for key in set(table) - known:
                del table[key]


def load_transformers_offload() -> None:
    from transformers import PreTrainedModel

    enable = getattr(PreTrainedModel, "activation_checkpointing_enable", None)
    if enable is None or "offload" not in inspect.signature(enable).parameters:
        raise ImportError(f"transformers {version('transformers')} has no activation_checkpointing_enable(offload=)")


def load_unsloth() -> Any:
    """The module alone: importing the package as a whole changes transformers and torch, and with them every other way."""
    if "unsloth_zoo" not in sys.modules:
        spec = importlib.util.find_spec("unsloth_zoo")
        if spec is None:
            raise ModuleNotFoundError("No module named 'unsloth_zoo'")
        sys.modules["unsloth_zoo"] = importlib.util.module_from_spec(spec)
    return importlib.import_module("unsloth_zoo.gradient_checkpointing")


def load_trl() -> Callable[[nn.Module], Any]:
    return importlib.import_module("trl.models.activation_offloading").get_act_offloading_ctx_manager


def load_torchtune() -> Callable[[nn.Module], Any]:
    make = importlib.import_module("torchtune.training").get_act_offloading_ctx_manager
    return partial(make, enable_activation_offloading=True)


def load_liger() -> Any:
    importlib.import_module("triton")
    return importlib.import_module("liger_kernel.transformers")


@contextmanager
def liger_kernels(model: nn.Module) -> Iterator[None]:
    """Liger's fused kernels in a Llama; functions and classes that transformers shares are put back at the end."""
    from transformers.models.llama import modeling_llama

    shared = dict(vars(modeling_llama))
    load_liger().apply_liger_kernel_to_llama(model=base_model(model))
    try:
        yield
    finally:
        vars(modeling_llama).update(shared)


# -- ours --------------------------------------------------------------------------------------------------------------


@contextmanager
def ours(setting: Setting, mode: str) -> Iterator[InForce]:
    """A session of tapeline."""
    if mode == AUTO:
        setting.plan(OFFLOAD)  # whose memory it gets; not part of what planning takes
    begin = time.perf_counter()
    plan = setting.plan(mode)
    seconds = time.perf_counter() - begin
    way = Managed(setting.model, plan, offload_dir=setting.folder)
    try:
        with switched(way):
            yield InForce(session=way.session, plan_seconds=seconds)
    finally:
        way.remove()


# -- all of them -------------------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[Setting], AbstractContextManager[InForce]]] = {
    NONE: untouched,
    CHECKPOINT: checkpointed,
    TRANSFORMERS: transformers_offload,
    UNSLOTH: unsloth,
    TRL: partial(hooked, load=load_trl),
    TORCHTUNE: partial(hooked, load=load_torchtune),
    OFFLOAD: partial(ours, mode=OFFLOAD),
    CHEAP: partial(ours, mode=CHEAP),
    AUTO: partial(ours, mode=AUTO),
}
OURS = (OFFLOAD, CHEAP, AUTO)
LIGER = (NONE, CHECKPOINT, *OURS)
"""What is run with Liger's kernels."""
_NEEDS: dict[str, Callable[[], Any]] = {
    TRANSFORMERS: load_transformers_offload,
    UNSLOTH: load_unsloth,
    TRL: load_trl,
    TORCHTUNE: load_torchtune,
}


def obstacle(way: str, device: torch.device, *, liger: bool = False) -> str | None:
    """Why a way cannot be run here; ``None`` if nothing is known against it."""
    for load in (_NEEDS.get(way), load_liger if liger else None):
        if load is None:
            continue
        try:
            load()
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            return first_line(error)
        if device.type == "cpu":
            return "it needs an accelerator: the model is on the CPU"
    return None


def first_line(error: BaseException) -> str:
    """A reason in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:_MOST_CHARACTERS]
