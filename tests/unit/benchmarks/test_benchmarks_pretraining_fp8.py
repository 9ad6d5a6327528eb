"""The comparison of fp8 with bf16: what is trained, what is written, and when it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pretraining import fp8
from engine.config.enums import DType, Fp8
from engine.config.load import load
from engine.config.rules import check

TINY = ["model=llama_tiny", "model.num_layers=2", "model.vocab_size=2000", "data.seq_len=64"]


def lines(loss: float, steps: int = 40) -> list[dict[str, Any]]:
    """Metrics of a run whose first steps are slow, and whose last twenty have this mean loss."""
    found: list[dict[str, Any]] = [{"step": 0, "val_loss": 9.0}]
    for step in range(steps):
        noise = 0.1 if step % 2 else -0.1
        found.append({"step": step + 1, "loss": loss + noise, "tokens_per_s": 10.0 if step < 20 else 100.0})
    return [*found, {"step": steps, "val_loss": loss + 1}]


@pytest.mark.parametrize(("loss", "code"), [(4.0, 0), (4.019, 0), (3.981, 0), (4.021, 1), (3.9, 1)])
def test_both_curves_are_written_and_losses_far_apart_fail(
    loss: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: dict[str, list[str]] = {}

    def train(words: list[str], out: Path, name: str) -> list[dict[str, Any]]:
        trained[name] = words
        return lines(loss if name == "fp8" else 4.0)

    monkeypatch.setattr(fp8, "train", train)
    monkeypatch.setattr(fp8, "prepare", lambda data, say: None)
    assert fp8.main([str(tmp_path), "--steps", "40", "--commit", "abc", *TINY]) == code
    configs = {name: load(words) for name, words in trained.items()}
    assert {name: (cfg.precision.dtype, cfg.precision.fp8) for name, cfg in configs.items()} == {
        "bf16": (DType.bf16, Fp8.none),
        "fp8": (DType.bf16, Fp8.tensorwise),
    }
    bf16, other = (json.loads(text) for text in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert bf16["losses"] == pytest.approx([3.9, 4.1] * 20)
    assert (bf16["commit"], bf16["system"], bf16["n"], bf16["tokens_per_s"]) == ("abc", "octant bf16", 20, 100.0)
    assert bf16["relative_to_bf16"] is None
    assert other["relative_to_bf16"]["training"] == pytest.approx(loss / 4 - 1)
    assert other["relative_to_bf16"]["validation"] == pytest.approx((loss + 1) / 5 - 1)
    assert "1.00 times the tokens per second" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_default_can_run_on_one_gpu(precision: str) -> None:
    cfg = load([*fp8.DEFAULTS, f"precision={precision}"])
    assert check(cfg, 1) == []
    assert cfg.data.vocab_size == cfg.model.vocab_size
