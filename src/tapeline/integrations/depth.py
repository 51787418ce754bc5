"""Fewer layers for the same plan: a short model with two layers of each kind that the full one has.

Layers of one kind cost the same: their parameters, what autograd saves of them, their operations. Two of each kind are
kept, because the first block of a model may save less than its like: nothing below it is trained.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from tapeline.errors import UnsupportedModelError
from tapeline.integrations.transformers import build_on_meta
from tapeline.runtime.blocks import find_blocks
from tapeline.tape.sources import attached

_PER_KIND = 2
_INDICES = frozenset({"layer_idx", "layer_index", "layer_id", "layer_number"})
"""Attributes that number the layers; what tells kinds apart is what depends on them."""
_PLAIN = (bool, int, float, str, type(None), torch.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """What the parameters and buffers of a model come to."""

    num_parameters: int
    """Numbers in the parameters; two to a byte where they are packed."""
    weight_bytes: int
    """Bytes of the parameters, with what hangs on them (quantisation state), and of the buffers."""
    num_trainable: int
    """Numbers in the parameters that require grad."""
    trainable_bytes: int
    """Bytes of the parameters that require grad."""


def shortened(config: Any) -> tuple[Any, list[int]]:
    """Reduce the layers of a causal language model to the first two of each kind.

    The kinds are read from the layers themselves, built without memory, and from the lists of the configuration
    with one entry per layer (sliding or full attention, rotary positions or none). Where a rule makes the kinds (every
    fourth layer is a mixture of experts), the short model is the beginning of the full one up to the second layer of
    each kind. Where neither works, because layers depend on each other across the model, nothing is left out.

    Args:
        config: of a model of transformers; it is not changed.

    Returns:
        The short configuration, and for each layer of the full model the index of its equal in the short one.

    Raises:
        UsageError: if no model can be built from it.
        UnsupportedModelError: if it has no layers that can be told apart by number.
    """
    per_layer = _per_layer(config.get_text_config())
    kinds = _layer_kinds(config, per_layer)
    places: dict[Any, list[int]] = {}
    for index, kind in enumerate(kinds):
        places.setdefault(kind, []).append(index)
    chosen = sorted(index for indices in places.values() for index in indices[:_PER_KIND])
    for kept in (chosen, list(range(chosen[-1] + 1))):
        short = _with_layers(config, kept, per_layer)
        if short is not None and _kinds_or_none(short, per_layer) == [kinds[index] for index in kept]:
            return short, [_equal_of(index, places[kind], kept) for index, kind in enumerate(kinds)]
    return copy.deepcopy(config), list(range(len(kinds)))


def full_size(model: nn.Module, kinds: Sequence[int]) -> Size:
    """The size of the full model, from its short one: what is outside the layers, and each layer as often as it is there.

    Args:
        model: built from the short configuration; adapters and quantised weights are counted as they are.
        kinds: as `shortened` returned them.
    """
    times = Counter(kinds)
    counts = {name: times[index] for index, name in enumerate(layer_names(model))}
    owners: dict[int, set[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in named:
        tensors[id(tensor)] = tensor
        owners.setdefault(id(tensor), set()).add(next((part for part in _prefixes(name) if part in counts), ""))
    totals = Counter[str]()
    for key, tensor in tensors.items():
        layer, *others = owners[key]
        factor = 1 if others else counts.get(layer, 1)  # what several layers share is there once
        totals.update({kind: value * factor for kind, value in _sizes(tensor).items()})
    return Size(
        num_parameters=totals["num_parameters"],
        weight_bytes=totals["weight_bytes"],
        num_trainable=totals["num_trainable"],
        trainable_bytes=totals["trainable_bytes"],
    )


def layer_names(model: nn.Module) -> list[str]:
    """The names of the layers that a configuration counts, in their order; a vision tower's are not among them.

    Raises:
        UnsupportedModelError: if there is no such run of blocks.
    """
    config: Any = model.config
    depth = config.get_text_config().num_hidden_layers
    runs: dict[str, list[str]] = {}
    for name in find_blocks(model):
        runs.setdefault(name.rpartition(".")[0], []).append(name)
    found = [names for names in runs.values() if len(names) == depth]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {depth} layers in a row ({', '.join(map(str, map(len, runs.values())))} blocks): "
            "its depth cannot be changed."
        )
    return found[-1]  # towers for images and sound come before the text


def _layer_kinds(config: Any, per_layer: Sequence[str]) -> list[Any]:
    """What each layer is like; equal for layers that cost the same."""
    model = build_on_meta(copy.deepcopy(config))
    names = layer_names(model)
    lists = [getattr(config.get_text_config(), key) for key in per_layer]
    return [
        (tuple(repr(values[index]) for values in lists), _structure(model.get_submodule(name)))
        for index, name in enumerate(names)
    ]


def _kinds_or_none(config: Any, per_layer: Sequence[str]) -> list[Any] | None:
    try:
        return _layer_kinds(config, per_layer)
    except Exception:  # noqa: BLE001 - a configuration may refuse this depth with any error; another way is tried
        return None


def _structure(layer: nn.Module) -> tuple[Any, ...]:
    """Classes, plain attributes, and the shapes and dtypes of parameters and buffers."""
    found: list[Any] = []
    for name, part in layer.named_modules():
        plain = {key: value for key, value in vars(part).items() if isinstance(value, _PLAIN) and key not in _INDICES}
        tensors = {**part._parameters, **part._buffers}
        shapes = {key: None if t is None else (tuple(t.shape), t.dtype) for key, t in tensors.items()}
        found.append((name, type(part), tuple(plain.items()), tuple(shapes.items())))
    return tuple(found)


def _with_layers(config: Any, kept: Sequence[int], per_layer: Sequence[str]) -> Any | None:
    short = copy.deepcopy(config)
    text = short.get_text_config()
    try:
        for key in per_layer:
            values = getattr(text, key)
            setattr(text, key, type(values)(values[index] for index in kept))
        text.num_hidden_layers = len(kept)
    except Exception:  # noqa: BLE001 - as above
        return None
    return short


def _per_layer(text: Any) -> list[str]:
    """Which fields of a configuration are lists with one entry per layer."""
    lists = {key: values for key, values in vars(text).items() if isinstance(values, list | tuple)}
    return [key for key, values in lists.items() if len(values) == text.num_hidden_layers and not _are_indices(values)]


def _are_indices(values: Sequence[Any]) -> bool:
    """Whether a list numbers layers or tokens; which layers it means shows in the layers."""
    return len(values) > 1 and all(type(v) is int for v in values) and all(a < b for a, b in pairwise(values))


def _equal_of(index: int, like: Sequence[int], kept: Sequence[int]) -> int:
    """Where the equal of a layer is in the short model: the first of a kind is itself, all others are the second."""
    return kept.index(index if index == like[0] else like[1])


def _sizes(tensor: torch.Tensor) -> dict[str, int]:
    is_parameter = isinstance(tensor, nn.Parameter)
    state = getattr(tensor, "quant_state", None)
    num = int(torch.Size(state.shape).numel()) if state is not None else tensor.numel()
    num_bytes = tensor.nbytes + sum(part.nbytes for _, part in attached(tensor))
    trained = is_parameter and tensor.requires_grad
    return {
        "num_parameters": num * is_parameter,
        "weight_bytes": num_bytes,
        "num_trainable": num * trained,
        "trainable_bytes": num_bytes * trained,
    }


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:depth]) for depth in range(1, len(parts)))
