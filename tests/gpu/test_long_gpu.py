"""Long sequences on a GPU: inputs of groups on the host, tiles in compiled blocks, and what the plan says of memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config.enums import Activation, DType, Norm, Positions, Recompute, Tiles
from engine.config.schema import Config
from engine.dist.context import SINGLE, ParallelContext
from engine.model.block import Block
from engine.model.build import build_layers
from engine.model.host_checkpoints import HostCheckpoints
from engine.model.layers import Stack, build_stacks, random_weights
from engine.plan.activations import activation_bytes, working_bytes
from engine_kernels.ops import AttentionFn, Kernels, sdpa_attention
from engine_kernels.reference.attention import attention as reference
from tests.helpers.configs import make
from tests.helpers.models import batch_of, feed_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
LLAMA: dict[str, Any] = {
    "model__num_layers": 8,
    "model__hidden_size": 1024,
    "model__num_heads": 8,
    "model__num_kv_heads": 2,
    "model__positions": Positions.rotary,
    "model__norm": Norm.rmsnorm,
    "model__activation": Activation.swiglu,
    "model__bias": False,
    "precision__dtype": DType.bf16,
    "train__micro_batch": 1,
    "train__recompute": Recompute.full,
}


def config(length: int, **changes: Any) -> Config:
    return make(**LLAMA, data__seq_len=length, model__max_positions=length, **changes)


def blocks_of(cfg: Config, attention: AttentionFn, host: HostCheckpoints | None = None) -> Stack:
    ctx, train = ParallelContext.single(DEVICE), cfg.train
    layers = [layer for layer in build_layers(cfg, ctx, Kernels(attention=attention)) if layer.repeats]
    groups: dict[str, Any] = {"recompute": train.recompute_interval, "nested": train.recompute_nested, "host": host}
    (stack,) = build_stacks(layers, [(0, len(layers))], random_weights(1), tp=SINGLE, **groups)
    return stack.to(DEVICE, torch.bfloat16).train()


def run(cfg: Config, stack: Stack, steps: int = 1) -> tuple[list[Tensor], int]:
    """Gradients of the weights and of the input, and the most memory that a later step took beside what was there."""
    ctx = ParallelContext.single(DEVICE)
    batch = batch_of(cfg.model, 1, cfg.data.seq_len)
    feed = feed_of(cfg.model, batch, ctx)
    x = torch.randn(1, cfg.data.seq_len, cfg.model.hidden_size, generator=torch.Generator().manual_seed(0))
    x = x.to(DEVICE, torch.bfloat16).requires_grad_()
    for parameter in stack.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x.grad = torch.zeros_like(x)
    for _ in range(steps):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = stack(x, feed)
        out.backward(torch.ones_like(out))
        del out
        torch.cuda.synchronize()
    return [p.grad for p in (*stack.parameters(), x) if p.grad is not None], torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize(("interval", "nested"), [(1, False), (2, False), (2, True)])
def test_inputs_on_the_host_change_no_bit_and_leave_the_device(interval: int, nested: bool) -> None:
    cfg = config(2048, train__recompute_interval=interval, train__recompute_nested=nested)
    want, here = run(cfg, blocks_of(cfg, reference), 3)
    host = HostCheckpoints()
    got, away = run(cfg, blocks_of(cfg, reference, host), 3)
    for one, other in zip(want, got, strict=True):
        assert torch.equal(one, other)
    one_input = 2 * 2048 * 1024
    assert host.buffer_bytes == 8 // interval * one_input
    # The first input is the test's own; one more is on its way back while a group is at work.
    assert here - away >= (8 // interval - 3) * one_input


@pytest.mark.parametrize("tiles", [Tiles.mlp, Tiles.block])
def test_compiled_tiles_give_the_gradients_in_less_memory(tiles: Tiles) -> None:
    torch._dynamo.reset()
    length, found = 16384, {}
    for kind in (Tiles.none, tiles):
        cfg = config(length, train__tiles=kind, train__tile_tokens=1000)
        stack = blocks_of(cfg, sdpa_attention)
        for block in stack.modules():
            if isinstance(block, Block):
                block.compile()
        found[kind] = run(cfg, stack, 2)
        del stack
    (want, most), (got, less) = found[Tiles.none], found[tiles]
    for one, other in zip(want, got, strict=True):
        # Rounding of bf16 in the activations of eight blocks.
        assert float((one.float() - other.float()).norm() / one.float().norm()) < 2e-2
    assert less < 0.7 * most


@pytest.mark.parametrize("interval", [2, 4])
def test_the_peak_is_what_the_plan_says(interval: int) -> None:
    cfg = config(
        65536,
        train__recompute_interval=interval,
        train__recompute_nested=True,
        train__tiles=Tiles.block,
        train__tile_tokens=4096,
    )
    stack = blocks_of(cfg, sdpa_attention)
    for block in stack.modules():
        if isinstance(block, Block):
            block.compile()
    _, peak = run(cfg, stack, 2)
    kept = activation_bytes(cfg, 8)
    # The first group's input is the test's own.
    planned = kept.device + kept.working + working_bytes(cfg) - 2 * 65536 * 1024
    print(f"peak {peak / 2**20:.0f} MiB, planned {planned / 2**20:.0f} MiB")
    assert 0.75 * planned < peak < 1.15 * planned
