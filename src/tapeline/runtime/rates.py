"""Timing the operations of a model's own step, so that forecasts for this machine rest on them."""

from __future__ import annotations

from typing import Any

from torch import nn

from tapeline.cost.catalogue import Device, stored_device
from tapeline.cost.device import known_device
from tapeline.cost.steps import OpTimer, with_rates
from tapeline.runtime.doctor import restored
from tapeline.runtime.predict import model_device
from tapeline.runtime.step import LossFn, model_loss

_NUM_STEPS = 2


def measure_rates(model: nn.Module, batch: Any, *, loss_fn: LossFn = model_loss) -> Device:
    """Run three steps of a model as it is, and say what its operations reached in the last two.

    Every operation is timed for itself. The model and the random state are as before afterwards.

    Args:
        model: any module.
        batch: one micro-batch as the model gets it, of about the size of training.
        loss_fn: called as ``loss_fn(model, batch)``, returns a scalar.

    Returns:
        What is known of the model's device, with the rates of matrix products, attention and memory as they were found; the
        rest is what `tapeline doctor` has stored, or the catalogue's.

    Raises:
        UsageError: if the step is too small to say anything.
    """
    device = model_device(model)
    timer = OpTimer(device)
    with restored(model) as trial:
        trial.batch, trial.loss_fn = batch, loss_fn
        trial.step()
        for _ in range(_NUM_STEPS):
            trial.step(timer)
    known = known_device(device)
    return with_rates(stored_device(known.name) or known, timer, type(model).__name__)
