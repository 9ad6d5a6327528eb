"""`python -m engine_kernels` says what runs here."""

from __future__ import annotations

import pytest
import torch

from engine_kernels.__main__ import main


def test_what_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["--device", "cpu", "--dtype", "fp32"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:4] == [
        "on the CPU, float32:",
        "",
        "attention             sdpa",
        "  not flash_attn_4    needs a CUDA device",
    ]
    for op in ("linear_cross_entropy", "norm", "rotary", "activation", "adamw"):
        at = said.index(f"{op:<22}torch")
        assert said[at + 1] == "  not triton          needs a CUDA device, or TRITON_INTERPRET=1"


def test_options_reach_the_choice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    options = ["--head-dim", "512", "--length", "77", "--groups", "4", "--full", "--padded", "--documents"]
    assert main([*options, "--deterministic", "--compiled", "--width", "20000"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("on a GPU, bfloat16:\n")
    assert "  not triton          takes head dims up to 256, not 512\n" in said
    assert "\nnorm                  torch\n  not triton          takes hidden sizes up to 16384, not 20000\n" in said
    assert "\nrotary                torch\n  not triton          torch.compile fuses torch's with" in said
    assert "\nlinear_cross_entropy  triton\n" in said


def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        main(["--device", "cuda"])
    assert caught.value.code == 2
    assert "--device cuda: no GPU is visible" in capsys.readouterr().err
