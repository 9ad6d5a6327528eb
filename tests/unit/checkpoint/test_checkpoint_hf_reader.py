"""Hugging Face folders that are no start for a run, and what their refusals say."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.initial import initial_weights
from engine.config import ModelConfig, rules
from engine.config.enums import SentenceHead
from engine.errors import CheckpointError, Violation
from engine.model.layers import logical_tensors
from tests.helpers.hf_models import empty_model
from tests.helpers.models import BERT, GPT2, LLAMA, NEOX, QWEN2, config_of, layers_of

pytest.importorskip("transformers")

FILE = "model.safetensors"


def written(folder: Path, cfg: ModelConfig = GPT2) -> Path:
    empty_model(cfg).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "theirs")


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refused(folder: Path, cfg: ModelConfig = GPT2) -> list[Violation]:
    with pytest.raises(CheckpointError) as caught:
        initial_weights(str(folder), cfg, logical_tensors(layers_of(cfg)))
    return list(caught.value.violations)


def test_a_pickle_is_named_and_stays_shut(folder: Path) -> None:
    (folder / FILE).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(print))
    [found] = refused(folder)
    assert found.code == 616
    assert "its weights are pickled (pytorch_model.bin): opening a pickle runs code" in found.rule


@pytest.mark.parametrize("content", ["", "[]", '{"model_type": "gpt2", "n_layer": "x"}'])
def test_a_config_without_meaning(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert [found.code for found in refused(folder)] == [617]


def test_indexes_lead_to_safetensors_beside_them_only(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors", "b": "pytorch_model.bin"}}))
    [found] = refused(folder)
    assert found.code == 617
    assert "no safetensors beside it: ['../x.safetensors', 'pytorch_model.bin']" in found.rule
    index.write_text("[]")
    assert "is no index of tensors" in refused(folder)[0].rule


def test_no_weights_at_all(folder: Path) -> None:
    (folder / FILE).unlink()
    [found] = refused(folder)
    assert (found.code, found.rule.split(",")[0]) == (617, f"it holds neither {FILE} nor {FILE}.index.json")


def test_fields_that_we_cannot_be_are_named_with_their_values(tmp_path: Path) -> None:
    folder = written(tmp_path / "theirs", LLAMA)
    edit(folder, rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}, mlp_bias=True)
    found = refused(folder, LLAMA)
    assert [violation.code for violation in found] == [618, 618]
    assert "config.json has rope_scaling={'type': 'linear', 'factor': 2.0}: rotary angles are not" in found[0].rule
    assert "config.json has mlp_bias=True" in found[1].rule


def test_other_options_are_listed_ready_to_paste(folder: Path) -> None:
    found = refused(folder, replace(GPT2, hidden_size=64, num_layers=3, norm_eps=1e-6, max_positions=48))
    together = found[-1].way_out.split("All together: ")[1]
    assert set(together.split()) == {
        "model.hidden_size=32",
        "model.num_layers=2",
        "model.norm_eps=1e-05",
        "model.max_positions=24",
        "model.head_dim=8",
        "model.ffn_size=128",
    }
    assert {violation.code for violation in found} == {619}
    assert "model.tied_head=true" in refused(folder, replace(GPT2, tied_head=False))[0].way_out


def test_what_residuals_angles_and_biases_are_is_compared(tmp_path: Path) -> None:
    neox = written(tmp_path / "neox", NEOX)
    found = refused(neox, replace(NEOX, parallel_residual=False, rotary_fraction=0.25))
    assert found[0].rule == f"{neox / 'config.json'} says true"
    together = found[-1].way_out.split("All together: ")[1]
    assert together.split() == ["model.parallel_residual=true", "model.rotary_fraction=0.5"]
    [found] = refused(written(tmp_path / "qwen2", QWEN2), replace(QWEN2, qkv_bias=None))
    assert (found.code, found.value, found.way_out.split(".")[1]) == (619, "false", "qkv_bias=true")


def test_an_older_file_of_neox(tmp_path: Path) -> None:
    folder = written(tmp_path / "neox", NEOX)
    wanted = logical_tensors(layers_of(NEOX))
    read = initial_weights(str(folder), NEOX, wanted)
    expected = {name: read(logical) for name, logical in wanted.items()}
    tensors = load_file(folder / FILE)
    fused = tensors["gpt_neox.layers.1.attention.query_key_value.weight"]
    # Head by head: query, key and value of 4 heads of 8 dims.
    keys = torch.cat([fused[24 * head + 8 : 24 * head + 16] for head in range(4)])
    assert torch.equal(expected["block.1.attention.qkv.weight"][32:64], keys)
    for layer in range(2):
        tensors[f"gpt_neox.layers.{layer}.attention.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.bool)
        tensors[f"gpt_neox.layers.{layer}.attention.masked_bias"] = torch.tensor(-1e9)
        tensors[f"gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq"] = torch.ones(2)
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    save_file(tensors, folder / FILE)
    fields = json.loads((folder / "config.json").read_text())
    del fields["rope_parameters"]
    (folder / "config.json").write_text(json.dumps({**fields, "rotary_pct": 0.5, "rotary_emb_base": 10000}))
    found = initial_weights(str(folder), NEOX, wanted)
    assert all(torch.equal(found(logical), expected[name]) for name, logical in wanted.items())


@pytest.mark.parametrize(("size", "word"), [(100, "larger"), (128, "smaller")])
def test_another_vocabulary_is_refused_with_its_number(folder: Path, size: int, word: str) -> None:
    [found] = refused(folder, replace(GPT2, vocab_size=size))
    assert (found.code, found.option, found.value) == (620, "model.vocab_size", size)
    assert found.rule == f"the vocabulary of {folder} is {word}: 101 tokens"
    assert found.way_out.startswith("Set model.vocab_size=101")


def test_tensors_that_are_missing_or_unknown_are_named(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    tensors["transformer.extra.weight"] = tensors.pop("transformer.h.1.ln_2.bias")
    save_file(tensors, folder / FILE)
    [found] = refused(folder)
    assert found.code == 621
    assert "1 tensors of this model are missing ['transformer.h.1.ln_2.bias']" in found.rule
    assert "1 are unknown to it ['transformer.extra.weight']" in found.rule


def test_a_sentence_head_may_be_left_but_not_missed(tmp_path: Path) -> None:
    masked = replace(BERT, sentence_head=SentenceHead.none)
    folder = written(tmp_path / "heads", BERT)
    assert initial_weights(str(folder), masked, logical_tensors(layers_of(masked)))
    [found] = refused(written(tmp_path / "masked", masked), BERT)
    assert (found.code, found.way_out) == (621, "Set model.sentence_head=none")


def test_damaged_and_misshapen_tensors(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    save_file({**tensors, "transformer.wpe.weight": torch.ones(3, 32)}, folder / FILE)
    [found] = refused(folder)
    assert (found.code, found.rule) == (
        622,
        "transformer.wpe.weight has shape [3, 32], and config.json means [24, 32]",
    )
    names = dict.fromkeys(tensors, "gone.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    [found] = refused(folder)
    assert found.code == 622
    assert "gone.safetensors is missing or damaged (" in found.rule


def test_half_precision_is_read_as_fp32(folder: Path) -> None:
    save_file({name: value.bfloat16() for name, value in load_file(folder / FILE).items()}, folder / FILE)
    wanted = logical_tensors(layers_of(GPT2))
    value = initial_weights(str(folder), GPT2, wanted)(wanted["block.0.attention.qkv.weight"])
    stored = load_file(folder / FILE)["transformer.h.0.attn.c_attn.weight"]
    assert value.dtype is torch.float32
    assert torch.equal(value, stored.float().T)


def test_fewer_key_value_heads_than_tp_are_refused_with_the_reason() -> None:
    [found] = rules.check(config_of(LLAMA, parallel__tp=4, data__vocab_size=LLAMA.vocab_size), 4)
    assert (found.code, found.way_out) == (205, "Use a legal tp: 1, 2")
    assert found.rule.startswith("tp(4) does not divide model.num_kv_heads 2: ")
