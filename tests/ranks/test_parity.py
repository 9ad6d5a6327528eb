"""Every combination computes what one process computes, and the study that says so notices when it is not true."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config.enums import DType
from engine.config.load import load
from engine.config.schema import Config
from engine.study import compare, parity
from engine.study.__main__ import main
from engine.study.cases import Case
from engine.study.run import run_cases
from tests.helpers import faults

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(900)]


def tiny(*words: str) -> Config:
    return load([*parity.DEFAULTS, "model=gpt_tiny", "train.device=cpu", *words])


def test_a_small_subset_agrees_with_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "parity.json"
    # Fewer than --quick has: these cases take longer than all other tests of a file. In fewer steps than ten norms'
    # weights move so little that the rounding of their storage shows.
    code = main(["parity", "model=gpt_tiny", "train.device=cpu", "--cases", "12", "--json", str(out)])
    assert code == 0, capsys.readouterr().out
    rows = json.loads(out.read_text())["cases"]
    assert len(rows) == 12
    seen = {word for row in rows for word in row["case"].split()}
    assert seen >= {"pp4", "cp4", "tp4", "tp2+sequence", "dp8", "zero3+offload", "accum8", "interleaved", "dualpipev"}
    assert seen >= {"gpt2", "llama", "bert", "neox", "qwen2", "variable", "dropout0.1", "smoothed", "recompute-full2"}
    assert seen >= {"recompute-nested2", "recompute-offload2", "tiles-mlp", "tiles-block"}
    # A layout that adds in the oracle's order may agree to the bit; most do not, unless nothing is compared.
    assert sum(row["errors"]["gradient"] > 0 for row in rows) >= 9
    for row in rows:
        errors = row["errors"]
        assert errors["gradient"] <= 1e-5
        assert errors["loss"] <= 1e-6
        assert errors["norm"] <= 1e-6
        assert errors["sgd"] <= 1e-4
        assert errors["adamw"] <= 1e-4


@pytest.mark.parametrize("dtype", [DType.bf16, DType.fp16])
def test_16_bits_are_as_close_to_fp32_as_one_rank_in_them(dtype: DType) -> None:
    cfg = tiny("train.steps=4")
    cfg.precision.dtype = dtype
    cases = [
        Case(world=2, tp=2, sequence=True, zero=2, flavour="llama", tied=False),
        Case(world=2, pp=2, schedule="interleaved", zero=1, accum=4, flavour="bert"),
        Case(world=2, context=2, zero=3, recompute="full"),
    ]
    *_, rows = run_cases(cfg, cases, timeout_s=120)
    for row in rows:
        assert row["failed"] == []
        assert 0 < row["errors"]["gradients"] <= 2.0
        assert 0 < row["errors"]["gradient"] <= 2.0


@pytest.mark.parametrize(
    ("plant", "case", "named"),
    [
        (
            faults.divide_by_accumulation_twice,
            Case(world=2, pp=2, zero=0, accum=4, tied=False),
            # The first stage, which has three of the four blocks.
            r"gradient of (embed|block\.[012])\.",
        ),
        (faults.forget_row_bias_reduction, Case(world=2, tp=2), r"gradient of .*(out|down)\.bias"),
        (faults.forget_tied_reduction, Case(world=2, pp=2), r"gradient of embed\.tokens\.weight"),
        (faults.sum_over_replicas, Case(world=2, zero=0), r"gradient of .*: [19]\.\d+e[+-]0\d"),
        (faults.sum_over_replicas, Case(world=2, flavour="llama"), r"gradient of .*: [19]\.\d+e[+-]0\d"),
        (
            faults.let_padding_into_softmax,
            Case(world=2, tp=2, zero=0, flavour="llama", tied=False),
            r"gradient of (head|final_norm)\.weight.*loss: ",
        ),
        (
            faults.forget_norm_reduction,
            Case(world=2, tp=2, sequence=True, flavour="llama"),
            r"gradient of \w+(\.\d)?[.\w]*norm\.weight",
        ),
        (faults.leave_out_a_context_rank, Case(world=2, context=2), r"gradient of \S+: [4-9]\.\d+e-01"),
        (faults.normalise_on_each_rank, Case(world=2, length="variable"), r"gradient of .*; loss: "),
        (
            faults.recompute_with_other_masks,
            Case(world=1, recompute="full", dropout=0.1),
            r"gradient of block\.\d\.",
        ),
        (
            faults.swap_chunks,
            Case(world=4, pp=4, schedule="interleaved", accum=4, tied=False),
            r"gradient of block\.\d\.",
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_planted_fault_is_found_and_named(plant: Callable[[], None], case: Case, named: str) -> None:
    *_, rows = run_cases(tiny("train.steps=1"), [case], timeout_s=120, before_case=plant)
    (row,) = rows
    verdict = "; ".join(row["failed"])
    assert re.search(named, verdict), verdict


def test_a_miss_is_a_nonzero_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(compare.FP32, "gradient", 1e-12)
    options = ["--worlds", "1", "--zero", "1", "--accum", "1", "--flavours", "gpt2", "--tied", "tied", "--cases", "1"]
    words = ["model=gpt_tiny", "train.device=cpu", "train.steps=1"]
    code = main(["parity", *words, *options, "--json", str(tmp_path / "p.json")])
    said = capsys.readouterr().out
    assert code == 1
    assert "parity FAILED in 1 of 1 cases" in said
    assert re.search(r"gradient of [\w.]+: \d\.\d+e-\d+ > 1e-12", said)
