"""bitsandbytes: base weights in 4 bits, real ones while a model is loaded, or none at all for planning."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tapeline.errors import UsageError

_STATE_BLOCK = 256
"""Numbers that share a scale where the scales themselves are quantised; bitsandbytes has no other."""
_CODES = 256
"""Entries of the table that 8-bit scales are looked up in."""


def nf4_config(compute_dtype: torch.dtype, *, double_quant: bool) -> Any:
    """Settings for `from_pretrained`: weights as nf4, which are multiplied in another dtype.

    Args:
        compute_dtype: dtype of the products.
        double_quant: quantise the scales as well, to 8 bits: 0.4 bits less per weight.

    Raises:
        UsageError: if bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UsageError("load_in_4bit needs bitsandbytes: pip install 'tapeline[qlora]'.") from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def quantise_without_data(model: Any, *, double_quant: bool = False) -> None:
    """Give a model without weights the packed weights that loading it in 4 bits would, also without data.

    transformers chooses the layers, as it does while loading: all linear ones but the head; fused experts stay as they
    are. The memory of the packed weights and of their scales is never written.

    Args:
        model: a model of transformers whose weights have not been read; it is changed in place.
        double_quant: as in `nf4_config`.

    Raises:
        UsageError: if bitsandbytes is not installed, or the model has no linear layers.
    """
    config = nf4_config(model.dtype, double_quant=double_quant)
    from bitsandbytes.nn import Linear4bit
    from transformers.quantizers.auto import AutoHfQuantizer

    before = dict(model.named_modules())
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model, device_map=None)
    replaced = [(name, part) for name, part in model.named_modules() if isinstance(part, Linear4bit)]
    if not replaced:
        raise UsageError(f"{type(model).__name__} has no linear layers that can be quantised: leave load_in_4bit out.")
    for name, linear in replaced:
        _pack(linear, before[name])
    quantizer.postprocess_model(model)


def _pack(linear: Any, original: nn.Module) -> None:
    """Put empty packed weights into a layer that has been made for them."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Params4bit

    was: Any = original.weight
    settings = {name: getattr(linear.weight, name) for name in ("blocksize", "quant_type", "quant_storage")}
    shape = (linear.out_features, linear.in_features)
    # the scales are made below: bitsandbytes would keep a table on the meta device for later, real calls
    packed, state = quantize_4bit(
        torch.empty(shape, dtype=was.dtype, device="meta"), compress_statistics=False, **settings
    )
    state.code = torch.empty_like(state.code, device=was.device)
    state.absmax = torch.empty_like(state.absmax, device=was.device)
    if linear.weight.compress_statistics:
        _quantise_scales(state)
    linear.weight = Params4bit(
        torch.empty_like(packed, device=was.device),
        requires_grad=False,
        quant_state=state,
        compress_statistics=linear.weight.compress_statistics,
        module=linear,
        bnb_quantized=True,
        **settings,
    )
    linear.quant_state = state
    linear.bias = original.bias
    if linear.bias is not None:
        linear.bias.requires_grad_(False)


def _quantise_scales(state: Any) -> None:
    from bitsandbytes.functional import QuantState

    scales = state.absmax
    state.state2 = QuantState(
        absmax=scales.new_empty(-(-scales.numel() // _STATE_BLOCK)),
        code=scales.new_empty(_CODES),
        blocksize=_STATE_BLOCK,
        dtype=scales.dtype,
    )
    state.absmax = torch.empty_like(scales, dtype=torch.uint8)
    state.offset = scales.new_empty(())
    state.nested = True
