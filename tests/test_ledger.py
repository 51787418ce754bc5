from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tapeline.ledger import BACKWARD, FORWARD, Ledger
from tests.models import TinyModel

KIB = 1024


def test_a_storage_counts_once_until_it_is_freed() -> None:
    with Ledger() as ledger:
        a = torch.zeros(256)
        view, same = a[:10], a.view(16, 16)
        assert ledger.live_bytes() == KIB
        b = a + 1
        assert ledger.live_bytes() == 2 * KIB
        del a
        assert ledger.live_bytes() == 2 * KIB  # the views hold it
        del view, same
        assert ledger.live_bytes() == KIB
        del b
    assert ledger.live_bytes() == 0
    assert ledger.peak_bytes() == 2 * KIB


def test_peak_of_a_hand_computed_chain() -> None:
    """y = ((x * 2) + 1).sum(): x saved by nothing, each intermediate 4 KiB, alive only until the next is there."""
    x = torch.ones(1024)
    with Ledger() as ledger:
        ledger.track([x], "batch")
        ((x * 2) + 1).sum()
    assert ledger.peak_bytes() == 3 * 4 * KIB
    assert ledger.live_bytes() == 4 * KIB


def test_backward_frees_what_autograd_saved() -> None:
    x = torch.ones(1024, requires_grad=True)
    with Ledger() as ledger:
        ledger.track([x], "batch")
        y = x.sin().exp().sum()  # sin saves x, exp saves its result, which is not kept by us
        assert ledger.live_bytes() == 4 * KIB + 4 * KIB + 4
        y.backward()
        assert ledger.live_bytes() == 4 * KIB + 4 * KIB + 4  # the result of exp is gone, the gradient has come
    assert torch.equal(x.grad, torch.cos(x.detach()) * torch.exp(torch.sin(x.detach())))


def test_resizing_in_place_changes_the_count() -> None:
    with Ledger() as ledger:
        a = torch.zeros(256)
        a.resize_(1024)
        assert ledger.live_bytes() == 4 * KIB
        del a
    assert ledger.live_bytes() == 0


def test_frees_are_seen_while_the_mode_is_not_active() -> None:
    ledger = Ledger()
    with ledger:
        a = torch.zeros(256)
    del a
    assert ledger.live_bytes() == 0


def test_tensors_found_as_arguments_are_counted_from_then() -> None:
    a = torch.zeros(256)
    with Ledger() as ledger:
        assert ledger.live_bytes() == 0
        a.add_(1)
        assert ledger.live_bytes() == KIB


def test_a_reused_address_is_a_new_storage() -> None:
    with Ledger() as ledger:
        for size in (256, 512, 256, 1024):
            tensor = torch.zeros(size)
            assert ledger.live_bytes() == 4 * size
            del tensor
    assert ledger.peak_bytes() == 4 * KIB


def test_begin_window_forgets_the_peak_and_keeps_what_lives() -> None:
    with Ledger() as ledger:
        kept = torch.zeros(256)
        torch.zeros(4096)
        ledger.begin_window()
        assert ledger.peak_bytes() == KIB
        assert sum(a.num_bytes for a in ledger.peak_holders()) == KIB
    del kept


def test_devices_are_counted_apart() -> None:
    with FakeTensorMode(), Ledger("meta") as ledger:
        torch.zeros(256)
        kept = torch.zeros(512, device="meta")
        assert ledger.peak_bytes("cpu") == KIB
        assert ledger.peak_bytes() == 2 * KIB
    del kept


def test_fake_tensors_count_as_real_ones() -> None:
    def run() -> int:
        with Ledger() as ledger:
            layer = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
            layer(torch.ones(32, 64)).sum().backward()
        return ledger.peak_bytes()

    with FakeTensorMode():
        fake = run()
    assert fake == run()


def test_holders_at_the_peak_add_up_to_it(llama: TinyModel) -> None:
    ledger = Ledger()
    ledger.track(llama.model.parameters(), "weights")
    with ledger, ledger.watch(llama.model, ["model.layers.0", "model.layers.5"]):
        llama.loss_fn(llama.model, llama.batch).backward()
    holders = ledger.peak_holders()
    assert sum(a.num_bytes for a in holders) == ledger.peak_bytes()
    blocks = {a.block for a in holders if a.phase == FORWARD}
    assert {"model.layers.0", "model.layers.5"} <= blocks
    assert "model.layers.0" in ledger.peak_table(limit=500)
    assert sum(a.num_bytes for a in holders if a.category == "weights") == sum(
        p.nbytes for p in {id(p): p for p in llama.model.parameters()}.values()
    )


def test_backward_is_attributed_to_the_block_that_made_the_graph(llama: TinyModel) -> None:
    names = [f"model.layers.{i}" for i in range(6)]
    with Ledger() as ledger, ledger.watch(llama.model, names):
        llama.loss_fn(llama.model, llama.batch).backward()
    forward = [s.block for s in ledger.spans if s.phase == FORWARD and s.block]
    backward = [s.block for s in ledger.spans if s.phase == BACKWARD and s.block]
    assert list(dict.fromkeys(forward)) == names
    assert list(dict.fromkeys(backward)) == names[::-1]


def test_watch_leaves_no_hook_even_after_an_exception(llama: TinyModel) -> None:
    with pytest.raises(ZeroDivisionError), Ledger() as ledger, ledger.watch(llama.model, ["model.layers.0"]):
        raise ZeroDivisionError
    layer = llama.model.get_submodule("model.layers.0")
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_agrees_with_the_memory_tracker_of_torch(llama: TinyModel) -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    optimizer = torch.optim.AdamW(llama.model.parameters(), foreach=False)

    def step() -> None:
        llama.loss_fn(llama.model, llama.batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    gc.collect()
    tracker = MemTracker()
    tracker.track_external(llama.model, optimizer, *llama.batch.values())
    with tracker:
        step()
    theirs = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]

    ledger = Ledger()
    ledger.track(llama.model.parameters(), "weights")
    ledger.track(llama.model.buffers(), "weights")
    ledger.track(llama.batch.values(), "batch")
    for state in optimizer.state.values():
        ledger.track(state.values(), "optimizer")
    with ledger:
        step()
    assert ledger.peak_bytes() == pytest.approx(theirs, rel=0.005)


def test_agrees_with_the_allocator(llama: TinyModel) -> None:
    """The profiler records every allocation of the CPU allocator: an independent witness for growth over a step."""
    from torch.profiler import ProfilerActivity, profile

    llama.model.zero_grad()
    llama.loss_fn(llama.model, llama.batch).backward()  # warm up lazily built tables
    llama.model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        llama.loss_fn(llama.model, llama.batch).backward()
    live = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    llama.model.zero_grad()
    ledger = Ledger()
    ledger.track(llama.model.parameters(), "weights")
    ledger.track(llama.model.buffers(), "weights")
    ledger.track(llama.batch.values(), "batch")
    ledger.begin_window()
    before = ledger.live_bytes()
    with ledger:
        llama.loss_fn(llama.model, llama.batch).backward()
    assert ledger.peak_bytes() - before == pytest.approx(peak, rel=0.02)
