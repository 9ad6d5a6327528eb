"""Parity on the GPUs that are there: the same command as on the CPU, TF32 off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.study.__main__ import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_layouts_of_all_gpus_agree_with_one_process(
    world: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, {torch.cuda.device_count()} here; --share-gpus takes a minute a case")
    out = tmp_path / "parity.json"
    words = [
        "model=gpt_tiny",
        "train.device=cuda",
        "--worlds",
        str(world),
        "--quick",
        "--json",
        str(out),
    ]
    code = main(["parity", *words])
    assert code == 0, capsys.readouterr().out
    assert all(row["errors"]["gradient"] <= 1e-5 for row in json.loads(out.read_text())["cases"])


@pytest.mark.parametrize("world", [1, 2])
def test_compiled_blocks_of_zero3_agree_with_one_process(
    world: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "parity.json"
    lists = [
        "--worlds",
        str(world),
        "--share-gpus",
        "--zero",
        "3",
        "--accum",
        "4",
        "--offload",
        "none",
        "--flavours",
        "gpt2,llama",
    ]
    words = ["kernels.compile=on", "kernels.loss=triton", "zero.bucket_elements=1"]
    code = main(["parity", "model=gpt_tiny", "train.device=cuda", *words, *lists, "--cases", "2", "--json", str(out)])
    assert code == 0, capsys.readouterr().out
    assert len(json.loads(out.read_text())["cases"]) == 2
