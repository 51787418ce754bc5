"""Differences between supported releases of torch, in one place. Each says which release removes it."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import torch.utils._python_dispatch
import torch.utils.checkpoint

_CHECKPOINT_PARAMETERS = inspect.signature(torch.utils.checkpoint.checkpoint).parameters

# torch 2.14 lets the caller say whether tensors that selective checkpointing caches go through saved-tensor hooks, and
# will change its default. Remove when torch < 2.14 is no longer supported, and pass the argument always.
CHECKPOINT_DEFAULTS: dict[str, Any] = (
    {"respect_saved_tensors_hooks": True} if "respect_saved_tensors_hooks" in _CHECKPOINT_PARAMETERS else {}
)


def foreign_hooks() -> tuple[tuple[Any, Any] | None, bool]:
    """The saved-tensor hook pair of somebody else that is in force now, and whether it can be composed with.

    Those of torch's checkpoint cannot: it counts what is packed, and recomputes the block itself. torch has no public
    way to ask; remove when it does.
    """
    if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:
        return None, False
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if top is None:
        return None, True
    return (top[0], top[1]), not getattr(top[0], "__module__", "").startswith("torch.utils.checkpoint")


def has_transforms() -> bool:
    """Whether a functorch transform (vmap, grad, jvp) is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host ran out of memory; on a CPU torch raises a plain `RuntimeError`."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def attention_kernels() -> tuple[bool, ...]:
    """Which kernels `scaled_dot_product_attention` may choose."""
    return (
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
    )


def allow_attention_kernels(allowed: tuple[bool, ...]) -> None:
    """Allow what `attention_kernels` said; `torch.nn.attention.sdpa_kernel` knows no set of none."""
    torch._C._set_sdp_use_flash(allowed[0])
    torch._C._set_sdp_use_mem_efficient(allowed[1])
    torch._C._set_sdp_use_math(allowed[2])
    torch._C._set_sdp_use_cudnn(allowed[3])


Autocast = tuple[tuple[str, torch.dtype], ...]
"""The kinds of device that autocast is on for, each with its dtype."""

AUTOCAST_KINDS = ("cpu", "cuda", "xpu", "mps")
_AUTOCAST_KEYS = {kind: getattr(torch._C.DispatchKey, f"Autocast{kind.upper()}") for kind in AUTOCAST_KINDS}


def autocast_state() -> Autocast:
    """What autocast is on for now."""
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in _AUTOCAST_KEYS if torch.is_autocast_enabled(kind))


def autocast_of_caller() -> Autocast:
    """What autocast was on for where the op was called that a dispatch mode is handling: inside the mode it is off.

    Uses what torch's own handling of modes uses; there is no public way to ask.
    """
    with torch._C._RestorePythonTLSSnapshot():  # type: ignore[attr-defined]
        return autocast_state()


def run_op(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the op that a dispatch mode is handling as it runs without the mode.

    The kernel of an op from outside torch may be Python, and then autocast decides what it computes.
    """
    if is_native(func) or not (kinds := autocast_of_caller()):
        return func(*args, **kwargs)
    with ExitStack() as stack:
        for kind, _ in kinds:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(_AUTOCAST_KEYS[kind], False))
        return func(*args, **kwargs)


def forget_stale_modes() -> None:
    """Correct torch's note that a dispatch mode is active, where none is: two threads that enter and leave modes in turn spoil it.

    torch keeps it for the whole process, without a public way to ask or to set it; remove when it is one for each thread.
    """
    dispatch = torch.utils._python_dispatch
    if not dispatch._get_current_dispatch_mode_stack():
        for name in ("_is_in_torch_dispatch_mode", "_is_in_any_mode_without_ignore_compile_internals"):
            if getattr(dispatch, name, False):
                setattr(dispatch, name, False)


def is_native(func: Any) -> bool:
    """Whether an op is torch's own."""
    return getattr(func, "namespace", "aten") in {"aten", "prim", "prims"}
