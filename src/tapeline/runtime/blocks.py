"""Which modules of a model are its blocks: the repeated units whose activations are managed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from tapeline.errors import UnsupportedModelError, UsageError, did_you_mean

_LAYER_CLASS = "GradientCheckpointingLayer"


def find_blocks(model: nn.Module, blocks: Sequence[str] | None = None) -> list[str]:
    """Return the names of the blocks of `model`, in the order of registration.

    In order: the names or patterns of `blocks`; the layers that a transformers model marks as such; the members of
    module lists and sequences that hold at least two composite modules; the single member of a module list (one layer, or
    one that is shared by all depths).

    Args:
        model: any module.
        blocks: names as in `named_modules`, or patterns with ``*``, such as ``"encoder.layer.*"``.

    Raises:
        UsageError: if a name or pattern of `blocks` matches nothing, or two blocks are nested in each other.
        UnsupportedModelError: if no block is found.
    """
    if blocks is not None:
        return _named(model, blocks)
    found = _outermost([name for name, module in model.named_modules() if is_transformers_layer(module)])
    found = found or _outermost(_repeated(model, minimum=2)) or _outermost(_repeated(model, minimum=1))
    if not found:
        raise UnsupportedModelError(
            f"No blocks found in {type(model).__name__}: it has no transformer layers, and no module list or "
            "sequence with at least two composite modules. Name the modules to manage with "
            'blocks=["encoder.*", ...], or use mode="none".'
        )
    return found


def is_transformers_layer(module: nn.Module) -> bool:
    """Whether transformers itself checkpoints this module, through its per-layer function."""
    return any(cls.__name__ == _LAYER_CLASS for cls in type(module).__mro__)


def _named(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    if isinstance(patterns, str):
        raise UsageError(f"blocks must be a list of names, got the string {patterns!r}: use blocks=[{patterns!r}].")
    names = [name for name, _ in model.named_modules() if name]
    chosen: set[str] = set()
    for pattern in patterns:
        # ``*`` stands for one part of the name, as in "model.layers.*": deeper modules would be nested blocks
        depth = pattern.count(".")
        matches = [name for name in names if fnmatchcase(name, pattern) and name.count(".") == depth]
        if not matches:
            raise UsageError(f"No module matches {pattern!r} of blocks{did_you_mean(pattern, names)}.")
        chosen.update(matches)
    ordered = [name for name in names if name in chosen]
    if len(_outermost(ordered)) != len(ordered):
        nested = sorted(set(ordered) - set(_outermost(ordered)))
        raise UsageError(f"Blocks cannot be nested: {', '.join(nested)} lie inside other blocks.")
    return ordered


def start_training(model: nn.Module, names: Sequence[str]) -> None:
    """Put a model that is as it was loaded into training mode, as a training loop would.

    Adapters put on a loaded model say that they are training while all blocks are not. A model of which only some parts
    are in evaluation mode was made so on purpose, and is left alone.
    """
    if not any(model.get_submodule(name).training for name in names or ("",)):
        model.train()


def _repeated(model: nn.Module, *, minimum: int) -> list[str]:
    """Members of lists and sequences in which one class of composite module occurs at least `minimum` times."""
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential if minimum > 1 else nn.ModuleList):
            continue
        members = [(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]
        composite = [(path, child) for path, child in members if _is_composite(child)]
        classes = Counter(type(child) for _, child in composite)
        if classes and max(classes.values()) >= minimum:
            found += [path for path, _ in composite]
    return found


def _is_composite(module: nn.Module) -> bool:
    has_forward = not isinstance(module, nn.ModuleList | nn.ModuleDict)
    return has_forward and any(True for _ in module.children()) and any(True for _ in module.parameters())


def _outermost(names: list[str]) -> list[str]:
    known = set(names)
    return [name for name in names if not any(prefix in known for prefix in _prefixes(name))]


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]
