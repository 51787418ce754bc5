"""How a tier ends: whoever lets go of it last, in whatever thread, at whatever moment."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tapeline
from tapeline.errors import InfeasibleBudgetError
from tapeline.runtime.moving import Mover
from tapeline.runtime.tiers.disk import DiskFile
from tapeline.runtime.tiers.engine import BACK, OUT, Engine
from tapeline.runtime.tiers.opening import open_disk
from tapeline.runtime.tiers.simulated import ComputeWatch, SimulatedMachine
from tapeline.runtime.tiers.slab import HostSlab
from tapeline.runtime.tiers.threads import ThreadMachine
from tapeline.runtime.tiers.tier import HOST, Tier
from tests.runtime.tiers.models import loss_of, model_and_batch

CPU = torch.device("cpu")
SIZE = 1 << 18
SECONDS = 20


def sent(engine: Engine) -> Any:
    transfer = engine.send(torch.full((SIZE,), 7, dtype=torch.uint8))
    assert transfer is not None
    return transfer


@pytest.mark.parametrize("is_fetched", [False, True])
def test_places_are_closed_after_the_last_copy_that_nobody_waits_for(*, is_fetched: bool) -> None:
    machine = SimulatedMachine(bandwidth=1.0)
    engine = Engine(machine, HostSlab(1 << 20, CPU), most_in_flight=1 << 30)
    transfer = sent(engine)
    engine.let_go(transfer)
    out_done = transfer.out_done
    if is_fetched:
        engine.take(transfer)
    engine.drop(transfer)
    engine.close()
    assert engine.is_closed
    assert machine.host[OUT] >= out_done.clock[OUT], "the host has seen its end"
    assert machine.side(BACK).num_done == machine.side(BACK).num_given


class Holder:
    """Something in a cycle that holds bytes, such as a graph in a traceback."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.transfer, self.me = engine, sent(engine), self

    def __del__(self) -> None:
        self.engine.drop(self.transfer)


@pytest.mark.parametrize("is_closing", [False, True])
def test_a_collection_in_a_worker_waits_for_nobody(tmp_path: Path, *, is_closing: bool) -> None:
    tier = open_disk(CPU, 1 << 24, 1 << 30, tmp_path)
    engine, machine = tier.engine, tier.engine.machine
    begin, over = threading.Event(), threading.Event()

    def collects() -> None:
        begin.wait()
        gc.collect()
        over.set()

    gc.disable()
    try:
        machine.run(machine.side(OUT), collects)
        Holder(engine)
        if is_closing:
            engine.close()
        begin.set()
        assert over.wait(SECONDS), "the worker waits for itself"
    finally:
        gc.enable()
    if not is_closing:
        transfer = sent(engine)
        assert engine.num_alive == 1
        engine.drop(transfer)
        engine.close()
    for thread in threading.enumerate():
        if thread.name.startswith("tapeline"):
            thread.join(SECONDS)
    assert engine.is_closed
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tapeline")]


def test_a_drop_while_the_engine_is_at_work_is_seen_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = open_disk(CPU, 1 << 24, 1 << 30, tmp_path)
    engine = tier.engine
    transfer, bury = sent(engine), engine._bury

    def then_dropped() -> None:
        bury()
        monkeypatch.undo()
        engine.drop(transfer)  # as another thread may, which finds the engine at work

    monkeypatch.setattr(engine, "_bury", then_dropped)
    engine.close()
    assert engine.is_closed


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_tier_that_nobody_knows_any_more_ends(tmp_path: Path) -> None:
    before = set(threading.enumerate()), num_open_files()
    model, batch = model_and_batch()
    session = tapeline.fit(
        model, batch, mode="offload", loss_fn=loss_of, measure=False, disk_budget="1GiB", offload_dir=tmp_path
    )
    loss_of(model, batch).backward()
    gone = weakref.ref(session)
    del session, model
    gc.collect()
    assert gone() is None
    assert (set(threading.enumerate()), num_open_files()) == before


AT_EXIT = """
import sys, time, torch
from tapeline.runtime.tiers.opening import open_disk
tier = open_disk(torch.device("cpu"), 1 << 24, 1 << 30, sys.argv[1])
class Holder:
    def __init__(self):
        machine = tier.engine.machine
        machine.run(machine.side("off the device"), lambda: time.sleep(2))
        self.transfer = tier.engine.send(torch.ones(1 << 20, dtype=torch.uint8))
        self.engine = tier.engine
    def __del__(self):
        self.engine.drop(self.transfer)
sys.last_value = Holder()
"""


def test_an_interpreter_that_ends_with_a_write_on_its_way_ends(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", AT_EXIT, tmp_path], timeout=60, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_child_leaves_the_tier_of_its_parent_alone(tmp_path: Path) -> None:
    tier = open_disk(CPU, 1 << 24, 1 << 30, tmp_path)
    transfer = sent(tier.engine)
    tier.engine.drain()
    child = os.fork()
    if not child:
        tier.engine.drop(transfer)
        tier.engine._end()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert tier.engine.take(transfer).unique().tolist() == [7]
    tier.engine.drop(transfer)
    tier.engine.close()
    assert tier.engine.is_closed


def test_another_stream_gets_its_own() -> None:
    machine = SimulatedMachine(bandwidth=1.0)
    engine = Engine(machine, HostSlab(1 << 22, CPU), most_in_flight=1 << 30)
    mover = Mover({HOST: Tier(name=HOST, device=CPU, engine=engine)}, nn.Linear(2, 2))
    first, tensor = mover.call("first", 0), torch.randn(1 << 16)
    moved = first.send(tensor, HOST)
    assert moved is not None
    first.end(tensor)
    second = mover.call("second", 0)
    second.end(tensor)
    with ComputeWatch(machine):
        one = moved.tensor()
        assert moved.tensor() is one
        machine.use("another")
        two = moved.tensor()
    machine.check()
    assert two.data_ptr() != one.data_ptr()
    assert torch.equal(one, tensor)
    assert torch.equal(two, tensor)


def test_a_fetch_that_was_interrupted_is_begun_anew() -> None:
    machine = ThreadMachine()
    slab = HostSlab(1 << 20, CPU)
    engine = Engine(machine, slab, most_in_flight=1 << 30, shut=machine.close)
    transfer = sent(engine)
    engine.let_go(transfer)
    assert engine.take(transfer).unique().tolist() == [7]
    side = machine.side

    def interrupted(name: str) -> Any:
        machine.side = side  # type: ignore[method-assign]
        raise KeyboardInterrupt

    machine.side = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.fetch(transfer)
    assert engine.take(transfer).unique().tolist() == [7]
    engine.drop(transfer)
    engine.close()


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EOPNOTSUPP, None])
def test_room_is_claimed_where_the_system_has_no_call_for_it(
    error: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: int) -> None:
        raise OSError(error, "not here")

    if error is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuses)
    file = DiskFile(tmp_path, (9 << 20) + 1)
    assert os.fstat(file._file).st_size == file.num_bytes
    assert os.fstat(file._file).st_blocks * 512 >= file.num_bytes
    file.close()


def test_no_mode_moves_more_than_there_is_room_for() -> None:
    model, batch = model_and_batch(5, 1000)
    for mode, budget in (("auto", "50%"), ("cheap", "50%"), ("cheap", "80%"), ("least", None), ("offload", None)):
        for room in (64 << 10, 700 << 10, 3 << 20):
            with suppress(InfeasibleBudgetError):
                plan = tapeline.plan(model, batch, budget, mode=mode, loss_fn=loss_of, disk_budget=room)
                assert plan.disk_bytes <= room, (mode, budget)
