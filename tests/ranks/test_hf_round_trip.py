"""From transformers to four ranks and back: the same tensors and the same logits, to the last bit."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import runtime
from engine.checkpoint.export import export
from engine.checkpoint.initial import initial_weights
from engine.checkpoint.save import Saver
from engine.config import Config, ModelConfig
from engine.config.enums import Activation, DType, SentenceHead
from engine.dist.context import ParallelContext
from engine.model.build import build_layers
from engine.model.hf_config import architecture
from engine.model.layers import logical_tensors
from engine.plan.stages import stage_bounds
from engine.topology.grid import Grid
from engine_kernels.ops import Kernels, sdpa_attention
from tests.helpers.checkpoints import facts_of
from tests.helpers.hf_models import empty_model
from tests.helpers.models import BERT, GPT2, LLAMA, NEOX, QWEN2, config_of, tokens_of
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.ranks

WORLD = 4
CASES = {
    "gpt2": GPT2,
    "gpt2-untied": replace(GPT2, tied_head=False),
    "llama": LLAMA,
    "llama-tied": replace(LLAMA, tied_head=True, num_kv_heads=4, head_dim=12),
    "llama-biases": replace(LLAMA, bias=True),
    "mistral": LLAMA,
    "neox": NEOX,
    "neox-tied": replace(NEOX, tied_head=True, rotary_fraction=0.25, activation=Activation.gelu_tanh),
    "neox-serial": replace(NEOX, parallel_residual=False, rotary_fraction=1.0),
    "qwen2": QWEN2,
    "qwen2-tied": replace(QWEN2, tied_head=True, num_kv_heads=4, head_dim=12),
    "bert": BERT,
    "bert-untied": replace(BERT, tied_head=False),
    "bert-masked": replace(BERT, sentence_head=SentenceHead.none),
}
assert all(cfg.vocab_size % 2 for cfg in CASES.values()), "the vocabulary is padded"


class Bomb:
    """A pickle that makes a file when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def configure(cfg: ModelConfig) -> Config:
    config = config_of(cfg, parallel__pp=2, parallel__tp=2, data__source="random")
    config.run.name = "there-and-back"
    return config


def rank_of(folder: str) -> None:
    """Each case's folder of transformers, through the engine, into the `weights/` of a run."""
    for name, cfg in CASES.items():
        config, root = configure(cfg), Path(folder) / name
        ctx = ParallelContext.create(Grid.from_config(config.parallel, WORLD), torch.device("cpu"))
        layers = build_layers(config, ctx, Kernels(attention=sdpa_attention))
        initial = initial_weights(str(root / "theirs"), cfg, logical_tensors(layers))
        engine = runtime.build(layers, stage_bounds(config), initial, config, ctx)
        saver = Saver(engine, asynchronous=False, weights_only=True)
        saver.save(root / "run" / "weights", facts_of(config))
        saver.close()


def theirs(name: str, folder: Path) -> nn.Module:
    """Random weights as transformers writes them, next to a pickle that must stay shut."""
    torch.manual_seed(len(name))
    model = empty_model(CASES[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    if name == "mistral":
        import transformers

        values = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
        mistral = transformers.MistralForCausalLM(transformers.MistralConfig(**{**values, "sliding_window": None}))
        mistral.load_state_dict(model.state_dict())
        model = mistral
    model.save_pretrained(folder, max_shard_size="20KB" if name == "llama" else "5GB")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder.parent / "opened")))
    return model.eval()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, nn.Module]]:
    """The run folder of each case, and the model that it began with."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("hugging-face")
    models = {name: theirs(name, root / name / "theirs") for name in CASES}
    run_ranks(rank_of, WORLD, (str(root),), timeout_s=150)
    return root, models


@pytest.mark.parametrize("name", CASES)
def test_tensors_and_logits_come_back_to_the_last_bit(name: str, runs: tuple[Path, dict[str, nn.Module]]) -> None:
    import transformers

    root, models = runs
    out, cfg = root / name / "out", CASES[name]
    export(root / name / "run", out, shard_size=30_000, say=lambda _: None)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    kind = transformers.AutoModelForCausalLM if name[0] != "b" else getattr(transformers, architecture(cfg))
    attention = models[name].config._attn_implementation
    found, info = kind.from_pretrained(out, attn_implementation=attention, output_loading_info=True)
    assert {what: names for what, names in info.items() if names} == {}
    expected, weights = models[name].state_dict(), found.state_dict()
    assert list(weights) == list(expected)
    if name == "bert-untied":
        # Nothing reads this name when weights are not tied.
        weights["cls.predictions.bias"] = expected["cls.predictions.bias"]
    assert [key for key, value in weights.items() if not torch.equal(value, expected[key])] == []
    tokens = tokens_of(cfg, 2, 12)
    with torch.no_grad():
        pairs = zip(found.eval()(tokens).to_tuple(), models[name](tokens).to_tuple(), strict=True)
        outputs = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor)]
    assert outputs
    assert all(torch.equal(mine, value) for mine, value in outputs)
    assert not (root / name / "opened").exists()


def test_bf16_halves_the_files_and_rounds_once(runs: tuple[Path, dict[str, nn.Module]]) -> None:
    import transformers

    root, models = runs
    out = root / "bf16"
    export(root / "gpt2" / "run", out, dtype=DType.bf16, say=lambda _: None)
    found = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert found.dtype is torch.bfloat16
    for name, value in models["gpt2"].state_dict().items():
        assert torch.equal(found.state_dict()[name], value.bfloat16()), name
