"""Rows of the matrix that are not on the tape as a whole, and why; and where a prediction is only near."""

from __future__ import annotations

from tests.exact.rows import Row

ROUTING = "reads the values of tensors (aten._local_scalar_dense"
WINDOWS = "reads the values of tensors (Tensor.tolist)"
PARAMETRISED = "changes the size of a storage (aten.set_"

SOMETIMES = {"gemma3n": ROUTING}
"""Its first layer takes a quantile, and torch.distributions looks at the value unless validation is off in the process."""
WRAPPED_EXPERTS = ("qwen3_next", "deepseek_v3")
"""Families whose fused experts have the names of linear layers, so that PEFT's LoRA parametrises them in every forward."""


def expected_fall_back(row: Row) -> str:
    """A part of the reason that the plan gives, or nothing."""
    if row.experts == "eager":
        return ROUTING
    if row.family in WRAPPED_EXPERTS and row.trained in ("lora", "rslora", "modules_to_save"):
        return PARAMETRISED
    if row.family == "qwen2_5_vl" and row.trained not in ("last half", "embeddings"):
        return WINDOWS  # the windows of its vision tower; frozen below all that is trained, it is not managed at all
    return ""


def peak_tolerance(row: Row) -> float:
    """How far a measured peak may be from the predicted one."""
    if row.experts == "eager":
        return 0.08  # planned with tokens spread evenly over the experts
    if row.base == "bnb 4-bit" and row.precision == "autocast":
        return 0.05  # its kernel returns another dtype there than its shape function says
    return 0.02
