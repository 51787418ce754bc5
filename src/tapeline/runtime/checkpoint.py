"""torch's non-reentrant checkpoint, with tensor keyword arguments treated like positional ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from tapeline.compat import CHECKPOINT_DEFAULTS
from tapeline.errors import UsageError

_OPTIONS = ("context_fn", "determinism_check", "debug", "early_stop", "preserve_rng_state", *CHECKPOINT_DEFAULTS)


def checkpoint(
    fn: Callable[..., Any],
    *args: Any,
    use_reentrant: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Run ``fn(*args, **kwargs)`` keeping its inputs instead of its activations; recompute it in backward.

    This is `torch.utils.checkpoint.checkpoint` in its non-reentrant form and takes all its keyword arguments
    (``preserve_rng_state``, ``context_fn``, ``determinism_check``, ``debug``, ``early_stop``). One thing is added: tensors
    in keyword arguments, also inside tuples, are saved like positional ones, so that an in-place change of one
    before backward is an error and saved-tensor hooks see them.

    Args:
        fn: what to run. It is called again in backward and must compute the same.
        *args: its positional arguments; tensors of any shape.
        use_reentrant: ``None`` or ``False``. The reentrant form is refused.
        **kwargs: its keyword arguments, and the options of torch's function.

    Returns:
        What ``fn`` returns.

    Raises:
        UsageError: for ``use_reentrant=True``, which gives no gradient when no input requires one, ignores
            ``torch.autograd.grad`` and runs hooks twice.

    Example:
        >>> import torch, tapeline
        >>> x = torch.ones(3, requires_grad=True)
        >>> tapeline.checkpoint(lambda a, scale: (a * scale).sin().sum(), x, scale=torch.tensor(2.0)).backward()
        >>> bool(torch.equal(x.grad, 2 * torch.cos(torch.tensor([2.0, 2.0, 2.0]))))
        True
    """
    if use_reentrant:
        raise UsageError(
            "use_reentrant=True is not supported: reentrant checkpointing gives no gradients, without an error, when no "
            "input requires grad, and does not work with torch.autograd.grad. Leave the argument out."
        )
    options = CHECKPOINT_DEFAULTS | {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    taken, tensors = _take_tensors(kwargs)
    if not taken:
        return torch_checkpoint(fn, *args, use_reentrant=False, **options, **kwargs)
    call = _Call(fn, len(args), kwargs, taken)
    return torch_checkpoint(call, *args, *tensors, use_reentrant=False, **options)


class _Call:
    """Calls a function with the tensors of its keyword arguments given by position."""

    def __init__(
        self, fn: Callable[..., Any], num_args: int, kwargs: dict[str, Any], taken: list[tuple[str, int | None]]
    ) -> None:
        self.fn, self.num_args, self.kwargs, self.taken = fn, num_args, kwargs, taken

    def __call__(self, *args: Any) -> Any:
        kwargs = dict(self.kwargs)
        for (name, index), tensor in zip(self.taken, args[self.num_args :], strict=True):
            kwargs[name] = tensor if index is None else _replace(kwargs[name], index, tensor)
        return self.fn(*args[: self.num_args], **kwargs)


def _take_tensors(kwargs: dict[str, Any]) -> tuple[list[tuple[str, int | None]], list[torch.Tensor]]:
    """Take tensors out of `kwargs` (changed in place); return where they were, and the tensors."""
    places: list[tuple[str, int | None]] = []
    tensors: list[torch.Tensor] = []
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor):
            kwargs[name] = None
            places.append((name, None))
            tensors.append(value)
        elif type(value) is tuple:
            for index, item in enumerate(value):
                if isinstance(item, torch.Tensor):
                    kwargs[name] = _replace(kwargs[name], index, None)
                    places.append((name, index))
                    tensors.append(item)
    return places, tensors


def _replace(values: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
    return (*values[:index], item, *values[index + 1 :])
