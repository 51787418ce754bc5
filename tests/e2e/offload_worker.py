"""One training run in a process of its own, whose memory is limited: prints what it did as JSON."""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import resource
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tapeline

NUM_BLOCKS, WIDTH, LENGTH = 8, 128, 512


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--limit", type=int, default=0, help="bytes beyond what the process has when the model is built"
    )
    parser.add_argument("--budget", default="")
    parser.add_argument("--folder", default="")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--on_full_tier", default="error")
    parser.add_argument("--waits", action="store_true")
    given = parser.parse_args()

    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=256,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).train()
    ids = torch.randint(0, 256, (4, LENGTH))
    batch = {"input_ids": ids, "labels": ids}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    small = {name: tensor[:1, :8] for name, tensor in batch.items()}
    model(**small).loss.backward()  # libraries load what they need at first use
    model.zero_grad()
    session = None
    if given.budget:
        session = tapeline.fit(
            model,
            batch,
            int(given.budget),
            mode="auto",
            disk_budget="8GiB",
            offload_dir=given.folder,
            measure=False,
            optimizer=optimizer,
            on_full_tier=given.on_full_tier,
        )
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = status("VmRSS")
    if given.limit:
        limit = status("VmData") + given.limit
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    losses = []
    for _ in range(given.steps):
        loss = model(**batch).loss
        loss.backward()
        if given.waits and losses:
            sys.stdout.write("ready\n")
            sys.stdout.flush()
            time.sleep(60)
        losses.append(loss.item())
        del loss
        digest = hashlib.sha256()
        for parameter in model.parameters():
            assert parameter.grad is not None
            digest.update(parameter.grad.numpy().tobytes())
        optimizer.step()
        optimizer.zero_grad()
    found = {"losses": losses, "gradients": digest.hexdigest(), "resident_bytes": status("VmHWM") - before}
    if session is not None:
        tiers = session.report().tiers
        found |= {
            "planned_bytes": session.plan.peak_bytes,
            "disk_bytes": session.plan.disk_bytes,
            "moved_bytes": tiers[0].out_bytes if tiers else 0,
            "most_used_bytes": tiers[0].most_used_bytes if tiers else 0,
        }
        session.remove()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
