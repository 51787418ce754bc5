"""Llama-shaped blocks by formula: what a plan can be made from before anything is recorded.

Rates are achieved ones. A matrix product of ``n x i`` by ``i x o`` takes ``2 i o n`` operations and moves ``2 (i o + (i + o) n)`` bytes in
two-byte floats; attention is causal and fused. An operation takes the longer of computing and moving, and its launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tapeline.planner.stage import Stage, StageOp

Training = Literal["full", "lora", "frozen"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Achieved rates of a device."""

    matmul_flops: float
    """Floating-point operations per second."""
    memory_bytes: float
    """Bytes per second."""
    op_seconds: float = 4e-6
    """What launching an operation takes at least."""
    attention_share: float = 0.75
    """Rate of the attention forward, as a share of that of matrix products."""
    attention_backward_share: float = 0.55


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a llama-shaped model."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int


LLAMA_2_7B = Shape(
    num_layers=32, hidden=4096, intermediate=11008, num_heads=32, num_kv_heads=32, head_dim=128, vocabulary=32000
)
LLAMA_3_8B = Shape(
    num_layers=32, hidden=4096, intermediate=14336, num_heads=32, num_kv_heads=8, head_dim=128, vocabulary=128256
)
LLAMA_3_70B = Shape(
    num_layers=80, hidden=8192, intermediate=28672, num_heads=64, num_kv_heads=8, head_dim=128, vocabulary=128256
)
LLAMA_3_2_1B = Shape(
    num_layers=16, hidden=2048, intermediate=8192, num_heads=32, num_kv_heads=8, head_dim=64, vocabulary=128256
)

VALUES = ("x", "n1", "qkv", "o", "x2", "n2", "g", "u", "p", "y")
X, N1, QKV, OUT, X2, N2, G, U, P, Y = range(10)


class LlamaBlock:
    """Builds the stage of one block.

    Args:
        shape: sizes of the model.
        speed: rates of the device.
        length: tokens of a sequence.
        batch: sequences.
        training: what is trained: all weights, adapters on the seven linear layers, or nothing in this block.
        lora_r: rank of the adapters.
        is_4bit: the base is quantised to 4 bits, and dequantised in each pass.
    """

    def __init__(
        self,
        shape: Shape,
        speed: Speed,
        *,
        length: int,
        batch: int,
        training: Training = "full",
        lora_r: int = 16,
        is_4bit: bool = False,
    ) -> None:
        self.shape, self.speed, self.training = shape, speed, training
        self.length, self.num_tokens = length, length * batch
        self.lora_r, self.is_4bit = lora_r, is_4bit
        self.q_width = shape.num_heads * shape.head_dim
        self.kv_width = shape.num_kv_heads * shape.head_dim

    def stage(self) -> Stage:
        """The block as values and operations; the attention part and the MLP part are planned separately."""
        n, h, f, q, kv = self.num_tokens, self.shape.hidden, self.shape.intermediate, self.q_width, self.kv_width
        row, qkv, mid, o = 2 * n * h, 2 * n * (q + 2 * kv), 2 * n * f, 2 * n * q
        log_sum_exp = 4 * n * self.shape.num_heads
        sizes = (row, row, qkv, o + log_sum_exp, row, row, mid, mid, mid, row)
        trained = self.training != "frozen"
        norm, silu = self._moved(4 * h * n), self._moved(6 * f * n)
        rope, residual = self._moved(4 * (q + kv) * n), self._moved(6 * h * n)
        qkv_time, out_time = self._linear(h, q + 2 * kv, 3), self._linear(q, h, 1)
        wide, narrow = self._linear(h, f, 1), self._linear(f, h, 1)
        norm_back = self._moved(8 * h * n)

        def op(name: str, times: tuple[float, float], reads: tuple[int, ...], makes: int, needs: tuple[int, ...],
               incoming: int, running: int, flops: int = 0) -> StageOp:  # fmt: skip
            return StageOp(
                name=name,
                seconds=times[0],
                backward_seconds=times[1],
                reads=reads,
                makes=(makes,),
                needs=needs,
                incoming_bytes=incoming,
                backward_bytes=running,
                flops=flops,
            )

        def used(value: int) -> tuple[int, ...]:
            return (value,) if trained else ()

        wide_flops, ops = 2 * h * f * n, []
        ops.append(op("norm1", (norm, norm_back), (X,), N1, (X,), 2 * row, 3 * row))
        ops.append(
            op("qkv", (qkv_time[0] + rope, qkv_time[1] + rope), (N1,), QKV, used(N1), row + qkv, 2 * row + qkv,
               2 * h * (q + 2 * kv) * n)
        )  # fmt: skip
        attention = self._attention()
        ops.append(
            op("attention", attention, (QKV,), OUT, (QKV, OUT), row + o, row + o + qkv + 2 * o, 2 * self.length * q * n)
        )
        ops.append(
            op("o_proj", (out_time[0] + residual, out_time[1]), (OUT, X), X2, used(OUT), row, row + o, 2 * q * h * n)
        )
        ops.append(op("norm2", (norm, norm_back), (X2,), N2, (X2,), 2 * row, 3 * row))
        ops.append(op("gate", wide, (N2,), G, used(N2), 2 * row + mid, 3 * row + mid, wide_flops))
        ops.append(op("up", wide, (N2,), U, used(N2), row + 2 * mid, 2 * row + 2 * mid, wide_flops))
        ops.append(op("swiglu", (silu, self._moved(10 * f * n)), (G, U), P, (G, U), row + mid, row + 3 * mid))
        ops.append(op("down", (narrow[0] + residual, narrow[1]), (P, X2), Y, used(P), row, row + mid, wide_flops))
        return Stage(names=VALUES, sizes=sizes, ops=tuple(ops), halves=(4,))

    def head_seconds(self) -> float:
        """Time of the product with the vocabulary, forward and backward."""
        times = 3 if self.training == "full" else 2
        return times * self._matmul(self.shape.hidden, self.shape.vocabulary)

    def _linear(self, fan_in: int, fan_out: int, num_fused: int) -> tuple[float, float]:
        """Time of a linear layer with what is trained on it, forward and backward."""
        once = self._matmul(fan_in, fan_out)
        if self.is_4bit:
            once += self._moved(2.5 * fan_in * fan_out, launches=0)
        if self.training == "full":
            return once, 2 * once
        if self.training == "frozen":
            return once, once
        n, width = self.num_tokens, num_fused * fan_in + fan_out
        adapter = max(2 * self.lora_r * width * n / self.speed.matmul_flops, 2 * width * n / self.speed.memory_bytes)
        adapter = max(adapter, self.speed.op_seconds)
        return once + adapter, once + 2 * adapter

    def _matmul(self, fan_in: int, fan_out: int) -> float:
        n = self.num_tokens
        computing = 2 * fan_in * fan_out * n / self.speed.matmul_flops
        moving = 2 * (fan_in * fan_out + (fan_in + fan_out) * n) / self.speed.memory_bytes
        return max(computing, moving, self.speed.op_seconds)

    def _attention(self) -> tuple[float, float]:
        flops = 2 * self.length * self.q_width * self.num_tokens
        forward = flops / (self.speed.attention_share * self.speed.matmul_flops)
        backward = 2.5 * flops / (self.speed.attention_backward_share * self.speed.matmul_flops)
        return max(forward, self.speed.op_seconds), max(backward, self.speed.op_seconds)

    def _moved(self, num_bytes: float, *, launches: int = 1) -> float:
        return max(num_bytes / self.speed.memory_bytes, launches * self.speed.op_seconds)
