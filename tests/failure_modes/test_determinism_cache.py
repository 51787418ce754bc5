"""Rows F43 to F45: caches of keys and values that are passed in, shared between layers, or left on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tapeline.errors import PlanDriftError
from tests.exact.families import VOCABULARY, token_ids
from tests.failure_modes.twins import MODES, Block, Stack, Twins, tiny, transformer, twins

hidden: dict[str, Any] = {}
"""What blocks look at beside their arguments."""


@pytest.fixture(autouse=True)
def _nothing_hidden() -> Iterator[None]:
    hidden.clear()
    yield
    hidden.clear()


# -- F43: a cache passed in ----------------------------------------------------------------------------------------


class Cache:
    """Keys by layer; grows at every call."""

    def __init__(self) -> None:
        self.keys: dict[int, torch.Tensor] = {}

    def update(self, number: int, key: torch.Tensor) -> torch.Tensor:
        self.keys[number] = torch.cat([self.keys[number], key], 1) if number in self.keys else key
        return self.keys[number]


def append(cache: dict[int, list[torch.Tensor]], number: int, key: torch.Tensor) -> torch.Tensor:
    cache.setdefault(number, []).append(key)
    return torch.cat(cache[number], 1)


def overwrite(cache: torch.Tensor, number: int, key: torch.Tensor) -> torch.Tensor:
    """A cache of fixed size, which is written in place."""
    with torch.no_grad():
        cache[number].mul_(0.5).add_(key)
    return key + cache[number].clone()


CACHES: dict[str, tuple[Callable[[], Any], Callable[[Any, int, torch.Tensor], torch.Tensor]]] = {
    "object": (Cache, Cache.update),
    "dict of lists": (dict, append),
    "tensor": (lambda: torch.zeros(3, 4, 6, 16), overwrite),
}


def contents(cache: Any) -> list[torch.Tensor]:
    if isinstance(cache, torch.Tensor):
        return [cache]
    held = (cache.keys if isinstance(cache, Cache) else cache).values()
    return [key for one in held for key in (one if isinstance(one, list) else [one])]


@pytest.mark.parametrize("mode", ["cheap", "recompute", "segments:2"])
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("has_tape", [True, False])
def test_f43_a_cache_is_filled_by_the_forward_alone(mode: str, kind: str, *, has_tape: bool) -> None:
    make, update = CACHES[kind]

    def body(block: Block, x: torch.Tensor, cache: Any) -> torch.Tensor:
        h = block.up(x)
        if hidden.get("reads"):
            h.detach().sum().item()
        key = update(cache, block.number, h)
        return x + block.down(F.scaled_dot_product_attention(h, key, key.sin()))

    def run(model: nn.Module) -> list[torch.Tensor]:
        cache = make()
        sum(model(*pair.batch, cache).pow(2).sum() for _ in range(2)).backward()
        return contents(cache)

    with twins(body, mode) as pair:
        hidden["reads"] = not has_tape
        for seed in range(2):
            pair.check(run, seed)
        assert has_tape or "values of tensors" in pair.reasons


@pytest.mark.parametrize("mode", MODES)
def test_f43_a_call_that_differs_and_was_given_a_cache_is_an_error_and_never_run_again(mode: str) -> None:
    """Running it again would fill the cache again. Nothing but the length of its keys tells the second call apart."""

    def body(block: Block, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        h = block.up(x.sin().exp())
        key = cache.update(block.number, h)
        return x + block.down(F.scaled_dot_product_attention(h, key, key.sin()))

    def run(model: nn.Module) -> list[torch.Tensor]:
        cache = Cache()
        loss = sum(model(*pair.batch, cache).pow(2).sum() for _ in range(2))
        assert all(key.shape[1] == 12 for key in cache.keys.values())
        try:
            loss.backward()
        finally:
            assert all(key.shape[1] == 12 for key in cache.keys.values())
        return contents(cache)

    with twins(body, mode) as pair:
        with pytest.raises(PlanDriftError, match="cannot be run again: it changes state"):
            pair.result(pair.managed, run)
        for _ in range(2):
            with suppress(PlanDriftError):
                pair.result(pair.managed, run)
        pair.check(run)  # by then the blocks are kept


def in_one(pair: Twins, model: nn.Module, cache: Any) -> torch.Tensor:
    ids = pair.batch["input_ids"]
    return model(input_ids=ids, labels=ids, past_key_values=cache, use_cache=True).loss


def in_chunks(pair: Twins, model: nn.Module, cache: Any) -> torch.Tensor:
    parts = pair.batch["input_ids"].split(8, 1)
    losses = (model(input_ids=part, labels=part, past_key_values=cache, use_cache=True).loss for part in parts)
    return sum(losses, torch.zeros(()))


@pytest.mark.parametrize("mode", ["cheap", "recompute"])
def test_f43_a_cache_of_transformers_keeps_its_length_and_its_gradients(mode: str) -> None:
    from transformers import DynamicCache

    def run(model: nn.Module, way: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        cache = DynamicCache(config=model.config)
        way(pair, model, cache).backward()
        assert cache.get_seq_length() == 24
        return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]

    with transformer(tiny("llama"), mode, token_ids(2, 24)) as pair:
        for way in (in_one, in_chunks, in_chunks):
            pair.check(partial(run, way=way))


# -- F44: layers that share keys and values ------------------------------------------------------------------------


class Sharing(Stack):
    """The last two layers attend to the keys and values of the second."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, shared = x * 1.0, {}
        for layer in self.layers:
            x = layer(x, shared)
        return x


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("has_tape", [True, False])
def test_f44_shared_keys_and_values_have_the_gradients_of_all_their_readers(mode: str, *, has_tape: bool) -> None:
    def body(block: Block, x: torch.Tensor, shared: dict[str, Any]) -> torch.Tensor:
        query, key = block.up(x).sin().chunk(2, -1)
        if hidden.get("reads"):
            query.detach().sum().item()
        if block.number < 2:
            shared["states"] = key, key.exp()
        out = F.scaled_dot_product_attention(query, *shared["states"])
        return x + block.down(torch.cat([out, out.cos()], -1))

    with twins(Sharing(body, 4), mode) as pair:
        hidden["reads"] = not has_tape
        for seed in range(3):
            pair.check(seed=seed)
        assert bool(pair.replayed()) == has_tape
        key = pair.managed.layers[1].up.weight.grad
        assert key is not None
        assert key.chunk(2)[1].any()


@pytest.mark.parametrize("mode", ["recompute", "segments:2"])
def test_f44_gemma3n_with_shared_layers(mode: str) -> None:
    model = tiny(
        "gemma3n_text",
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        head_dim=16,
        sliding_window=8,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
        intermediate_size=[32] * 4,
        attn_implementation="eager",  # heads share keys: what is replayed starts from what another layer made
    )
    with transformer(model, mode, token_ids(2, 24)) as pair:
        for seed in range(2):
            pair.check(seed=seed)
        assert not hasattr(pair.managed.model.layers[3].self_attn, "k_proj")
        for layer in pair.managed.model.layers[:2]:
            assert layer.self_attn.k_proj.weight.grad.any()
        assert len(pair.replayed()) > 100
        assert not pair.session.report().kept_instead


# -- F45: use_cache left on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["cheap", "recompute"])
@pytest.mark.parametrize("asked", [None, True])
def test_f45_a_cache_left_on_by_the_configuration_is_off_and_one_asked_for_is_exact(
    mode: str, *, asked: bool | None
) -> None:
    def run(model: nn.Module) -> list[torch.Tensor]:
        out = model(**pair.batch, **({} if asked is None else {"use_cache": asked}))
        out.loss.backward()
        if model is pair.managed:
            made.append(out.past_key_values)
        return [out.logits]

    made: list[Any] = []
    with transformer(tiny("llama"), mode, token_ids(2, 24)) as pair:
        assert pair.managed.config.use_cache
        for seed in range(2):
            pair.check(run, seed)
        assert pair.managed.config.use_cache
    lengths = [None if cache is None else cache.get_seq_length() for cache in made]
    assert lengths == [None if asked is None else 24] * 2
