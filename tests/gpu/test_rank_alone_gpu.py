"""One rank of many on a GPU: messages take a link's time beside the passes, and what is held is a share."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from engine.study.loopback import Loopback
from engine_kernels.triton.link import Link
from tests.helpers.command import run_command

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SLEEP = 200_000_000
"""Clock cycles, some hundred milliseconds."""
WORDS = [
    "model=llama_tiny",
    "model.hidden_size=1024",
    "model.ffn_size=4096",
    "model.num_heads=8",
    "model.num_layers=6",
    "data.seq_len=256",
    "precision=bf16",
    "train.steps=5",
    "kernels.compile=off",
]


@pytest.mark.parametrize("wanted", [25e9, 100e9, 315e9])
def test_a_link_has_the_rate_that_was_asked_for(wanted: float) -> None:
    assert Link(wanted).measured(torch.device("cuda")) == pytest.approx(wanted, rel=0.1)


def test_other_work_does_not_slow_a_message_down() -> None:
    link, device = Link(315e9), torch.device("cuda")
    own, x = torch.empty(2**27, dtype=torch.uint8, device=device), torch.randn(8192, 8192, device=device).bfloat16()
    every, beside = torch.empty(2**28, dtype=torch.uint8, device=device), torch.cuda.Stream(device)
    seconds = []
    for busy in (False, False, True):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        with torch.cuda.stream(beside):
            # So that the message is the first.
            torch.cuda._sleep(SLEEP // 1000)
            begin.record()
            link.gather(own, every, 0)
            end.record()
        torch.cuda._sleep(SLEEP // 500)
        for _ in range(4 if busy else 0):
            x @ x
        torch.cuda.synchronize(device)
        seconds.append(begin.elapsed_time(end))
    assert seconds[2] < 1.3 * seconds[1], seconds


def test_a_message_waits_for_what_it_sends_and_is_waited_for_on_the_stream_alone() -> None:
    group = Loopback(0, 2, Link(None))
    own, every = torch.zeros(2**20, device="cuda"), torch.zeros(2**21, device="cuda")
    # Twice, since kernels are loaded when they are first launched, which waits for the device.
    for cycles, value in ((0, 1), (SLEEP, 2)):
        torch.cuda.synchronize()
        since = time.perf_counter()
        torch.cuda._sleep(cycles)
        own.fill_(value)
        message = group.all_gather_single(every, own)
        late = not message.is_completed()
        message.wait()
        summed = every.sum()
        took = time.perf_counter() - since
        assert summed.item() == value * 2**21
        assert message.is_completed()
    assert late
    assert took < 0.02


def test_more_ranks_hold_less(tmp_path: Path) -> None:
    peaks, sent = [], []
    for world in (2, 8):
        command = ["python", "-m", "engine.study", "rank", "--world", str(world), "--link-gb-s", "300", "zero=z3"]
        done = run_command([*command, *WORDS, f"run.dir={tmp_path}", f"run.name={world}"], tmp_path, 150)
        assert done.exit_code == 0, done
        assert "GB/s of one direction, for 300" in done.stdout
        summary = json.loads((tmp_path / str(world) / "summary.json").read_text())
        assert summary["link_gb_s"] == pytest.approx(300, rel=0.25)
        peaks.append(summary["peak_memory_gib"] * 2**30)
        sent.append(summary["messages"]["reduce-scatter"]["bytes"])
    # 12 bytes of state, 2 of weights and 4 of sums for each of 82 million parameters: a half and an eighth of them.
    assert 0.3 * 82e6 * 18 < peaks[0] - peaks[1] < 0.45 * 82e6 * 18
    assert sent[1] / sent[0] == pytest.approx((7 / 8) / (1 / 2), rel=0.02)
