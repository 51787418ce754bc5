"""Rows F4 to F20, F50, F51 and F56, of what moves: streams, memory, weights, addresses. The rest is in `tests/runtime/tiers`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tapeline.runtime import session_tiers
from tapeline.runtime.session import Session
from tapeline.runtime.tiers import slab
from tapeline.runtime.tiers.cuda import accelerator_machine
from tapeline.runtime.tiers.engine import Engine
from tapeline.runtime.tiers.host_memory import HostMemory
from tapeline.runtime.tiers.opening import open_disk
from tapeline.runtime.tiers.simulated import ComputeWatch, SimulatedMachine
from tapeline.runtime.tiers.slab import HostSlab
from tapeline.runtime.tiers.tier import DISK, HOST, Tier
from tests.runtime.tiers import kinds
from tests.runtime.tiers.models import are_equal, gradients, loss_of, model_and_batch, planned, simulated, ways

CPU = torch.device("cpu")


class Stream:
    """A stream that writes down what it waits for."""

    def __init__(self, name: str, waits: list[tuple[str, str]]) -> None:
        self.name, self.waits = name, waits

    def record_event(self) -> Any:
        return Recorded(self.name)

    def wait_event(self, event: Any) -> None:
        self.waits.append((self.name, event.stream))


class Recorded:
    def __init__(self, stream: str) -> None:
        self.stream = stream

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class Driver:
    """What torch offers of an accelerator that is not there."""

    def __init__(self) -> None:
        self.waits: list[tuple[str, str]] = []
        self.made: list[Stream] = []
        self.current = Stream("default", self.waits)

    def current_stream(self, device: torch.device) -> Stream:
        return self.current

    def Stream(self, device: torch.device) -> Stream:  # noqa: N802 - torch's name
        self.made.append(Stream(f"side {len(self.made)}", self.waits))
        return self.made[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    played = Driver()
    monkeypatch.setattr(torch, "get_device_module", lambda device: played)
    accelerator_machine.cache_clear()
    yield played
    accelerator_machine.cache_clear()


def there_and_back(engine: Engine) -> None:
    source = torch.arange(5000).view(torch.uint8)
    transfer = engine.send(source.clone())
    assert transfer is not None
    engine.let_go(transfer)
    engine.fetch(transfer)
    assert torch.equal(engine.take(transfer), source)
    engine.drop(transfer)


def test_f04_copies_wait_for_the_compute_stream_and_never_for_themselves(driver: Driver) -> None:
    there_and_back(Engine(accelerator_machine(CPU), HostSlab(1 << 20, CPU), most_in_flight=1 << 20))
    out, back = (stream.name for stream in driver.made)
    assert all(stream != other for stream, other in driver.waits)
    assert driver.waits.index((out, "default")) < driver.waits.index(("default", out)) < len(driver.waits)
    assert {(back, "default"), (back, out), ("default", back)} < set(driver.waits)


def test_f05_the_stream_that_the_user_is_on_is_looked_up_each_time(driver: Driver) -> None:
    engine = Engine(accelerator_machine(CPU), HostSlab(1 << 20, CPU), most_in_flight=1 << 20)
    there_and_back(engine)
    driver.waits.clear()
    with driver.stream(Stream("the user's own", driver.waits)):
        there_and_back(engine)
    assert "the user's own" in {stream for stream, _ in driver.waits}
    assert "the user's own" in {other for _, other in driver.waits}
    assert "default" not in set(itertools.chain(*driver.waits))


def test_f08_a_device_has_two_streams_for_copies_however_many_sessions(driver: Driver) -> None:
    for _ in range(20):
        there_and_back(Engine(accelerator_machine(CPU), HostSlab(1 << 20, CPU), most_in_flight=1 << 20))
    assert len(driver.made) == 2


def saved_of(tensor: torch.Tensor, kind: str) -> list[Any]:
    """The nodes of a kind in the graph of a tensor."""
    nodes, stack = {}, [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in nodes:
            nodes[node] = node.name()
            stack += [before for before, _ in node.next_functions]
    return [node for node, name in nodes.items() if name == kind]


def test_f07_a_view_that_came_back_outlives_its_base_and_its_place(tmp_path: Path) -> None:
    def halves(b: kinds.Block, x: torch.Tensor) -> torch.Tensor:
        one, two = b.up(x).chunk(2, -1)
        return x + b.down(torch.cat([one.sin(), two.cos()], -1))

    model, batch = kinds.Model(halves), kinds.a_batch()
    untouched = [node._saved_self.clone() for node in saved_of(loss_of(model, batch), "CosBackward0")]
    expected, plan = kinds.gradients_of(model, batch), kinds.plan_of(model, batch, "everything")
    with Session(model, plan, measure=False, offload_dir=tmp_path) as session:
        loss_of(model, batch).backward()
        loss = loss_of(model, batch)
        views = [node._saved_self for node in saved_of(loss, "CosBackward0")]
        loss.backward()
        del loss
        kinds.check(session, expected, batch)
        loss_of(model, batch * 2).backward()
        assert len(views) == 3
        assert all(map(torch.equal, views, untouched))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[HostMemory]:
    """All stretches of host memory from here on."""
    found: list[HostMemory] = []

    def noted(num_bytes: int, device: torch.device) -> HostMemory:
        found.append(HostMemory(num_bytes, device))
        return found[-1]

    monkeypatch.setattr(slab, "HostMemory", noted)
    return found


def test_f13_host_memory_goes_back_with_the_last_graph(
    taken: list[HostMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = model_and_batch()
    machine, plan = SimulatedMachine(), planned(model, batch, ways(HOST)["everything"], HOST)
    with simulated(model, plan, machine, monkeypatch, ComputeWatch(machine)) as session:
        loss = loss_of(model, batch)
        session.remove()
        assert taken[0].tensor is not None, "a graph still needs it"
        loss.backward()
        del loss
    assert [memory.tensor for memory in taken] == [None]


def test_f15_steps_take_no_host_memory_of_their_own(taken: list[HostMemory], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_and_batch()
    machine, plan = SimulatedMachine(), planned(model, batch, ways(HOST)["everything"], HOST)
    with simulated(model, plan, machine, monkeypatch, ComputeWatch(machine)):
        for _ in range(3):
            loss_of(model, batch).backward()
    assert [memory.num_bytes for memory in taken] == [plan.host_bytes]


def test_f20_tensors_of_another_device_stay_where_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def of_another_device(device: torch.device, *rest: Any, **options: Any) -> Tier:
        tier = open_disk(device, *rest, **options)
        return Tier(name=tier.name, device=torch.device("meta"), engine=tier.engine)

    monkeypatch.setattr(session_tiers, "open_disk", of_another_device)
    model, batch = model_and_batch()
    expected = gradients(model, batch)
    plan = planned(model, batch, ways(DISK)["everything"], DISK)
    with Session(model, plan, measure=False, offload_dir=tmp_path) as session:
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            loss_of(model, batch).backward()
            assert are_equal(model, expected)
        assert session.report().tiers[0].total_out_bytes == 0


def through_views(b: kinds.Block, x: torch.Tensor) -> torch.Tensor:
    """Products with views of weights: transposed, a part, and of a frozen one."""
    h = torch.nn.functional.linear(x, b.up.weight).sin() @ b.up.weight
    return x + h.tanh() @ b.down.weight.t()[: h.shape[-1]]


@pytest.mark.parametrize("way", kinds.WAYS)
def test_f50_weights_that_get_another_storage_between_steps_stay(
    way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent = kinds.note_sent(monkeypatch)
    model, batch = kinds.Model(through_views, 256), kinds.a_batch(256)
    model.blocks[1].down.requires_grad_(False)
    expected, plan = kinds.gradients_of(model, batch), kinds.plan_of(model, batch, way)
    with Session(model, plan, measure=False, offload_dir=tmp_path) as session:
        for _ in range(3):
            sent.clear()
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
            tier = kinds.check(session, expected, batch)
            assert tier.out_bytes == tier.planned_bytes > 0
            kinds.check_weights_stayed(model, sent)


def test_f50_a_view_of_a_weight_that_was_replaced_is_no_activation(tmp_path: Path) -> None:
    model, batch = model_and_batch()
    plan = planned(model, batch, ways(DISK)["inputs"], DISK)
    with Session(model, plan, measure=False, offload_dir=tmp_path) as session:
        assert session._mover is not None
        weight = model.blocks[0].up.weight  # type: ignore[union-attr]
        for _ in range(3):
            weight.data = torch.randn(256, 128)  # type: ignore[assignment]
            loss_of(model, batch)
            call = session._mover.call("blocks.0", 0)
            for view in (weight.detach(), weight.data.t(), weight.data[3:].view(torch.int32)):  # type: ignore[union-attr, operator, index]
                assert session._mover.send(view, DISK, call) is None


@pytest.mark.parametrize("way", kinds.WAYS)
@pytest.mark.parametrize("reshard", [True, False])
def test_f51_weights_that_fsdp_has_gathered_stay(
    way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, reshard: bool
) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    def sharded(model: nn.Module) -> nn.Module:
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        return fully_shard(model, mesh=mesh, reshard_after_forward=reshard)

    batch = kinds.a_batch(256)
    plan = kinds.plan_of(kinds.Model(through_views, 256), batch, way)
    weights = [p.detach().clone() for p in kinds.Model(through_views, 256).parameters()]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        expected = kinds.gradients_of(sharded(kinds.Model(through_views, 256)), batch)
        model = sharded(kinds.Model(through_views, 256))
        sent = kinds.note_sent(monkeypatch)
        with Session(model, plan, measure=False, offload_dir=tmp_path) as session:
            tier = kinds.check(session, expected, batch)
            assert tier.out_bytes == tier.planned_bytes > 0
        kinds.check_weights_stayed(model, sent, weights)
    finally:
        dist.destroy_process_group()


class Beside(kinds.Model):
    """All blocks are given the same tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(sum(block(x) for block in self.blocks)).pow(2).mean()  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["inputs", "inputs, least"])
def test_f55_a_storage_that_several_blocks_need_is_sent_once(way: str, tmp_path: Path) -> None:
    model, batch = Beside(through_views, 256), kinds.a_batch(256)
    expected, plan = kinds.gradients_of(model, batch), kinds.plan_of(model, batch, way)
    with Session(model, plan, measure=False, offload_dir=tmp_path) as session:
        tier = kinds.check(session, expected, batch)
    assert tier.out_bytes == tier.planned_bytes == batch.nbytes


def test_f56_a_storage_at_the_address_of_a_dead_one_is_sent_anew(tmp_path: Path) -> None:
    model, batch = model_and_batch()
    plan = replace(planned(model, batch, ways(DISK)["everything"], DISK), disk_bytes=1 << 24)
    with Session(model, plan, measure=False, offload_dir=tmp_path) as session:
        mover = session._mover
        assert mover is not None
        call = mover.call("blocks.0", 0)
        places, known = set(), []
        for number in range(20):
            tensor = torch.full((200, 200), float(number))
            places.add(tensor.untyped_storage()._cdata)
            moved = mover.send(tensor, DISK, call)
            assert moved is not None
            moved.tier.engine.let_go(moved.transfer)
            known.append(moved)
            del tensor
        assert len(places) < len(known), "an address was used again"
        assert [moved.tensor()[0, 0].item() for moved in known] == list(range(20))
        del moved
        known.clear()
