from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from tapeline.cost.price import count_flops
from tapeline.ledger import Ledger, Span
from tests.models import TinyModel


def counted(run: Any) -> int:
    total: Counter[str] = Counter()

    def observe(func: Any, args: Any, kwargs: Any, out: Any, span: Span) -> None:
        total["flops"] += count_flops(func, args, kwargs, out)

    with Ledger(observe=observe):
        run()
    return total["flops"]


def test_matrix_products_are_two_operations_per_multiply_add() -> None:
    assert counted(lambda: torch.ones(3, 5) @ torch.ones(5, 7)) == 2 * 3 * 5 * 7
    assert counted(lambda: torch.ones(3, 5) + 1) == 0


def test_a_grouped_product_counts_every_row_once() -> None:
    """Of tokens sorted by expert, with the weights of each expert; and of one matrix for each group."""
    rows, weights, ends = torch.randn(24, 16), torch.randn(3, 16, 32), torch.tensor([8, 16, 24], dtype=torch.int32)
    rows, weights = rows.bfloat16(), weights.bfloat16()
    assert counted(lambda: torch._grouped_mm(rows, weights, offs=ends)) == 2 * 24 * 16 * 32
    assert counted(lambda: torch._grouped_mm(rows.view(3, 8, 16), weights)) == 2 * 3 * 8 * 16 * 32


def test_fused_attention_on_a_cpu_counts_as_its_two_products() -> None:
    query = torch.randn(2, 4, 32, 16, requires_grad=True)
    key, value = torch.randn(2, 2, 2, 32, 16, requires_grad=True).unbind()
    forward = 2 * (2 * 4 * 32 * 32 * 16) * 2

    def run() -> None:
        scaled_dot_product_attention(query, key, value, enable_gqa=True).sum().backward()

    assert counted(run) == forward + forward // 2 * 5  # backward: five products of the size of the forward's two


def test_agrees_with_the_flop_counter_of_torch_outside_attention(llama: TinyModel) -> None:
    llama.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        llama.loss_fn(llama.model, llama.batch).backward()
    assert counted(lambda: llama.loss_fn(llama.model, llama.batch).backward()) == counter.get_total_flops()
