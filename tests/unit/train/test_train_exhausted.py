"""Memory that ran out is told as one refusal with the numbers and legal ways out."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch

from engine.config.load import load
from engine.train import __main__ as train
from engine.train import exhausted, session
from engine.train.exhausted import asked, explained, is_out_of_memory
from tests.helpers.configs import make

CUDA = (
    "CUDA out of memory. Tried to allocate 7.68 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.25 GiB is "
    "free. Including non-PyTorch memory, this process has 77.85 GiB memory in use."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "3221225472 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(CUDA), RuntimeError(CPU), RuntimeError("CUDA error: out of memory"), MemoryError()]
)
def test_allocations_that_fail_are_recognised(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("out of memory"), KeyboardInterrupt()])
def test_other_errors_are_left_alone(error: BaseException) -> None:
    assert not is_out_of_memory(error)
    assert explained(error, make(), 0, 1) is None


def test_asked_and_free_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exhausted, "available_bytes", lambda: 2**30)
    assert asked(CUDA) == "asked its device for 7.68 GiB more, and 1.25 GiB of 79.10 GiB were free"
    assert asked(CPU) == "asked for 3.00 GiB of the host's memory and did not get it; the host has 1.00 GiB free"
    assert asked("") == "asked for memory of the host and did not get it; the host has 1.00 GiB free"


def test_the_refusal_names_the_rank_and_what_to_change() -> None:
    cfg = load(["model=gpt_1_3b", "precision=bf16", "data.seq_len=2048", "train.micro_batch=8"])
    error = explained(torch.OutOfMemoryError(CUDA), cfg, 1, 2)
    text = str(error)
    assert re.match(
        r"1\. \[OCT591\] train.micro_batch=8: rank 1 asked its device for 7.68 GiB more, and 1.25 GiB", text
    )
    assert "train.recompute=full (" in text
    assert "train.micro_batch=4 train.accum_steps=2 (" in text
    assert text.endswith("; train.micro_batch=auto finds the largest that fits")


def test_training_that_runs_out_ends_with_the_refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(cfg: Any, env: Any) -> None:
        raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(session, "check_before_launch", lambda cfg: None)
    monkeypatch.setattr(session, "run", run)
    assert train.main(["train.device=cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("LaunchError:\n1. [OCT591] train.micro_batch=4: rank 0 asked its device for 7.68 GiB more")
