"""The search for the longest sequence, with a device that is made up."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory import longest
from benchmarks.memory.longest import Lengths, attempt, main

WORDS = ["model=llama_tiny", "data=random", "--commit", "abc", "--multiple", "8", "--start", "32"]


def search(limit: int, **options: Any) -> tuple[list[int], Lengths]:
    lengths = Lengths(**{"start": 32, "most": None, "multiple": 8, **options})
    tried = []
    for length in lengths:
        tried.append(length)
        lengths.tell(length, fits=length <= limit)
    return tried, lengths


@pytest.mark.parametrize("limit", [0, 7, 8, 31, 32, 100, 1000, 4096])
def test_the_longest_multiple_that_fits_is_found(limit: int) -> None:
    tried, lengths = search(limit)
    assert lengths.passed == limit // 8 * 8
    assert lengths.failed == lengths.passed + 8
    assert len(set(tried)) == len(tried)
    assert all(length % 8 == 0 for length in tried)


def test_doubling_then_halving() -> None:
    assert search(100)[0] == [32, 64, 128, 96, 112, 104]


def test_it_ends_at_the_most_that_is_asked_for() -> None:
    tried, lengths = search(10**9, most=100)
    assert tried == [32, 64, 96]
    assert (lengths.passed, lengths.failed) == (96, None)


def fake(limit: int, tried: list[list[str]]) -> Any:
    def measure(words: list[str], out: Path, timeout_s: float | None) -> dict[str, Any]:
        tried.append(words)
        length = int(next(word for word in words if word.startswith("data.seq_len=")).split("=")[1])
        if length > limit:
            return {"out_of_memory": "CUDA out of memory", "peak_bytes": 7 * 2**30, "host_peak_bytes": 2**30}
        return {"step_s": [9.0, 2.0], "losses": [1.0, 1.0], "peak_bytes": length, "host_peak_bytes": 2**30}

    return measure


def test_rows_tell_of_every_try_and_of_the_longest(tmp_path: Path) -> None:
    tried: list[list[str]] = []
    assert main([str(tmp_path), *WORDS], fake(64, tried)) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    peaks = [row for row in rows if row["metric"] == "peak device memory"]
    assert [row["seq_len"] for row in peaks] == [32, 64, 128, 96, 80, 72]
    assert [row["out_of_memory"] is None for row in peaks] == [True, True, False, False, False, False]
    assert peaks[0]["expected_gib"]["device"] > peaks[0]["expected_gib"]["activations"] > 0
    assert [(row["seq_len"], row["p50"]) for row in rows if row["metric"] == "speed"] == [(32, 16.0), (64, 32.0)]
    assert (rows[-1]["metric"], rows[-1]["p50"], rows[-1]["too_long"]) == ("longest sequence", 64.0, 72)
    assert {"train.steps=2", "data.seq_len=32", "model.max_positions=32"} <= set(tried[0])


def test_given_lengths_alone_are_tried_and_none_that_passes_is_a_failure(tmp_path: Path) -> None:
    tried: list[list[str]] = []
    assert main([str(tmp_path), *WORDS, "--lengths", "40,48"], fake(8, tried)) == 1
    assert [words[-1] for words in tried] == ["model.max_positions=40", "model.max_positions=48"]


def test_the_search_ends_with_its_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given: list[float | None] = []

    def slow(words: list[str], out: Path, timeout_s: float | None) -> dict[str, Any]:
        given.append(timeout_s)
        raise subprocess.TimeoutExpired("measure", 5.0)

    assert main([str(tmp_path), *WORDS, "--budget-s", "5"], slow) == 1
    assert len(given) == 1
    assert 0 < (given[0] or 0) <= 5
    assert "32 tokens: not done in the 5 s that were left" in capsys.readouterr().out


def test_a_host_without_memory_is_an_answer_and_a_crash_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def ends_with(code: int) -> Any:
        def fail(*_: object) -> dict[str, Any]:
            raise subprocess.CalledProcessError(code, "measure", output="the end of the log")

        return fail

    monkeypatch.setattr(longest, "in_process", ends_with(-signal.SIGKILL))
    assert attempt([], tmp_path, None)["out_of_memory"] == "the host's memory: killed"
    monkeypatch.setattr(longest, "in_process", ends_with(1))
    with pytest.raises(SystemExit, match="the end of the log"):
        attempt([], tmp_path, None)
