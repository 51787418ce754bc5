"""torch's non-reentrant checkpoint, with tensor keyword arguments treated like positional ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from tapeline.compat import CHECKPOINT_DEFAULTS, foreign_hooks
from tapeline.errors import UsageError
from tapeline.runtime.guard import changed

_PLACE = object()
_OPTIONS = ("context_fn", "determinism_check", "debug", "early_stop", "preserve_rng_state", *CHECKPOINT_DEFAULTS)


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    use_reentrant: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Run ``function(*args, **kwargs)`` keeping its inputs instead of its activations; recompute it in backward.

    This is `torch.utils.checkpoint.checkpoint` in its non-reentrant form and takes all its keyword arguments
    (``preserve_rng_state``, ``context_fn``, ``determinism_check``, ``debug``, ``early_stop``). One thing is added: tensors
    in keyword arguments, also inside tuples, are saved like positional ones, so that an in-place change of one
    before backward is an error and saved-tensor hooks see them. An in-place change of a tensor inside a list or dict is an
    error as well; inside other objects it is not seen, as in torch.

    Args:
        function: what to run. It is called again in backward and must compute the same.
        *args: its positional arguments; tensors of any shape.
        use_reentrant: ``None`` or ``False``. The reentrant form is refused.
        **kwargs: its keyword arguments, and the options of torch's function.

    Returns:
        What `function` returns.

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
    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    return run_checkpointed(function, args, kwargs, options)


def run_checkpointed(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any] | None = None
) -> Any:
    """`checkpoint` with the arguments of the function and the options apart, so that no name can be mistaken."""
    options = CHECKPOINT_DEFAULTS | (options or {})
    call = _Call(function, args, kwargs)
    tensors, call.tensors = call.tensors, []  # torch saves them; held here as well, hooks could not move them
    return torch_checkpoint(call, *tensors, use_reentrant=False, **options)


class _Call:
    """Calls a function with the tensors of its arguments given by position.

    Tensors in lists, dicts and other containers stay where they are; an in-place change of one is noticed here.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.function, self.has_run = function, False
        self.tensors: list[torch.Tensor] = []
        self.unsaved: list[tuple[torch.Tensor, int]] = []
        self.args = [self._take(value) for value in args]
        self.kwargs = {name: self._take(value) for name, value in kwargs.items()}

    def __call__(self, *tensors: torch.Tensor) -> Any:
        for tensor, version in self.unsaved:
            if tensor._version != version:
                raise RuntimeError(
                    "A tensor needed to recompute a checkpointed function has been modified by an inplace operation: it "
                    f"was passed inside a container, is at version {tensor._version}, expected {version}."
                )
        places = iter(tensors)
        args = [_put(value, places) for value in self.args]
        kwargs = {name: _put(value, places) for name, value in self.kwargs.items()}
        if torch.compiler.is_compiling():
            return self.function(*args, **kwargs)
        is_recompute, self.has_run = self.has_run, True
        with _written_is_an_error() if is_recompute else nullcontext():
            return self.function(*args, **kwargs)

    def _take(self, value: Any) -> Any:
        """Replace tensors, also those in tuples, by a place to put them back."""
        if isinstance(value, torch.Tensor):
            if _is_inference(value):
                return value
            self.tensors.append(value)
            return _PLACE
        if isinstance(value, tuple):
            return _Tuple(type(value), [self._take(item) for item in value])
        if isinstance(value, (list, dict)) and not torch.compiler.is_compiling():
            leaves = (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
            self.unsaved += [(leaf, leaf._version) for leaf in leaves if not leaf.is_inference()]
        return value


@contextmanager
def _written_is_an_error() -> Iterator[None]:
    """Raise if what is saved inside is written before the end: torch would hand the new content to backward."""
    hooks, _ = foreign_hooks()
    if hooks is None:
        yield
        return
    saved: list[tuple[torch.Tensor, int]] = []

    def pack(tensor: torch.Tensor) -> Any:
        if not tensor.is_inference():
            saved.append((tensor.detach(), tensor._version))
        return hooks[0](tensor)

    pack.__module__ = hooks[0].__module__
    try:
        with saved_tensors_hooks(pack, hooks[1]):
            yield
    finally:
        for tensor, version in saved:
            if tensor._version != version:
                raise RuntimeError(changed(tensor, version, "for gradient computation"))


class _Tuple:
    """A tuple, or named tuple, with places instead of tensors."""

    def __init__(self, kind: type[tuple[Any, ...]], items: list[Any]) -> None:
        self.kind, self.items = kind, items


def _put(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    if value is _PLACE:
        return next(tensors)
    if isinstance(value, _Tuple):
        items = [_put(item, tensors) for item in value.items]
        return value.kind(*items) if hasattr(value.kind, "_fields") else value.kind(items)
    return value


def _is_inference(tensor: torch.Tensor) -> bool:
    """Autograd cannot save inference tensors; torch takes them as keyword arguments, and so do we."""
    return not torch.compiler.is_compiling() and tensor.is_inference()
