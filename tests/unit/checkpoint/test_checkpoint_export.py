"""A run as a Hugging Face folder, and what is refused on the way."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.checkpoint import commands
from engine.checkpoint.commands import size_of
from engine.checkpoint.export import Entry, shards
from engine.checkpoint.manifest import MANIFEST
from engine.checkpoint.retention import step_folder
from engine.config import ModelConfig
from engine.config.load import from_dict, to_dict
from engine.data.tokenizer.folder import make_tokenizer
from engine.errors import ConfigError
from engine.model.hf import Stored
from engine.model.layers import logical_tensors
from tests.helpers.checkpoints import facts_of, flip_byte, write_checkpoint
from tests.helpers.models import (
    GPT2,
    LLAMA,
    NEOX,
    QWEN2,
    batch_of,
    config_of,
    feed_of,
    layers_of,
    logits_of,
    noisy_weights,
    whole_model,
)

pytest.importorskip("transformers")


METRICS = {"loss": 1.25, "val_loss": 1.5, "grad_norm": 0.5}


def make_run(folder: Path, model: ModelConfig = GPT2, edit: Mapping[str, Tensor] = {}, **changes: Any) -> Path:  # noqa: B006
    """What a run of `model` leaves behind, with some tensors replaced by those of `edit`."""
    draw = noisy_weights()
    tensors = {name: draw(logical) for name, logical in logical_tensors(layers_of(model)).items()}
    cfg = config_of(model, **{"data__source": "random", **changes})
    write_checkpoint(folder / "weights", {"weight": {**tensors, **edit}}, facts_of(cfg, metrics=METRICS))
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
    for row in (
        "| steps | 7 |",
        "| samples | 56 |",
        "| loss | 1.2500 |",
        "| val loss | 1.5000 |",
        "| data | random |",
        "pp 1, tp 1",
    ):
        assert row in card
    assert "grad norm" not in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert not (tmp_path / "out.partial").exists()
    assert f"wrote {out}" in capsys.readouterr().out


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cfg", [NEOX, replace(NEOX, parallel_residual=False, rotary_fraction=0.25), QWEN2], ids=str)
def test_transformers_computes_from_the_folder_what_we_do(cfg: ModelConfig, tied: bool, tmp_path: Path) -> None:
    import transformers

    cfg = replace(cfg, tied_head=tied)
    run = make_run(tmp_path / "run", cfg)
    assert commands.main(["export", str(run), str(tmp_path / "out")]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    batch = batch_of(cfg, 2, 12)
    with torch.no_grad():
        expected = theirs(batch.tokens_BS).logits
        logits = logits_of(whole_model(cfg), feed_of(cfg, batch))[..., : cfg.vocab_size]
    assert float(expected.abs().max()) > 1.0, "the comparison is not one of zeros"
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


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
    count, size = theirs.splitlines()[-1].split(" tensors, ")
    assert ours.splitlines()[-1].startswith(f"{count} tensors, ")
    held = sum(
        value.numel() * 4 for path in (tmp_path / "out").glob("*.safetensors") for value in load_file(path).values()
    )
    assert size == f"{held:,} bytes"


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
    assert (run / "weights" / MANIFEST).is_file()


def test_runs_that_are_none(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "export", tmp_path / "nowhere", tmp_path / "out")
    assert f"[OCT611] SOURCE={tmp_path / 'nowhere'}: it has neither weights of Octant nor of transformers" in said
    flip_byte(run / "weights" / "rank-00001.safetensors", 5000)
    said = refused(capsys, "export", run, tmp_path / "out")
    assert f"[OCT632] SOURCE={run / 'weights'}: it is damaged: rank-00001.safetensors has other bytes between 0" in said
    (run / "weights" / "rank-00001.safetensors").unlink()
    assert "rank-00001.safetensors is missing" in refused(capsys, "export", run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_those_of_their_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", edit={"conv.weight": torch.zeros(2)})
    said = refused(capsys, "export", run, tmp_path / "out")
    assert f"[OCT623] SOURCE={run / 'weights'}: its weights are not those of the model in its manifest.json" in said
    assert "manifest.json: conv.weight. Name a run or a checkpoint that Octant wrote" in said


@pytest.mark.parametrize("config", [None, [], {"model": 3}, {"model": {"depth": 3}}, {"train": {"steps": "many"}}])
def test_options_that_cannot_be_read(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "weights", {"weight": {"a": torch.zeros(2)}}, facts_of(config=config))
    said = refused(capsys, "export", tmp_path, tmp_path / "out")
    assert f"[OCT110] config={tmp_path / 'weights' / MANIFEST}: it holds no options of a run (" in said
    assert "Name what a run of this version wrote" in said


def test_options_come_back_from_json() -> None:
    cfg = config_of(LLAMA, runtime__deepspeed_extra={"timers": {"throughput": True}})
    assert from_dict(json.loads(json.dumps(to_dict(cfg))), "x") == cfg
    with pytest.raises(ConfigError, match=r"OCT110. config=x: it holds no options of a run \(it is 'model: 3'\)"):
        from_dict("model: 3", "x")


def test_a_checkpoint_is_exported_without_its_optimizer(tmp_path: Path) -> None:
    draw, names = noisy_weights(), logical_tensors(layers_of(GPT2))
    weights = {name: draw(logical) for name, logical in names.items()}
    cfg = config_of(GPT2, data__source="random")
    for step in (5, 10):
        state = {"weight": {name: value + step for name, value in weights.items()}, "exp_avg": weights}
        write_checkpoint(step_folder(tmp_path / "run", step), state, facts_of(cfg, step))
    assert commands.main(["export", str(tmp_path / "run"), str(tmp_path / "newest")]) == 0
    assert commands.main(["export", str(step_folder(tmp_path / "run", 5)), str(tmp_path / "older")]) == 0
    for folder, step in (("newest", 10), ("older", 5)):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert torch.equal(found["transformer.ln_f.weight"], weights["final_norm.weight"] + step)
        assert f"| steps | {step} |" in (tmp_path / folder / "README.md").read_text()


def test_a_loss_that_is_no_number_is_said_in_the_card(tmp_path: Path) -> None:
    tensors = {name: noisy_weights()(logical) for name, logical in logical_tensors(layers_of(GPT2)).items()}
    facts = facts_of(config_of(GPT2, data__source="random"), metrics={"loss": "nan"})
    write_checkpoint(tmp_path / "run" / "weights", {"weight": tensors}, facts)
    assert commands.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert "| loss | nan |" in (tmp_path / "out" / "README.md").read_text()


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


def test_values_beyond_fp16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = torch.ones(32)
    large[3] = 7e4
    run = make_run(tmp_path / "run", edit={"final_norm.weight": large})
    said = refused(capsys, "export", run, tmp_path / "out", "--dtype", "fp16")
    assert "[OCT629] --dtype=fp16: final_norm.weight has values up to 70000, and fp16 ends at 65504" in said
    assert list(tmp_path.glob("out*")) == []


def test_sizes_of_shards() -> None:
    assert [size_of(text) for text in ("5GB", "200mb", "1.5K", "7")] == [5 * 10**9, 2 * 10**8, 1500, 7]
    entries = [Entry(str(i), "", Stored(""), size) for i, size in enumerate((4, 4, 9, 1, 7))]
    assert [[entry.size for entry in shard] for shard in shards(entries, 8)] == [[4, 4], [9], [1, 7]]


@pytest.mark.parametrize("size", ["0", "five", "-1GB"])
def test_a_size_that_is_none(size: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        commands.main(["export", str(run), str(tmp_path / "out"), f"--shard-size={size}"])
    assert "is no size; use bytes, or 200MB, 5GB" in capsys.readouterr().err
