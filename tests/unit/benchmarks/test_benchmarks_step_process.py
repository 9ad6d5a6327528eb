from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.step import systems
from benchmarks.step.cases import CASES
from benchmarks.step.process import reason, run
from benchmarks.step.systems import OCTANT, REFERENCE, Place, measure, missing, overrides_of
from benchmarks.step.words import quick, words_of

REFUSAL = """some warning
ConfigError:
1. [103] precision=fp8: no such file
   Try precision=bf16
"""
TRACEBACK = """[rank1]: Traceback (most recent call last):
[rank1]:   File "x.py", line 1, in <module>
[rank1]: ModuleNotFoundError: No module named 'liger_kernel'
torch.distributed.elastic.multiprocessing.errors.ChildFailedError: x
"""


@pytest.mark.parametrize(
    ("text", "code", "found"),
    [
        (REFUSAL, 2, "ConfigError: 1. [103] precision=fp8: no such file Try precision=bf16"),
        (TRACEBACK, 1, "ModuleNotFoundError: No module named 'liger_kernel'"),
        (
            "ValueError: late\n[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n",
            1,
            "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        ),
        ("transformers has no such model: model.bias=False\n", 1, "exit code 1: transformers has no such model: "),
        ("", -9, "ended by SIGKILL"),
        ("", 3, "exit code 3: it printed nothing"),
    ],
)
def test_a_failure_is_one_line(text: str, code: int, found: str) -> None:
    assert reason(text, code).startswith(found)
    assert "\n" not in reason(text, code)


def test_the_reason_is_from_this_run_and_the_log_keeps_all(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "x.log"
    fails = [sys.executable, "-c", "raise KeyError('first')"]
    assert run(fails, log, 60, os.environ) == "KeyError: 'first'"
    assert run([sys.executable, "-c", "raise ValueError('second')"], log, 60, os.environ) == "ValueError: second"
    assert run([sys.executable, "-c", "print('ValueError: not')"], log, 60, os.environ) is None
    assert "first" in log.read_text()
    assert "second" in log.read_text()


def test_a_process_is_ended_with_its_children_when_its_time_is_over(tmp_path: Path) -> None:
    words = ["sh", "-c", f"tail -f /dev/null & echo $! > {tmp_path}/child; wait"]
    start = time.monotonic()
    assert run(words, tmp_path / "log", 0.5, os.environ) == "stopped after 0 s: the budget was over"
    assert time.monotonic() - start < 10
    child = int((tmp_path / "child").read_text())
    status = Path(f"/proc/{child}/status")
    # It is told at once, and gone as soon as it is scheduled.
    while time.monotonic() - start < 10 and status.exists() and "zombie" not in status.read_text():
        time.sleep(0.01)
    assert not status.exists() or "zombie" in status.read_text()


def test_peers_that_are_not_there_are_named() -> None:
    assert missing(OCTANT) is None
    assert missing("plain") is None
    absent = systems.System("x", needs=("torch", "no_such_package"))
    systems.SYSTEMS["absent"] = absent
    try:
        assert missing("absent") == "not installed: no_such_package"
    finally:
        del systems.SYSTEMS["absent"]


def test_systems_have_the_overrides_that_they_understand() -> None:
    words = words_of(CASES["zero3_llama_8b_2gpus"])
    assert overrides_of(OCTANT, words) is words.octant
    assert overrides_of("hf_deepspeed", words) is words.sharded
    assert overrides_of("plain", words) is overrides_of("hf", words) is words.whole
    assert overrides_of(REFERENCE, words) is words.reference


def test_ranks_and_what_is_written_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[list[str]] = []

    def record(words: list[str], log: Path, seconds: float, env: dict[str, str]) -> str:
        began.append(words[1:])
        assert env["HF_HUB_OFFLINE"] == "1"
        return "no"

    monkeypatch.setattr("benchmarks.step.process.run", record)
    case = quick(CASES["zero1_llama_8b_2gpus"])
    place = Place(tmp_path, 1.0)
    for name in (OCTANT, "plain_whole", REFERENCE):
        assert measure(name, case, ["model=a"], place, profile=name == "plain_whole") == "no"
    octant, whole, reference = began
    assert octant[:3] == ["-m", "engine.train", "model=a"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "benchmarks.step.plain"]
    assert whole[:6] == launch
    assert ["--profile", str(tmp_path / "profiles" / case.name / "plain_whole"), "--variant", "whole"] == whole[7:11]
    # A single process, without torchrun.
    assert reference[:2] == ["-m", "benchmarks.step.plain"]
