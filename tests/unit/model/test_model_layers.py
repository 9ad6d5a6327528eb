"""The list of layers: names, tying, sizes, and initial weights."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.dist.context import SINGLE, AxisGroup
from engine.model.layers import Stack, build_stacks, logical_tensors, materialize, owner_of, random_weights
from engine.parallel.logical import LogicalTensor, logical_of
from engine.plan.costs import parameter_counts
from tests.helpers.models import (
    BERT,
    GPT2,
    LLAMA,
    MODELS,
    PRESETS,
    batch_of,
    feed_of,
    layers_of,
    logits_of,
    noisy_weights,
    preset,
)
from tests.helpers.threads import context_of

TIED_LLAMA = replace(LLAMA, tied_head=True)
UNTIED_GPT2 = replace(GPT2, tied_head=False)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_the_parameters_that_the_planner_counts(name: str) -> None:
    layers = layers_of(preset(name))
    counts = parameter_counts(preset(name))
    assert [layer.name for layer in layers] == list(counts)
    held: Counter[str] = Counter()
    for path, logical in logical_tensors(layers).items():
        layer = max((one for one in counts if path.startswith(f"{one}.")), key=len)
        held[layer] += math.prod(logical.shape)
    assert {layer: held[layer] for layer in counts} == counts


@pytest.mark.parametrize("cfg", [GPT2, UNTIED_GPT2, LLAMA, BERT, replace(BERT, tied_head=False)], ids=lambda c: c.name)
def test_layers_are_those_of_the_planner(cfg: ModelConfig) -> None:
    assert [layer.name for layer in layers_of(cfg)] == list(parameter_counts(cfg))


def test_names_on_disk() -> None:
    # Weight files speak these names: a change makes old files unreadable.
    block = ["attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.up", "mlp.down"]
    expected = {f"block.{i}.{part}.{kind}" for i in (0, 1) for part in block for kind in ("weight", "bias")}
    expected |= {"embed.tokens.weight", "embed.positions.weight", "final_norm.weight", "final_norm.bias"}
    assert set(logical_tensors(layers_of(GPT2))) == expected
    llama = {f"block.{i}.{part}.weight" for i in (0, 1) for part in block}
    llama |= {"embed.tokens.weight", "final_norm.weight", "head.weight"}
    assert set(logical_tensors(layers_of(LLAMA))) == llama
    bert = {f"block.{i}.{part}.{kind}" for i in (0, 1) for part in block for kind in ("weight", "bias")}
    heads = ("embed.rest.norm", "head.transform.dense", "head.transform.norm")
    heads += ("head.transform.pooler", "head.transform.classes")
    bert |= {f"{part}.{kind}" for part in heads for kind in ("weight", "bias")}
    bert |= {"embed.tokens.weight", "embed.rest.positions.weight", "embed.rest.types.weight", "head.bias.weight"}
    assert set(logical_tensors(layers_of(BERT))) == bert


def test_logical_shapes_do_not_depend_on_the_cut() -> None:
    axis = AxisGroup(rank=1, size=2, ranks=(0, 1), group=None)
    whole, cut = logical_tensors(layers_of(LLAMA)), logical_tensors(layers_of(LLAMA, context_of(axis)))
    assert {n: t.shape for n, t in whole.items()} == {n: t.shape for n, t in cut.items()}
    assert whole["block.0.attention.qkv.weight"].segments == (32, 16, 16)
    assert whole["block.0.mlp.up.weight"].segments == (44, 44)


def test_weights_into_the_residual_stream_start_smaller() -> None:
    found = logical_tensors(layers_of(replace(GPT2, num_layers=8)))
    for name, logical in found.items():
        if logical.decay:
            small = name.endswith(("out.weight", "down.weight"))
            assert logical.init_std == pytest.approx(0.3 / math.sqrt(16) if small else 0.3), name
        else:
            expected = 1.0 if "norm.weight" in name else 0.0
            assert (logical.init_std, logical.init_value) == (None, expected), name


def test_weights_of_a_bert_all_start_alike() -> None:
    for name, logical in logical_tensors(layers_of(replace(BERT, num_layers=8))).items():
        assert (logical.init_std == 0.3) is logical.decay, name


def test_the_first_layer_with_a_key_owns_the_parameters() -> None:
    layers = layers_of(GPT2)
    assert owner_of(layers, layers[-1]) is layers[0]
    assert owner_of(layers, layers[0]) is layers[0]
    assert owner_of(layers, layers[2]) is layers[2]
    untied = layers_of(UNTIED_GPT2)
    assert owner_of(untied, untied[-1]) is untied[-1]


@pytest.mark.parametrize("cfg", [GPT2, TIED_LLAMA, BERT], ids=lambda c: c.name)
def test_tied_layers_are_one_module_and_its_gradient_the_sum_of_both_uses(cfg: ModelConfig) -> None:
    def gradients(model: Stack) -> dict[str, Tensor]:
        logits_of(model, feed_of(cfg, batch_of(cfg, 2, 6)))[..., : cfg.vocab_size].square().sum().backward()
        return {logical_of(p).name: p.grad for p in model.parameters() if p.grad is not None}

    def shared(logical: LogicalTensor) -> Tensor:
        name = "embed.tokens.weight" if logical.name == "head.weight" else logical.name
        return noisy_weights()(replace(logical, name=name))

    (tied,) = build_stacks(layers := layers_of(cfg), [(0, len(layers))], noisy_weights(), tp=SINGLE)
    (untied,) = build_stacks(layers_of(replace(cfg, tied_head=False)), [(0, len(layers))], shared, tp=SINGLE)
    assert len(list(untied.parameters())) == len(list(tied.parameters())) + 1
    one, two = gradients(tied), gradients(untied)
    total = two["embed.tokens.weight"] + two.pop("head.weight")
    torch.testing.assert_close(one.pop("embed.tokens.weight"), total, rtol=1e-4, atol=1e-4 * float(total.abs().max()))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0)


@pytest.mark.parametrize("cfg", MODELS, ids=lambda c: c.name)
@pytest.mark.parametrize("size", [1, 2])
def test_every_cut_starts_from_the_same_logical_weights(cfg: ModelConfig, size: int) -> None:
    initial, slices = random_weights(5), {}
    for rank in range(size):
        axis = AxisGroup(rank=rank, size=size, ranks=tuple(range(size)), group=None)
        layers = layers_of(cfg, context_of(axis))
        for layer in layers:
            owner = owner_of(layers, layer).name
            for parameter in materialize(owner, layer, initial, tp=axis).parameters():
                slices.setdefault(logical_of(parameter).name, [None] * size)[rank] = parameter.detach()
    assert slices.keys() == logical_tensors(layers_of(cfg)).keys()
    for name, logical in logical_tensors(layers_of(cfg)).items():
        torch.testing.assert_close(logical.assemble(slices[name]), logical.draw(5), rtol=0, atol=0, msg=name)


def test_logical_tensors_allocates_nothing_and_draws_nothing() -> None:
    before = torch.get_rng_state()
    found = logical_tensors(layers_of(preset("gpt_13b")))
    assert sum(math.prod(t.shape) for t in found.values()) > 12e9
    assert torch.equal(torch.get_rng_state(), before)
