"""A run as a Hugging Face folder, and what is refused on the way."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import commands
from engine.checkpoint.commands import size_of
from engine.checkpoint.export import Entry, shards
from engine.checkpoint.weights import INDEX
from engine.config import ModelConfig
from engine.config.load import read_resolved, resolved_yaml
from engine.data.tokenizer.folder import make_tokenizer
from engine.errors import ConfigError
from engine.model.hf import Stored
from engine.model.layers import logical_tensors
from tests.helpers.models import GPT2, LLAMA, config_of, layers_of, noisy_weights

pytest.importorskip("transformers")


def make_run(folder: Path, model: ModelConfig = GPT2, **changes: Any) -> Path:
    """What a run of `model` leaves behind."""
    draw = noisy_weights()
    tensors = {name: draw(logical) for name, logical in logical_tensors(layers_of(model)).items()}
    (folder / "weights").mkdir(parents=True)
    save_file(tensors, folder / "weights" / "a.safetensors")
    (folder / "weights" / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "a.safetensors")}))
    (folder / "config.yaml").write_text(resolved_yaml(config_of(model, **{"data__source": "random", **changes})))
    (folder / "summary.json").write_text(json.dumps({"steps": 7, "final_loss": 1.25, "final_val_loss": 1.5}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert commands.main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def test_a_folder_is_complete_and_says_what_it_is(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert commands.main(["export", str(run), str(out), "--dtype", "fp16"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {torch.float16}
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["dtype"], config["architectures"]) == ("gpt2", "float16", ["GPT2LMHeadModel"])
    card = (out / "README.md").read_text()
    for row in ("| steps | 7 |", "| final val loss | 1.5000 |", "| data | random |", "pp 1, tp 1"):
        assert row in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert not (tmp_path / "out.partial").exists()
    assert f"wrote {out}" in capsys.readouterr().out


def test_inspect_lists_both_kinds_of_folders(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["export", str(run), str(tmp_path / "out"), "--shard-size", "30KB"]) == 0
    capsys.readouterr()
    assert commands.main(["inspect", str(run)]) == 0
    ours = capsys.readouterr().out
    assert "block.0.attention.qkv.weight" in ours
    assert " 96x32 " in ours
    assert commands.main(["inspect", str(tmp_path / "out")]) == 0
    theirs = capsys.readouterr().out
    assert "transformer.h.0.attn.c_attn.weight" in theirs
    assert " 32x96 " in theirs
    assert ours.splitlines()[-1] == theirs.splitlines()[-1], "tensors and bytes are as many"


def test_the_tokenizer_comes_along(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    big = make_run(tmp_path / "big", replace(LLAMA, vocab_size=300))
    make_tokenizer("bpe", 290, lambda: iter(["some words and more words"] * 20), tmp_path / "words")
    command = ["export", str(big), str(tmp_path / "out"), "--tokenizer", str(tmp_path / "words")]
    assert commands.main(command) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("more words")["input_ids"]) == "more words"
    ids = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert ids["eos_token_id"] == tokenizer.eos_token_id == 0
    said = refused(capsys, "export", run, tmp_path / "other", "--tokenizer", tmp_path / "words")
    assert "[OCT628] --tokenizer=" in said
    assert "and the model 101 (model.vocab_size)" in said
    assert "[OCT628]" in refused(capsys, "export", run, tmp_path / "other", "--tokenizer", tmp_path / "nowhere")


def test_a_lost_tokenizer_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", data__source=str(tmp_path / "gone"), data__cache_dir=str(tmp_path / "cache"))
    assert commands.main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "no tokenizer is copied, give one with --tokenizer: " in capsys.readouterr().out


def test_only_earlier_exports_are_replaced(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert commands.main(["export", str(run), str(out)]) == 0
    said = refused(capsys, "export", run, out)
    assert f"[OCT625] OUT={out}: it exists already. Take another name, or add --overwrite" in said
    (out / "old").touch()
    assert commands.main(["export", str(run), str(out), "--overwrite"]) == 0
    assert not (out / "old").exists()
    said = refused(capsys, "export", run, run, "--overwrite")
    assert "replaces earlier exports only, and this has no config.json" in said
    assert (run / "weights" / INDEX).is_file()


def test_runs_that_are_none(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "export", tmp_path / "nowhere", tmp_path / "out")
    assert f"[OCT623] SOURCE={tmp_path / 'nowhere'}: it has no config.yaml and no weights/{INDEX}" in said
    (run / "weights" / "a.safetensors").write_bytes(b"damaged")
    assert "[OCT623] SOURCE=" in (said := refused(capsys, "export", run, tmp_path / "out"))
    assert "its weights are damaged (" in said
    (run / "config.yaml").write_text("model: 3")
    assert "[OCT110] config.yaml=" in refused(capsys, "export", run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options_come_back_from_their_file(tmp_path: Path) -> None:
    cfg = config_of(LLAMA)
    (tmp_path / "config.yaml").write_text(resolved_yaml(cfg))
    assert read_resolved(tmp_path / "config.yaml") == cfg
    with pytest.raises(ConfigError, match="cannot be read as a run's options"):
        read_resolved(tmp_path / "missing.yaml")


def test_a_model_that_transformers_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", replace(GPT2, num_kv_heads=2, bias=False))
    said = refused(capsys, "export", run, tmp_path / "out")
    assert "1. [OCT624] model.bias=False: transformers' model has True there" in said
    assert "2. [OCT624] model.num_kv_heads=2: transformers' model has 4 there" in said
    assert "Train with model.num_kv_heads=4" in said


def test_a_full_disk(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 5))
    said = refused(capsys, "export", run, tmp_path / "out")
    assert f"[OCT626] OUT={tmp_path / 'out'}: the tensors need " in said
    assert "its disk has 5 left" in said
    assert list(tmp_path.glob("out*")) == []


def test_a_folder_that_cannot_be_made(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    said = refused(capsys, "export", run, tmp_path / "file" / "out")
    assert f"[OCT627] OUT={tmp_path / 'file' / 'out'}: it cannot be written (" in said


def test_values_beyond_fp16(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(run / "weights" / "a.safetensors")
    tensors["final_norm.weight"][3] = 7e4
    save_file(tensors, run / "weights" / "a.safetensors")
    said = refused(capsys, "export", run, tmp_path / "out", "--dtype", "fp16")
    assert "[OCT629] --dtype=fp16: final_norm.weight has values up to 70000, and fp16 ends at 65504" in said
    assert list(tmp_path.glob("out*")) == []


def test_sizes_of_shards() -> None:
    assert [size_of(text) for text in ("5GB", "200mb", "1.5K", "7")] == [5 * 10**9, 2 * 10**8, 1500, 7]
    entries = [Entry(str(i), "", Path(), Stored(""), size) for i, size in enumerate((4, 4, 9, 1, 7))]
    assert [[entry.size for entry in shard] for shard in shards(entries, 8)] == [[4, 4], [9], [1, 7]]


@pytest.mark.parametrize("size", ["0", "five", "-1GB"])
def test_a_size_that_is_none(size: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        commands.main(["export", str(run), str(tmp_path / "out"), f"--shard-size={size}"])
    assert "is no size; use bytes, or 200MB, 5GB" in capsys.readouterr().err
