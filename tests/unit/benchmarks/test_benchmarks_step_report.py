from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.step import report
from benchmarks.step.results import read
from benchmarks.step.targets import target_lines
from tests.helpers.step_rows import AROUND, profiled, reference, step, unavailable

Row = dict[str, Any]
ACCUM8 = "gpt_1_3b_accum8"


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def verdict(rows: list[Row], case: str, start: str) -> str:
    """Verdict and figure of the target of `case` that begins with `start`."""
    cells = [line.strip("| ").split(" | ") for line in list(target_lines(rows))[2:]]
    (found,) = ([*rest] for name, text, *rest in cells if name == case and text.startswith(start))
    return ": ".join(found).strip(": |")


def test_newer_rows_take_the_place_of_older_ones(tmp_path: Path) -> None:
    old = [step(ACCUM8, "octant", 1e4), step(ACCUM8, "hf", 1e4), profiled(ACCUM8, "hf", *[1.0] * 7)]
    old += [unavailable(ACCUM8, "hf_liger", "not installed")]
    new = [step(ACCUM8, "octant", 2e4), unavailable(ACCUM8, "hf", "out of memory"), step(ACCUM8, "hf_liger", 3e4)]
    foreign = [{"case": "x", "system": "octant", "metric": "step", "hardware": "NVIDIA H200"}]
    rows = read([write(tmp_path / "1.jsonl", [*old, *foreign]), write(tmp_path / "2.jsonl", new)])
    found = {(row["system"], row["metric"]): row.get("tokens_per_s") for row in rows}
    assert found == {("octant", "step"): 2e4, ("hf", "unavailable"): None, ("hf_liger", "step"): 3e4}


@pytest.mark.parametrize(
    ("ours", "whole", "expected"),
    [
        (64_000, 65_000, "met: 98.5% of plain_whole"),
        (62_000, 64_000, "missed: 96.9% of plain_whole"),
        (62_000, 62_500, "missed: 95.4% of plain"),
    ],
)
def test_the_quicker_plain_loop_counts(ours: float, whole: float, expected: str) -> None:
    rows = [step(ACCUM8, "octant", ours), step(ACCUM8, "plain_whole", whole)]
    rows += [step(ACCUM8, "plain", 65_000 if whole == 62_500 else 60_000)]
    assert verdict(rows, ACCUM8, "at least 97% of the quicker plain") == expected


def test_plain_loops_of_another_call_do_not_count() -> None:
    rows = [step(ACCUM8, "octant", 64_000), step(ACCUM8, "plain", 60_000, call="later")]
    assert verdict(rows, ACCUM8, "at least 97%") == "not measured"


def test_rates_shares_of_other_cases_and_sizes() -> None:
    two = "zero1_gpt_1_3b_accum8_2gpus"
    rows = [step(ACCUM8, "octant", 66_000), step(two, "octant", 64_000, gpus=2)]
    rows += [step("llama_8b", "octant", 12_001), step("llama_8b_fp8", "octant", 15_000)]
    rows += [step("bert_large", "octant", 2e5, samples_per_s=389.6), step("offload_gpt_6_7b", "octant", 1e4)]
    rows += [step("offload_largest", "octant", 100.0, parameters=17.04e9)]
    rows += [step("long_llama_8b", "octant", 1500.0, seq_len=358400)]
    assert verdict(rows, ACCUM8, "at least 66,000") == "met: 66,000"
    assert verdict(rows, two, "at least 97% of the rate per GPU of gpt_1_3b_accum8") == "missed: 97.0%"
    assert verdict(rows, "llama_8b", "at least 12,000 tok/s") == "met: 12,001"
    assert verdict(rows, "llama_8b_fp8", "at least 1.3 times the rate of llama_8b") == "missed: 1.25"
    assert verdict(rows, "bert_large", "at least 390 seq") == "missed: 390"
    assert verdict(rows, "offload_gpt_6_7b", "at least 450 TFLOP/s C") == "missed: 85"
    assert verdict(rows, "offload_largest", "at least 17 billion") == "met: 17.04"
    assert verdict(rows, "long_llama_8b", "at least 350,000 tokens") == "met: 358,400"
    assert verdict(rows, "tp2_llama_8b", "at least 9,500") == "not measured"


@pytest.mark.parametrize(("rate", "expected"), [(27_400, "met: +2.8: 8.7%"), (27_000, "missed: +4.1: 10.0%")])
def test_a_bubble_is_held_against_the_rate_without_one(rate: float, expected: str) -> None:
    rows = [step("gpt_2_8b_without_bubble", "octant", 30_000)]
    rows += [step("pp2_gpt_2_8b", "octant", rate, gpus=2, ideal_bubble=1 / 17)]
    found = verdict(rows, "pp2_gpt_2_8b", "at most 3 points over the schedule's ideal bubble")
    assert found == f"{expected}, ideal 5.9%"


def test_a_loss_far_from_fp32_is_missed() -> None:
    rows = [step(ACCUM8, "octant", 1.0, losses={"10": 11.1}), reference(ACCUM8, 11.0)]
    assert verdict(rows, ACCUM8, "loss within 0.5% of that in fp32") == "missed: +0.909%"
    rows[0]["losses"] = {"10": 11.05}
    assert verdict(rows, ACCUM8, "loss") == "met: +0.455%"


def test_what_octant_refuses_is_missed_with_the_reason() -> None:
    rows = [unavailable("llama_8b_fp8", "octant", "ConfigError: no such choice | try bf16")]
    expected = "missed: ConfigError: no such choice / try bf16"
    assert verdict(rows, "llama_8b_fp8", "at least 1.3 times") == expected


def test_quick_rows_measure_nothing() -> None:
    rows = [{**row, "quick": True} for row in (step(ACCUM8, "octant", 1e6), step(ACCUM8, "plain", 1.0))]
    assert {line.split(" | ")[2] for line in list(target_lines(rows))[2:]} == {"not measured"}


def test_tables_targets_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [step(ACCUM8, "octant", 64_000), step(ACCUM8, "plain", 65_000), reference(ACCUM8, 11.0)]
    rows += [unavailable(ACCUM8, "torchtitan", "not installed"), profiled(ACCUM8, "octant", 150, 30, 20, 0, 12, 4, 44)]
    quick = {
        **step("gpt2_124m", "octant", 9.0),
        "quick": True,
        "hardware": "CPU",
        "mfu_c": None,
        "peak_memory_gib": None,
    }
    write(tmp_path / "rows.jsonl", [*rows, {**quick, "versions": AROUND["versions"]}])
    report.main([str(tmp_path), "--targets"])
    text = capsys.readouterr().out
    assert (
        f"| {ACCUM8} | 1 | octant | 256 [253.4, 261.1] | 24 | 64,000 | 31.2 | 50.0% / 53.0% | 66.0% | 40.2 "
        "| 11.09000 (+0.818%) |" in text
    )
    assert f"| {ACCUM8} | 1 | torchtitan | not installed | | | | | | | |" in text
    assert f"| {ACCUM8} | 1 | fp32 reference | | | | | | | | 11.00000 at step 10, products in fp32 |" in text
    # 260 ms under the profiler, 256 without it: four of the 44 ms of gaps are the profiler's.
    assert f"| {ACCUM8} | octant | 150.0 | 30.0 | 20.0 | 0.0 | 12.0 | 4.0 | 44.0 | 260.0 | 256.0 | 40.0 |" in text
    assert f"| {ACCUM8} | at least 66,000 tok/s per GPU | missed | 64,000 |" in text
    assert (
        "CPU, torch 2.11.0, cuda 13.0, triton 3.6.0, deepspeed 0.19.8, liger-kernel 0.8.5, commit abc1234; a quick"
        in text
    )
    assert (tmp_path / "nvidia_h200_steps.png").stat().st_size > 20_000
    assert (tmp_path / "cpu_steps_quick.png").stat().st_size > 10_000


def test_files_without_rows_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ([str(tmp_path / "gone.jsonl")], f"no rows at {tmp_path / 'gone.jsonl'}"),
        ([str(write(tmp_path / "rows.jsonl", [{"case": "x"}]))], "rows.jsonl: no row of this suite"),
    ):
        with pytest.raises(SystemExit):
            report.main(words)
        assert message in capsys.readouterr().err
