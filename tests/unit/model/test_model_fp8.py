"""Blocks with fp8 linears: which modules have them, and that a block is compiled in one piece."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from engine.config.enums import DType, Fp8
from engine.config.schema import ModelConfig
from engine.dist.context import ParallelContext
from engine.model.block import Block
from engine.model.layers import Stack, build_stacks
from engine.parallel.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from engine_kernels.ops import PLAIN_LINEAR, Kernels, sdpa_attention
from engine_kernels.reference.fp8_linear import emulated
from tests.helpers.models import BERT, GPT2, LLAMA, layers_of, noisy_weights

KERNELS = Kernels(attention=sdpa_attention, linear=emulated)
FP8 = {"precision__dtype": DType.bf16, "precision__fp8": Fp8.tensorwise}


def stack_of(model: ModelConfig, **changes: object) -> Stack:
    ctx = ParallelContext.single()
    layers = layers_of(model, ctx, kernels=KERNELS, **changes)
    (stack,) = build_stacks(layers, [(0, len(layers))], noisy_weights(), tp=ctx.tp)
    return stack.bfloat16()


def in_fp8(module: nn.Module) -> dict[str, bool]:
    linears = (ColumnParallelLinear, RowParallelLinear)
    return {name: part.how is emulated for name, part in module.named_modules() if isinstance(part, linears)}


@pytest.mark.parametrize("model", [GPT2, replace(LLAMA, ffn_size=48), BERT], ids=lambda model: model.name)
def test_the_linears_of_all_blocks_and_nothing_else(model: ModelConfig) -> None:
    stack = stack_of(model, **FP8)
    assert len(in_fp8(stack)) == 4 * model.num_layers
    assert all(in_fp8(stack).values())
    assert not any(in_fp8(stack_of(model)).values())
    assert all(not hasattr(part, "how") for part in stack.modules() if isinstance(part, ReplicatedLinear))


def test_ends_and_unsuitable_sizes_stay_in_bf16() -> None:
    model = replace(GPT2, num_layers=3, ffn_size=40)
    stack = stack_of(model, **FP8, precision__fp8_bf16_ends=1)
    blocks = [module for module in stack.modules() if isinstance(module, Block)]
    assert [any(in_fp8(block).values()) for block in blocks] == [False, True, False]
    assert in_fp8(blocks[1]) == {"attention.qkv": True, "attention.out": True, "mlp.up": False, "mlp.down": False}
    assert blocks[1].mlp.up.how is PLAIN_LINEAR


@pytest.mark.parametrize("model", [GPT2, replace(LLAMA, ffn_size=48)], ids=lambda model: model.name)
def test_a_block_is_traced_in_one_piece_with_its_gradients(model: ModelConfig) -> None:
    """`aot_eager` traces as torch.compile does, and generates no code; `fullgraph` refuses a graph break."""
    torch._dynamo.reset()
    block = next(module for module in stack_of(model, **FP8).modules() if isinstance(module, Block))
    x = torch.randn(2, 16, model.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    wanted = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    block.compile(fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    for value, other in zip(found, wanted, strict=True):
        assert other.abs().sum() > 0
        assert torch.equal(value, other)
