"""The engine on every machine: what it must do, in which order, and what it may leave behind."""

from __future__ import annotations

import inspect
import random
import re
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tapeline.errors import TierError
from tapeline.runtime.tiers import engine as engine_module
from tapeline.runtime.tiers.cuda import accelerator_machine
from tapeline.runtime.tiers.disk import DiskFile
from tapeline.runtime.tiers.engine import Engine
from tapeline.runtime.tiers.simulated import RaceError, SimulatedMachine
from tapeline.runtime.tiers.slab import HostSlab
from tapeline.runtime.tiers.staged import StagedMachine
from tapeline.runtime.tiers.threads import ThreadMachine
from tests.runtime.tiers.models import StillAccelerator

MACHINES = [
    "simulated",
    "threads",
    "disk",
    "staged",
    *(
        pytest.param(
            kind, marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
        )
        for kind in ("cuda", "cuda staged")
    ),
]
NUM_SCHEDULES, NUM_SLOW = 300, 10_000


class Bench:
    """An engine on a machine, and places below it."""

    def __init__(self, kind: str, folder: Path, *, in_flight: int = 1 << 20, room: int = 1 << 20) -> None:
        self.kind = kind
        self.device = torch.device("cuda" if "cuda" in kind else "cpu")
        self.machine: Any = {
            "simulated": SimulatedMachine,
            "threads": ThreadMachine,
            "disk": ThreadMachine,
            "staged": lambda: StagedMachine(StillAccelerator()),  # type: ignore[arg-type]
            "cuda": lambda: accelerator_machine(torch.device("cuda", 0)),
            "cuda staged": lambda: StagedMachine(accelerator_machine(torch.device("cuda", 0))),
        }[kind]()
        is_file = "disk" in kind or "staged" in kind
        self.places: Any = (
            DiskFile(folder, room, self.device, has_checksums=True) if is_file else HostSlab(room, self.device)
        )
        self.engine = Engine(self.machine, self.places, most_in_flight=in_flight)

    def made(self, value: int, size: int = 5000) -> torch.Tensor:
        tensor = torch.full((size,), value, dtype=torch.uint8, device=self.device)
        if self.kind == "simulated":
            self.machine.touch(tensor, is_write=True)
        return tensor

    def seen(self, tensor: torch.Tensor) -> int:
        """The one value of all bytes."""
        if self.kind == "simulated":
            self.machine.touch(tensor, is_write=False)
        values = tensor.unique().tolist()
        assert len(values) == 1
        return int(values[0])

    def sent(self, value: int, size: int = 5000) -> Any:
        transfer = self.engine.send(self.made(value, size))
        assert transfer is not None
        return transfer

    def close(self) -> None:
        self.engine.drain()
        if self.kind == "simulated":
            self.machine.check()
        if hasattr(self.machine, "close"):
            self.machine.close()
        self.places.close()


@pytest.fixture(params=MACHINES)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    before = set(threading.enumerate())
    made = Bench(request.param, tmp_path)
    yield made
    made.close()
    assert set(threading.enumerate()) == before
    assert not list(tmp_path.iterdir())
    assert made.places.regions.used == 0, "every place was given back"


def test_bytes_come_back(bench: Bench) -> None:
    transfers = [bench.sent(value) for value in range(8)]
    for transfer in transfers:
        bench.engine.let_go(transfer)
    assert bench.engine.in_flight == 0
    for value in reversed(range(8)):
        bench.engine.fetch(transfers[value])
        assert bench.seen(bench.engine.take(transfers[value])) == value
        bench.engine.drop(transfers[value])
    assert bench.engine.bytes_out == bench.engine.bytes_back == 8 * 5000


def test_what_is_still_there_does_not_travel(bench: Bench) -> None:
    source = bench.made(3)
    transfer = bench.engine.send(source)
    assert transfer is not None
    taken = bench.engine.take(transfer)
    assert taken is source
    assert bench.engine.bytes_back == 0
    bench.engine.drop(transfer)


def test_bytes_may_be_taken_again(bench: Bench) -> None:
    transfer = bench.sent(7)
    bench.engine.let_go(transfer)
    first = bench.engine.take(transfer)
    assert bench.engine.take(transfer) is first
    assert bench.engine.bytes_back == 5000
    del first  # as when backward is done with it, and the graph is retained
    assert bench.seen(bench.engine.take(transfer)) == 7
    assert bench.engine.bytes_back == 10_000
    bench.engine.drop(transfer)
    bench.engine.drop(transfer)


def test_nobody_takes_them(bench: Bench) -> None:
    transfers = [bench.sent(value) for value in range(4)]
    bench.engine.let_go(transfers[0])
    bench.engine.let_go(transfers[1])
    bench.engine.fetch(transfers[0])
    for transfer in transfers:
        bench.engine.drop(transfer)


def test_no_more_is_in_flight_than_may_be(tmp_path: Path) -> None:
    for kind in ("simulated", "threads", "disk"):
        bench = Bench(kind, tmp_path, in_flight=12_000)
        transfers = [bench.sent(value) for value in range(10)]
        assert bench.engine.most_seen_in_flight <= 12_000
        for value, transfer in enumerate(transfers):
            assert bench.seen(bench.engine.take(transfer)) == value
            bench.engine.drop(transfer)
        bench.close()


def test_a_slow_link_makes_compute_wait(tmp_path: Path) -> None:
    bench = Bench("simulated", tmp_path, in_flight=5000)
    bench.machine.bandwidth = 1000.0
    for value in range(4):
        bench.sent(value)
        bench.machine.advance(1.0)
    # each copy takes 5 s and begins after the one before; the second one must have ended before the third is let in flight
    assert bench.machine.stalled == pytest.approx(15.0 - 3.0)
    assert bench.engine.stalls.count == 3
    assert sum(stall.seconds for stall in bench.engine.stalls.table().values()) == pytest.approx(12.0)


def test_places_are_used_again_and_joined(bench: Bench) -> None:
    for turn in range(30):
        transfers = [bench.sent((turn + number) % 200, 4096 * (1 + number)) for number in range(5)]
        for transfer in transfers[turn % 5 :] + transfers[: turn % 5]:
            bench.engine.let_go(transfer)
            bench.engine.take(transfer)
            bench.engine.drop(transfer)
    assert bench.places.regions.most_used <= 2 * 15 * 4096
    bench.engine.drain()
    assert bench.places.take(bench.places.num_bytes) is not None, "what is free is in one piece"
    bench.places.regions.used = 0


def test_a_full_tier_gives_no_place(bench: Bench) -> None:
    assert bench.places.take(bench.places.num_bytes + 1) is None


# -- random schedules ------------------------------------------------------------------------------------------------


def play(seed: int, engine_class: type[Engine] = Engine, num_steps: int = 60) -> None:
    """Send, let go, fetch, take and drop in a random order, with places that are used again and copies that take any time.

    Raises:
        RaceError: if two accesses are in no order.
        AssertionError: if bytes are not those that were sent.
    """
    choose = random.Random(seed)
    machine = SimulatedMachine(seed=seed)
    slab = HostSlab(16 * 512, torch.device("cpu"))
    machine.touch(slab.memory.tensor, is_write=True)  # type: ignore[arg-type]
    machine.host.update(machine.compute().clock)
    engine = engine_class(machine, slab, most_in_flight=choose.choice([0, 600, 2000, 100_000]))
    known: list[tuple[Any, int]] = []
    for _ in range(num_steps):
        if choose.random() < 0.1:
            machine.use(choose.choice(["compute", "another"]))
        action = choose.choice(["send", "send", "let go", "fetch", "take", "take and drop", "drop", "drop"])
        if action == "send" or not known:
            size, value = choose.choice([100, 512, 1500]), choose.randrange(200)
            source = torch.full((size,), value, dtype=torch.uint8)
            machine.touch(source, is_write=True)
            transfer = engine.send(source)
            if transfer is not None:
                known.append((transfer, value))
            del source
            continue
        transfer, value = choose.choice(known)
        if action == "let go":
            engine.let_go(transfer)
        elif action == "fetch":
            engine.fetch(transfer)
        if action.startswith("take"):
            taken = engine.take(transfer)
            machine.touch(taken, is_write=False)
            assert (taken == value).all(), f"seed {seed}: bytes of another storage, or too early"
            del taken
        if action.endswith("drop"):
            engine.drop(transfer)
            known = [one for one in known if one[0] is not transfer]
        machine.check()
    for transfer, _ in known:
        engine.drop(transfer)
    end(engine, machine, drains=bool(seed % 2))


def end(engine: Engine, machine: SimulatedMachine, *, drains: bool) -> None:
    """Nothing is in use, and no copy is on its way."""
    if drains:
        engine.drain()
    else:
        engine.close()
        assert engine.is_closed
    machine.check()
    for side in machine.sides():
        assert side.num_done == side.num_given, "a copy was on its way when the places were closed"
    assert engine.store.regions.used == 0
    assert engine.in_flight == 0


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_random_schedules_have_no_race(seed: int) -> None:
    for number in range(NUM_SCHEDULES if not seed else NUM_SLOW):
        play(number + 1_000_000 * seed)


RULES = sorted({int(number) for number in re.findall(r"# rule (\d)", inspect.getsource(engine_module))})


def without(rule: int) -> type[Engine]:
    """The engine with one of its rules taken out."""
    lines = inspect.getsource(engine_module).splitlines()
    broken = [re.sub(r"\S.*", "pass", line) if f"# rule {rule}" in line else line for line in lines]
    assert broken != lines
    module = types.ModuleType("broken")
    exec(compile("\n".join(broken), "broken", "exec"), vars(module))
    found: type[Engine] = module.Engine
    return found


def test_the_rules_are_those_that_are_written_down() -> None:
    assert engine_module.__doc__ is not None
    assert [int(number) for number in re.findall(r"^(\d)\.", engine_module.__doc__, re.MULTILINE)] == RULES


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what is broken does not end well
@pytest.mark.parametrize("rule", RULES)
def test_without_a_rule_there_is_a_race(rule: int) -> None:
    broken = without(rule)

    def play_all() -> None:
        for seed in range(NUM_SCHEDULES):
            play(seed, broken)

    with pytest.raises((RaceError, AssertionError)):
        play_all()


# -- the disk ----------------------------------------------------------------------------------------------------------


def test_a_disk_without_room_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(TierError, match="has no room for"):
        DiskFile(tmp_path, 1 << 60)
    with pytest.raises(TierError, match=r"Cannot open a file in .*nowhere"):
        DiskFile(tmp_path / "nowhere", 4096)
    assert not list(tmp_path.iterdir())


def test_bytes_that_come_back_differently_are_an_error(tmp_path: Path) -> None:
    bench = Bench("disk", tmp_path)
    transfer = bench.sent(9)
    bench.engine.let_go(transfer)
    bench.places.write(transfer.slot.begin, torch.zeros(10, dtype=torch.uint8))
    with pytest.raises(TierError, match="gave other bytes than were written"):
        bench.engine.take(transfer)
    bench.machine.close()
    bench.places.close()


def test_a_failure_of_a_worker_comes_out(tmp_path: Path) -> None:
    bench = Bench("disk", tmp_path)
    transfer = bench.sent(1)
    bench.engine.let_go(transfer)
    bench.places.close()
    with pytest.raises(TierError, match="Bad file descriptor"):
        bench.engine.take(transfer)
    bench.machine.close()
