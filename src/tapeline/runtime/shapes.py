"""The shape of a batch, and the buckets that shapes are planned in.

Training batches differ in length, and the last one in size. What a plan decides changes little from one length to the next, so
shapes share a plan with all that are not more than a fifth smaller in either dimension, and it holds for the largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves, tree_map

GROWTH = 1.25
"""From one edge of the grid to the next."""
_LEADING = ("input_ids", "inputs_embeds", "decoder_input_ids", "input_features", "pixel_values")
_MASK = "mask"
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Shape(NamedTuple):
    """What the memory of a step depends on, as far as the batch says."""

    batch: int
    """Sequences."""
    length: int
    """Tokens of each, or the second dimension of whatever else the first tensor is; 1 without one."""
    is_padded: bool = False
    """Whether a mask leaves something out; models compute such batches with other kernels."""

    def covers(self, other: Shape) -> bool:
        """Whether a plan for this shape is safe for the other one."""
        return self.batch >= other.batch and self.length >= other.length and self.is_padded >= other.is_padded

    def bucket(self, largest: Shape) -> Shape:
        """The upper corner of the bucket that this shape is in; the grid ends at `largest`, and is fine enough below it."""
        return Shape(_edge(self.batch, largest.batch), _edge(self.length, largest.length), self.is_padded)

    def __str__(self) -> str:
        return f"{self.batch} x {self.length}{' (padded)' if self.is_padded else ''}"


def shape_of(values: Any) -> Shape | None:
    """The shape of a batch, or of the arguments of a model: of the tokens, else of the first tensor.

    Args:
        values: tensors in any nesting of tuples, lists and dicts.

    Returns:
        ``None`` if there is no tensor with a dimension, or an empty one.
    """
    named = dict(_named(values))
    leading = next((named[name] for name in _LEADING if name in named), None)
    if leading is None:
        leading = next((leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.dim()), None)
    if leading is None or leading.dim() == 0 or leading.numel() == 0:
        return None
    is_padded = any(_may_leave_out(tensor) for name, tensor in named.items() if _MASK in name)
    return Shape(leading.shape[0], leading.shape[1] if leading.dim() > 1 else 1, is_padded)


def named_tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors among the arguments of a call by name; those without a name have their number."""
    found = dict(_named(kwargs))
    leaves = (leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
    return {str(number): leaf for number, leaf in enumerate(leaves)} | found


def _may_leave_out(mask: torch.Tensor) -> bool:
    """Whether a mask leaves something out; one on an accelerator is not looked at, which would wait for all kernels."""
    return mask.dim() != 2 or not _is_whole(mask) or mask.device.type != "cpu" or bool((mask == 0).any())


def cut(batch: Any, largest: Shape, shape: Shape) -> Any:
    """Cut every tensor of a batch of shape `largest` down to `shape`, which is not larger.

    The first dimension is that of the sequences where it has their number; the length is the second one, or else every later
    one that has it, as in a mask of tokens by tokens.
    """

    def cut_leaf(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0:
            return tensor
        sizes = cut_shape(tuple(tensor.shape), largest, shape)
        return tensor[tuple(slice(size) for size in sizes)].contiguous()

    return tree_map(cut_leaf, batch)


def cut_shape(sizes: Sequence[int], largest: Shape, shape: Shape) -> tuple[int, ...]:
    """The dimensions of one tensor of a batch of shape `largest` that is cut down to `shape`."""
    lengths = [place for place in range(1, len(sizes)) if sizes[place] == largest.length]
    taken = lengths[:1] if lengths[:1] == [1] else lengths
    cut_sizes = [shape.length if place in taken else size for place, size in enumerate(sizes)]
    if cut_sizes and sizes[0] == largest.batch:
        cut_sizes[0] = shape.batch
    return tuple(cut_sizes)


def lay_over(batch: Any, call: Mapping[str, Any], *, is_padded: bool) -> Any:
    """Give the masks and token numbers of a batch the values that a call of no larger shape had, where names agree.

    Models look at the values of these: padding and packed sequences take other ways than plain ones.

    Args:
        batch: tensors by name; anything else stays as it is.
        call: tensors by name.
        is_padded: whether a mask may leave anything out.
    """
    if not isinstance(batch, Mapping):
        return batch
    laid = {
        name: torch.ones_like(value)
        if isinstance(value, torch.Tensor) and _is_mask(name, value) and not is_padded
        else value
        for name, value in batch.items()
    }
    for name, given in call.items():
        below = laid.get(name)
        if not (isinstance(given, torch.Tensor) and isinstance(below, torch.Tensor) and _is_whole(given)):
            continue
        if given.dim() == below.dim() > 0 and given.dtype == below.dtype:
            index = tuple(slice(min(*sizes)) for sizes in zip(given.shape, below.shape, strict=True))
            laid[name] = below.clone()
            laid[name][index] = given[index].to(below.device)
    for name, tensor in laid.items():
        if is_padded and isinstance(tensor, torch.Tensor) and _is_mask(name, tensor) and bool((tensor != 0).all()):
            laid[name] = tensor.clone()
            laid[name][0, -1] = 0
    return laid


def _edge(size: int, largest: int) -> int:
    """The smallest edge of the grid that is not below `size`; the size itself beyond the grid."""
    edge = largest
    while 0 < size <= int(edge / GROWTH):
        edge = int(edge / GROWTH)
    return max(edge, size)


def _is_mask(name: str, tensor: torch.Tensor) -> bool:
    return _MASK in name and tensor.dim() == 2 and _is_whole(tensor)


def _is_whole(tensor: torch.Tensor) -> bool:
    return tensor.dtype in _INTEGERS


def _named(values: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that have a name somewhere on the way to them."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                yield str(name), value
            else:
                yield from _named(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _named(value)
