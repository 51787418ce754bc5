"""PEFT: adapters on a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from tapeline.errors import UsageError
from tapeline.integrations.transformers import quiet_transformers


def add_lora(model: nn.Module, *, r: int, alpha: int, dropout: float, target_modules: str) -> nn.Module:
    """Freeze a causal language model and put LoRA adapters on it.

    The base is left as it is: norms and head are not cast to float32, inputs are not made to require gradients.

    Args:
        model: the model, quantised or not.
        r: rank of the adapters.
        alpha: scaling; the adapter's output is multiplied by ``alpha / r``.
        dropout: dropout on the adapter's input.
        target_modules: ``all-linear``, or names of modules separated by commas.

    Raises:
        UsageError: if no module is matched.
    """
    from peft import LoraConfig, get_peft_model

    targets: Any = target_modules if target_modules == "all-linear" else [t.strip() for t in target_modules.split(",")]
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM", bias="none"
    )
    try:
        with quiet_transformers():
            return get_peft_model(model, config)
    except ValueError as error:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise UsageError(f"Cannot add adapters: {error} Linear modules here: {', '.join(linear)}.") from error
