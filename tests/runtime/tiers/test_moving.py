"""The runtime with a tier below: on an accelerator that is not there, and on a disk that is."""

from __future__ import annotations

import copy
import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from tapeline.errors import TierError
from tapeline.runtime.session import Session
from tapeline.runtime.tiers.engine import Engine
from tapeline.runtime.tiers.simulated import ComputeWatch, SimulatedMachine
from tapeline.runtime.tiers.tier import DISK, HOST
from tests.runtime.tiers.models import are_equal, gradients, loss_of, model_and_batch, planned, simulated, ways

WAYS = list(ways(DISK))
NUM_SCHEDULES, NUM_SLOW = 300, 10_000
NUM_STEPS = 2000


@pytest.mark.parametrize("ahead", ["none", "one", "far"])
@pytest.mark.parametrize("way", WAYS)
def test_on_a_disk_gradients_are_equal_and_peaks_as_predicted(way: str, ahead: str, tmp_path: Path) -> None:
    model, batch = model_and_batch()
    expected = gradients(model, batch)
    plan = planned(model, batch, ways(DISK)[way], DISK, ahead)
    assert plan.moved_bytes > 0
    threads = set(threading.enumerate())
    with Session(model, plan, measure=False, offload_dir=tmp_path) as session:
        peaks = []
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            with session.measure():
                loss_of(model, batch).backward()
            peaks.append(session.last_peak_bytes)
            assert are_equal(model, expected)
            (tier,) = session.report().tiers
            assert tier.out_bytes == tier.planned_bytes == plan.moved_bytes
        assert peaks[1:] == [plan.peak_bytes] * 2
        assert peaks[0] == plan.first_step_peak_bytes
        assert tier.back_bytes <= tier.out_bytes
        assert not tier.stayed
    assert set(threading.enumerate()) == threads
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", WAYS)
def test_on_an_accelerator_that_is_not_there_nothing_races(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_and_batch()
    expected = gradients(model, batch)
    machine = SimulatedMachine(bandwidth=1e8)
    plan = planned(model, batch, ways(HOST)[way], HOST)
    with simulated(model, plan, machine, monkeypatch, ComputeWatch(machine)) as session:
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            loss_of(model, batch).backward()
            assert are_equal(model, expected)
        (tier,) = session.report().tiers
        assert tier.out_bytes == plan.moved_bytes


@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_random_schedules_of_whole_steps(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies take any time, the host looks at any moment: gradients stay equal bit for bit, and no access is in no order."""
    model, batch = model_and_batch(3)
    expected = gradients(model, batch)
    plans = [planned(model, batch, way, HOST, ahead) for way in ways(HOST).values() for ahead in ("none", "one", "far")]
    for seed in range(NUM_SLOW if part else NUM_SCHEDULES):
        machine = SimulatedMachine(seed=seed)
        with simulated(model, plans[seed % len(plans)], machine, monkeypatch, ComputeWatch(machine)):
            for _ in range(1 + seed % 2):  # the first is recorded
                model.zero_grad(set_to_none=True)
                loss_of(model, batch).backward()
        assert are_equal(model, expected), f"seed {seed}"


# -- what users do ------------------------------------------------------------------------------------------------------


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    """A model of which everything that is held is on the disk."""
    model, batch = model_and_batch()
    plan = planned(model, batch, ways(DISK)["what is held"], DISK)
    with Session(model, plan, measure=False, offload_dir=tmp_path) as made:
        loss_of(model, batch).backward()
        model.zero_grad(set_to_none=True)
        yield made
    assert is_empty(made)
    assert not list(tmp_path.iterdir())


def engine_of(session: Session) -> Engine:
    assert session._mover is not None
    return session._mover.tiers[DISK].engine


def error_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except RuntimeError as error:
        return str(error)
    return ""


def is_empty(session: Session) -> bool:
    engine = engine_of(session)
    return engine.num_alive == engine.in_flight == engine.store.regions.used == 0


def test_a_graph_that_is_kept_gives_its_gradients_again(session: Session) -> None:
    model, (_, batch) = session.model, model_and_batch()
    expected = gradients(model, batch)
    loss = loss_of(model, batch)
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)
        assert are_equal(model, expected)
    del loss
    assert is_empty(session)


def test_what_waits_for_backward_outlives_the_session(tmp_path: Path) -> None:
    model, batch = model_and_batch()
    expected = gradients(model, batch)
    plan = planned(model, batch, ways(DISK)["everything"], DISK)
    session = Session(model, plan, measure=False, offload_dir=tmp_path)
    loss = loss_of(model, batch)
    session.remove()
    assert not engine_of(session).is_closed
    loss.backward()
    assert are_equal(model, expected)
    del loss
    assert engine_of(session).is_closed
    assert engine_of(session).store.num_bytes


def test_a_change_in_place_is_an_error_or_too_late_to_matter(session: Session) -> None:
    model, (_, batch) = session.model, model_and_batch()
    expected = gradients(model, batch)
    inputs: list[torch.Tensor] = []
    handles = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in model.blocks]  # type: ignore[union-attr]
    num_errors = 0
    for number in range(len(handles)):
        inputs.clear()
        model.zero_grad(set_to_none=True)
        loss = loss_of(model, batch)
        with torch.no_grad():
            inputs[number].add_(1.0)
        error = error_of(loss.backward)
        assert are_equal(model, expected) if not error else "modified by an inplace operation" in error
        num_errors += bool(error)
        batch = model_and_batch()[1]
    for handle in handles:
        handle.remove()
    assert num_errors, "what was changed on its way out is not used"


def test_nothing_grows(session: Session) -> None:
    """Steps of other lengths, without a backward, with errors in forward and backward, without gradients in between."""
    model, (_, batch) = session.model, model_and_batch()
    choose = random.Random(0)

    class BackwardError(Exception): ...

    def fail(*_: Any) -> None:
        raise BackwardError

    threads = set(threading.enumerate())
    for number in range(NUM_STEPS):
        part = batch[: choose.choice([130, 160])]
        kind = choose.choice(
            ["step", "step", "no backward", "no gradients", "forward fails", "backward fails", "unused"]
        )
        model.zero_grad(set_to_none=True)
        if kind == "no gradients":
            with torch.no_grad():
                loss_of(model, part)
        elif kind == "forward fails":
            handle = model.blocks[2].up.register_forward_pre_hook(fail)  # type: ignore[index, union-attr]
            with pytest.raises(BackwardError):
                loss_of(model, part)
            handle.remove()
        elif kind == "backward fails":
            out = model.blocks[0](part)  # type: ignore[index, operator]
            out.register_hook(fail)
            with pytest.raises(BackwardError):
                model.blocks[1](out).sum().backward()  # type: ignore[index, operator]
            del out
        elif kind == "unused":
            model.blocks[0](part)  # type: ignore[index, operator]
            loss_of(model, part).backward()
        else:
            loss = loss_of(model, part)
            if kind == "step":
                loss.backward()
            del loss
        if number % 100 == 99:
            assert is_empty(session), kind
    assert is_empty(session)
    assert set(threading.enumerate()) == threads
    assert engine_of(session).store.regions.most_used <= session.plan.disk_bytes


def test_a_disk_that_fails_stops_the_step_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_and_batch()
    optimizer = torch.optim.AdamW(model.parameters())
    plan = planned(model, batch, ways(DISK)["everything"], DISK)
    with Session(model, plan, measure=False, offload_dir=tmp_path) as session:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        random_state = torch.get_rng_state()

        def fail(*_: Any) -> int:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(TierError, match="Input/output error"):
            loss_of(model, batch).backward()
        assert all(torch.equal(a, b) for a, b in zip(weights.values(), model.state_dict().values(), strict=True))
        assert torch.equal(random_state, torch.get_rng_state())
        assert str(state) == str(optimizer.state_dict())
    monkeypatch.undo()
    model.zero_grad(set_to_none=True)
    loss_of(model, batch).backward()  # untouched, it goes on
    assert engine_of(session).is_closed


def test_subclasses_small_tensors_and_weights_stay(tmp_path: Path) -> None:
    model, batch = model_and_batch()
    plan = planned(model, batch, ways(DISK)["inputs"], DISK)
    with Session(model, plan, measure=False, offload_dir=tmp_path) as session:
        mover = session._mover
        assert mover is not None
        call = mover.call("blocks.0", 0)
        weight = torch.nn.Linear(200, 200).weight
        model.extra = torch.nn.Parameter(torch.zeros(200, 200))
        mover.begin_forward()
        two = TwoTensor(torch.zeros(200, 200), torch.zeros(200, 200))
        odd = torch.zeros(200, 200, dtype=torch.complex64).conj()
        for tensor in (weight, model.extra, model.extra.t()[3:], torch.zeros(3), two, odd, batch.to("meta")):
            assert mover.send(tensor, DISK, call) is None, tensor
        assert mover.stayed == {"TwoTensor tensors stay on the device": 1}
        whole = torch.randn(300, 200)
        moved = mover.send(whole.t()[10:20, ::2], DISK, call)
        again = mover.send(whole, DISK, call)
        assert moved is again, "a storage is moved once"
        assert moved is not None
        assert engine_of(session).bytes_out == whole.nbytes
        assert torch.equal(moved.tensor(), whole.t()[10:20, ::2])
        del moved, again
    assert any("TwoTensor" in note for note in session.report().notes)


def test_a_full_tier_keeps_the_rest_on_the_device(tmp_path: Path) -> None:
    model, batch = model_and_batch()
    expected = gradients(model, batch)
    plan = planned(model, batch, ways(DISK)["everything"], DISK)
    with Session(model, replace(plan, disk_bytes=plan.disk_bytes // 3), measure=False, offload_dir=tmp_path) as session:
        loss_of(model, batch).backward()
        assert are_equal(model, expected)
        (tier,) = session.report().tiers
        assert 0 < tier.out_bytes < plan.moved_bytes
        assert any("the disk has no room" in note for note in session.report().notes)
