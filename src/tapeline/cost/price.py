"""What an op costs: floating-point operations counted from shapes, its class, and seconds at nominal rates.

The formulas are those of `torch.utils.flop_counter`; attention kernels that torch does not list (the fused CPU
kernel among them) are added here with the same convention: two operations per multiply-add, no discount for causal masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from tapeline.cost.rates import Rates

MATMUL, ATTENTION, MEMORY, OTHER = "matmul", "attention", "memory", "other"

# ops that read and write each element a few times, beside those that torch tags as pointwise
_MEMORY_OPS = {
    *("_to_copy", "clone", "copy_", "contiguous", "cat", "stack", "fill_", "zero_", "masked_fill", "masked_fill_"),
    *("sum", "mean", "amax", "amin", "var", "var_mean", "std", "norm", "linalg_vector_norm", "logsumexp", "all", "any"),
    *("_softmax", "_log_softmax", "native_layer_norm", "native_group_norm", "_fused_rms_norm", "native_dropout"),
    *("native_batch_norm", "argmax", "max", "min", "prod", "cumsum", "index_select", "embedding", "gather"),
    *("bernoulli_", "bernoulli", "rand", "rand_like", "randn_like", "uniform_", "normal_", "random_"),
    *("empty", "empty_like", "empty_strided", "new_empty", "zeros", "zeros_like", "new_zeros", "ones", "ones_like"),
    *("full", "full_like", "new_full", "arange", "scalar_tensor", "constant_pad_nd", "repeat", "tril", "triu", "roll"),
    *(
        "index",
        "slice_scatter",
        "select_scatter",
        "select_backward",
        "glu",
        "flip",
        "as_strided_copy",
        "view_copy",
        "_unsafe_view",
    ),
}


def count_flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Floating-point operations of one aten call; 0 for ops that only move or map elements.

    Args:
        func: the op overload, as a dispatch mode sees it.
        args: its positional arguments (tensors, real or fake).
        kwargs: its keyword arguments.
        out: what it returned.
    """
    own = _EXTRA.get(func.name())
    if own is not None:
        return own(*args)
    formula = flop_registry.get(getattr(func, "_overloadpacket", func))
    return int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0


def op_class(func: Any) -> str:
    """``matmul``, ``attention``, ``memory`` (as cheap as moving its operands), or ``other``: unknown, taken as costly.

    Args:
        func: an op overload.
    """
    packet = getattr(func, "_overloadpacket", None)
    name = func.name() if hasattr(func, "name") else str(func)
    short = name.split("::")[-1].split(".")[0]
    if "attention" in short:
        return ATTENTION
    if name in _EXTRA or packet in flop_registry:
        return MATMUL
    if short in _MEMORY_OPS or torch.Tag.pointwise in getattr(func, "tags", ()):
        return MEMORY
    return OTHER


def op_seconds(kind: str, flops: int, moved_bytes: int, rates: Rates) -> float:
    """Time of one op: the slower of computing and moving, and never less than its launch."""
    rate = {MATMUL: rates.matmul_flops, ATTENTION: rates.attention_flops}.get(kind, rates.matmul_flops)
    return max(flops / rate, moved_bytes / rates.memory_bytes, 0.0) + rates.op_seconds


def _attention_forward(query: Any, key: Any, value: Any, *_: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad_out: Any, query: Any, key: Any, value: Any, *_: Any) -> int:
    return int(sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape))


def _gemm_4bit(a: Any, _: Any, shape_b: Any, *__: Any) -> int:
    return int(2 * a.numel() * shape_b[0])


def _grouped_mm(first: Any, second: Any, *_: Any) -> int:
    """Each row, or column, is in one group, unless both operands have a dimension of groups."""
    groups = first.shape[0] if first.dim() == second.dim() == 3 else 1
    return int(2 * groups * first.shape[-2] * first.shape[-1] * second.shape[-1])


_EXTRA: dict[str, Callable[..., int]] = {  # by name: a library's ops exist only once it is imported
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention_forward,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten::_grouped_mm": _grouped_mm,
    "bitsandbytes::gemm_4bit": _gemm_4bit,
}
