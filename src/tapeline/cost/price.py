"""What an op costs: floating-point operations, counted from shapes.

The formulas are those of `torch.utils.flop_counter`; attention kernels that torch does not list (the fused CPU
kernel among them) are added here with the same convention: two operations per multiply-add, no discount for causal masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


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
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0


def _attention_forward(query: Any, key: Any, value: Any, *_: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad_out: Any, query: Any, key: Any, value: Any, *_: Any) -> int:
    return int(sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape))


def _gemm_4bit(a: Any, _: Any, shape_b: Any, *__: Any) -> int:
    return int(2 * a.numel() * shape_b[0])


_EXTRA: dict[str, Callable[..., int]] = {  # by name: a library's ops exist only once it is imported
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention_forward,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "bitsandbytes::gemm_4bit": _gemm_4bit,
}
