from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import tapeline
from tapeline.runtime.measure import AllocatorMeter, LedgerMeter, make_meter
from tests.models import TinyModel


def test_the_ledger_measures_where_there_is_no_allocator_to_ask(llama: TinyModel) -> None:
    meter = make_meter(llama.model, torch.device("cpu"))
    assert isinstance(meter, LedgerMeter)
    with meter.measure(None, []):
        llama.step()
    first = meter.last_peak_bytes
    with meter.measure(None, []):
        torch.zeros(1)
    assert meter.peak_bytes == first
    assert (meter.last_peak_bytes or 0) < (first or 0)


def test_the_allocator_is_reset_and_the_largest_peak_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([100, 70])
    resets: list[str] = []
    module = SimpleNamespace(
        reset_peak_memory_stats=lambda device: resets.append(str(device)),
        max_memory_allocated=lambda device: next(peaks),
        max_memory_reserved=lambda device: 128,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    meter = AllocatorMeter(torch.device("cuda:0"))
    for _ in range(2):
        with meter.measure(None, []):
            pass
    assert (meter.peak_bytes, meter.last_peak_bytes, meter.reserved_bytes) == (100, 70, 128)
    assert resets == ["cuda:0", "cuda:0"]


@pytest.mark.gpu
def test_predicted_and_allocated_agree_on_a_device(llama: TinyModel) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an accelerator")
    model = llama.model.to("cuda")
    batch = {name: tensor.to("cuda") for name, tensor in llama.batch.items()}
    model(**batch).loss.backward()  # workspaces
    model.zero_grad()
    with tapeline.fit(model, batch, mode="recompute") as session:
        model(**batch).loss.backward()
    report = session.report()
    assert report.measured_peak_bytes == pytest.approx(report.predicted_first_step_peak_bytes, rel=0.05)
    assert (report.measured_reserved_bytes or 0) >= report.measured_peak_bytes
