from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels import report, table
from benchmarks.kernels.results import read
from benchmarks.kernels.targets import TARGETS, target_lines
from tests.helpers.kernel_rows import all_met, attention, auto, figure, unavailable

Row = dict[str, Any]


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def verdicts(rows: list[Row]) -> dict[str, str]:
    """By the first words of a target, its verdict and figure."""
    cells = [line.split(" | ") for line in list(target_lines(rows))[2:]]
    return {text.removeprefix("| "): f"{verdict}: {found.removesuffix(' |')}" for text, verdict, found in cells}


def verdict(rows: list[Row], start: str) -> str:
    (found,) = (value for text, value in verdicts(rows).items() if text.startswith(start))
    return found


def test_newer_rows_take_the_place_of_older_ones(tmp_path: Path) -> None:
    old = [*attention({"triton": 5e-3, "flex": 2e-3}), unavailable("c", "liger", "not there", suite="loss")]
    new = [*attention({"triton": 1e-3}), figure("c", "liger", "fwd+bwd", "s", 1.0, suite="loss")]
    rows = read([write(tmp_path / "1.jsonl", old), write(tmp_path / "2.jsonl", new)])
    found = {(row["system"], row["metric"]): row["p50"] for row in rows}
    assert found["triton", "fwd+bwd"] == 1e-3
    assert found["flex", "fwd+bwd"] == 2e-3
    assert found["liger", "fwd+bwd"] == 1.0
    assert len(rows) == 7


def test_a_system_that_can_run_no_more_keeps_no_figure(tmp_path: Path) -> None:
    rows = [*attention({"flex": 2e-3})]
    gone = {**unavailable(rows[0]["case"], "flex", "out of memory", suite="attention")}
    assert read([write(tmp_path / "rows.jsonl", [*rows, gone])]) == [gone]


def test_the_table_has_what_auto_reads(tmp_path: Path) -> None:
    rows = attention({"triton": 1.23456e-3, "sdpa_cudnn": 1e-3, "triton tutorial": 1e-4}, 4096)
    rows += attention({"triton": 9e-4, "dense triton": 3e-3}, 8192, suite="documents", documents=True)
    rows += attention({"triton": 1e-5}, 4096, kv_heads=4)
    rows += attention({"triton": 2e-4}, 1024, causal=False, head_dim=64)
    rows += [{**row, "quick": True} for row in attention({"triton": 1e-9}, 512)]
    rows += [auto("c", "auto", 1.0), unavailable("c", "flex", "no", suite="attention")]
    text = table.text_of(read([write(tmp_path / "rows.jsonl", rows)]))
    entries = json.loads(text)["attention"]["sm90"]
    assert [[entry[key] for key in table.KEYS] for entry in entries] == [
        [64, False, False, 1024],
        [128, True, False, 4096],
        [128, True, True, 8192],
    ]
    assert [entry["forward_backward_us"] for entry in entries] == [
        {"triton": 200.0},
        {"sdpa_cudnn": 1000.0, "triton": 1234.6},
        {"triton": 900.0},
    ]
    assert entries[0]["hardware"] == "NVIDIA H200"
    assert entries[0]["versions"]["cudnn"] == 91900
    # One entry a line, keys sorted: readable differences.
    lines = [line for line in text.splitlines() if line.startswith('{"causal"')]
    assert len(lines) == 3
    assert list(json.loads(lines[0].rstrip(","))) == sorted(entries[0])


def test_a_table_of_no_rows_is_json() -> None:
    assert json.loads(table.text_of([])) == {"attention": {}}


def test_all_targets_can_be_met() -> None:
    found = verdicts(all_met())
    assert {text: value.partition(":")[0] for text, value in found.items()} == dict.fromkeys(found, "met")
    assert len(found) == len(TARGETS) == 10
    assert verdict(all_met(), "triton: at least 80%").startswith("met: 83.3% (attention causal H128 S8192")


@pytest.mark.parametrize(
    ("start", "more", "figure_starts"),
    [
        ("auto: ", [auto("b", "auto", 1.05)], "1.050 (b; worst of 2)"),
        ("auto, flash_attn_4 removed", [auto("b", "auto without flash_attn_4", 1.2)], "1.200 (b"),
        ("triton: at least 80%", attention({"sdpa_cudnn": 1e-3, "triton": 1.3e-3}, 16384), "76.9% (attention"),
        (
            "triton inside documents",
            [figure("d", "triton", "speed over dense causal", "x", 2.4, suite="documents")],
            "2.40",
        ),
        ("loss: at most 0.5 GiB", [figure("m", "octant triton", "extra memory", "GiB", 0.6, suite="loss")], "0.600"),
        (
            "loss: time at most 1.0 ",
            [figure("m", name, "fwd+bwd", "s", s, suite="loss") for name, s in (("octant triton", 2.0), ("liger", 1))],
            "2.000 (m",
        ),
        (
            "loss: time at most 1.05",
            [
                figure("m", name, "fwd+bwd", "s", s, suite="loss")
                for name, s in (("octant triton", 1.06), ("torch.compile", 1))
            ],
            "1.060 (m",
        ),
        (
            "elementwise",
            [figure("gelu", "octant triton", "of copy: bwd", "ratio", 0.8, suite="elementwise")],
            "80.0% (gelu bwd; worst of 5)",
        ),
        ("elementwise", [unavailable("gelu", "octant triton", "no", suite="elementwise")], "90.0% (rms_norm bwd"),
        (
            "optimizer step: at least",
            [figure("adamw", "octant triton", "of copy: step", "ratio", 0.7, suite="optimizer")],
            "70.0%",
        ),
        (
            "optimizer step: faster",
            [
                figure("small", name, "step", "s", s, suite="optimizer")
                for name, s in (("octant triton", 2), ("torch fused + copies", 1))
            ],
            "0.50 (small",
        ),
    ],
)
def test_each_target_can_be_missed(start: str, more: list[Row], figure_starts: str) -> None:
    kept = [row for row in all_met() if (row["case"], row["system"]) not in {(r["case"], r["system"]) for r in more}]
    assert verdict([*kept, *more], start).startswith(f"missed: {figure_starts}")


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    quick = [{**row, "quick": True} for row in all_met()]
    assert set(verdicts(quick).values()) == {"not measured: "}
    assert verdict([unavailable("a", "auto", "no", suite="attention")], "auto: ") == "missed: no figure for a"


def test_the_report_shows_figures_reasons_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*all_met(), unavailable("l", "flash|loss", "No module named 'x|y'", suite="loss")]
    out = tmp_path / "pictures"
    report.main([str(write(tmp_path / "rows.jsonl", rows)), "--out", str(out), "--targets"])
    text = capsys.readouterr().out
    assert "NVIDIA H200, torch 2.11.0, cuda 13.0, triton 3.6.0, cudnn 91900, commit abc1234\n" in text
    assert "| attention causal H128 S4096 K16 | triton | 0.33 [0.3234, 0.3399], " in text
    assert "| 1.010: triton, best sdpa_cudnn |" in text
    assert "| No module named 'x/y' |" in text
    assert "| swiglu | octant triton | 90.0% [88.2%, 92.7%] | 90.0% [88.2%, 92.7%] |  |" in text
    assert "| loss: at most 0.5 GiB beyond inputs and gradients | met | 0.300 |" in text
    names = ("attention_causal", "documents", "loss", "loss_memory", "elementwise", "optimizer")
    assert {path.name for path in out.iterdir()} == {f"nvidia_h200_{name}.png" for name in names}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.iterdir())


def test_a_report_of_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "gone.jsonl")])
    assert "no rows at " in capsys.readouterr().err
