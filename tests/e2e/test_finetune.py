"""A fine-tune as a user does it: a saved model, chat records, adapters, a budget; then plain PEFT."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tapeline.train.config import load_config
from tapeline.train.demo import byte_tokenizer
from tapeline.train.loop import Measurement
from tapeline.train.run import Result, train
from tests.models import _llama

pytestmark = pytest.mark.filterwarnings("default")  # the libraries around a training loop warn about themselves


class Silent:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.measurements: list[Measurement] = []

    def said(self, text: str) -> None:
        self.lines.append(text)

    def planned(self, plan: Any) -> None:
        self.lines.append(str(plan))

    def measured(self, measurement: Measurement) -> None:
        self.measurements.append(measurement)

    def stepped(self, step: int, num_steps: int) -> None: ...

    def logged(self, step: int, values: dict[str, float]) -> None: ...


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    _llama(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, attention_dropout=0.0).save_pretrained(
        path
    )
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = []
    for index in range(500):
        question = f"What is {index} plus {index % 7}?"
        answer = f"It is {index + index % 7}." + " Indeed." * (index % 5)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(rows))
    return path


def run(model_dir: Path, chats: Path, output: Path, **settings: Any) -> Result:
    given = {
        "model": str(model_dir),
        "data": str(chats),
        "output_dir": str(output),
        "lora_r": 8,
        "lora_dropout": 0.1,
        "learning_rate": 2e-3,
        "eval_fraction": 0.1,
        "max_steps": 12,
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "budget": "60%",
    }
    return train(load_config(given | settings), Silent())


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["lora", "qlora"])
def test_the_loss_curve_is_that_without_tapeline(
    model_dir: Path, chats: Path, tmp_path: Path, load_in_4bit: bool
) -> None:
    from peft import PeftModel

    if load_in_4bit:
        pytest.importorskip("bitsandbytes")
    ours = run(model_dir, chats, tmp_path / "ours", load_in_4bit=load_in_4bit)
    plain = run(model_dir, chats, tmp_path / "plain", load_in_4bit=load_in_4bit, mode="none", budget="100%")
    assert plain.plan.flops == plain.plan.untouched_flops
    assert all(block.saved != "device" for block in ours.plan.blocks)
    assert len(ours.losses) == 12
    assert ours.losses == plain.losses
    assert ours.losses[-1][1] < ours.losses[0][1]
    assert ours.eval_loss == plain.eval_loss
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "plain")]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[1])

    assert ours.report.is_within_budget
    assert ours.measurements
    assert all(abs(m.deviation) < 0.02 for m in ours.measurements)

    base = AutoModelForCausalLM.from_pretrained(model_dir)
    loaded = PeftModel.from_pretrained(base, tmp_path / "ours")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    batch = tokenizer("What is 3 plus 3?", return_tensors="pt")
    with torch.no_grad(), loaded.disable_adapter():
        without = loaded(**batch).logits
    with torch.no_grad():
        assert not torch.equal(loaded(**batch).logits, without)


def test_full_fine_tuning_under_accumulation_saves_a_plain_model(model_dir: Path, chats: Path, tmp_path: Path) -> None:
    result = run(
        model_dir, chats, tmp_path / "out", lora_r=0, gradient_accumulation_steps=2, max_steps=4, learning_rate=1e-4
    )
    assert result.report.is_within_budget
    assert all(abs(m.deviation) < 0.02 for m in result.measurements)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert type(model).__name__ == "LlamaForCausalLM"
    assert json.loads((tmp_path / "out" / "tapeline_plan.json").read_text())["mode"] == "auto"


def command(output: Path, *extra: str) -> list[str]:
    small = ["--max_steps", "9", "--save_steps", "3", "--max_length", "128", "--budget", "60%", "--logging_steps", "1"]
    return [sys.executable, "-m", "tapeline", "train", *small, "--output_dir", str(output), *extra]


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_or_interrupted_and_resumed_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # with several threads, sums of the CPU kernels differ from run to run
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True, timeout=300)
    whole = load_file(tmp_path / "whole" / "model.safetensors")

    killed = subprocess.Popen(command(tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for((tmp_path / "killed" / "checkpoint-3" / "tapeline_plan.json").exists, killed)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()

    log = tmp_path / "log"
    with log.open("w") as out:
        stopped = subprocess.Popen(command(tmp_path / "stopped"), stdout=out, stderr=out)
        wait_for(lambda: "step 2:" in log.read_text(), stopped)
        stopped.send_signal(signal.SIGINT)
        assert stopped.wait(timeout=120) == 130
    assert "--resume_from_checkpoint last" in log.read_text()

    for name in ("killed", "stopped"):
        resume = command(tmp_path / name, "--resume_from_checkpoint", "last")
        subprocess.run(resume, check=True, capture_output=True, timeout=300)
        resumed = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_a_failing_evaluation_loses_nothing(
    model_dir: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    from tapeline.errors import TapelineError

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(transformers.Trainer, "evaluate", fail)
    with pytest.raises(TapelineError, match="saved in .* but the evaluation failed: no such kernel"):
        run(model_dir, chats, tmp_path / "out", max_steps=2)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_model_that_is_no_language_model_is_refused(chats: Path, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    from tapeline.errors import UnsupportedModelError

    config = ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(UnsupportedModelError, match="not a causal language model"):
        run(tmp_path / "vit", chats, tmp_path / "out", tokenizer="bytes")
    assert not (tmp_path / "out").exists()


def test_running_out_of_memory_says_so() -> None:
    from tapeline.errors import OutOfMemoryError
    from tapeline.train.loop import memory_errors

    with pytest.raises(OutOfMemoryError, match="Out of memory during the step"), memory_errors("the step"):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="other"), memory_errors("the step"):
        raise RuntimeError("other")


def test_a_full_disk_says_where_and_how_to_go_on(tmp_path: Path) -> None:
    from tapeline.errors import UsageError
    from tapeline.train.loop import disk_errors

    for error in (OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")):
        with (
            pytest.raises(UsageError, match="Cannot write to .* free.*--resume_from_checkpoint last"),
            disk_errors(tmp_path),
        ):
            raise error
    with pytest.raises(RuntimeError, match="other"), disk_errors(tmp_path):
        raise RuntimeError("other")
