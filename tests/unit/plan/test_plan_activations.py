"""Tiles, recomputation and the fused loss in the plan, against arithmetic and against what autograd really keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.config import rules
from engine.config.enums import Activation, Attention, Device, DType, Fp8, Kernel, Positions, Recompute, Tiles
from engine.config.load import load
from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.model.build import build_layers
from engine.model.host_checkpoints import HostCheckpoints
from engine.model.layers import build_stacks, random_weights
from engine.plan.activations import Kept, activation_bytes, block_activation_bytes, loss_bytes, working_bytes
from engine.plan.costs import total_parameters
from engine.plan.memory import memory
from engine_kernels.ops import Kernels, sdpa_attention
from engine_kernels.reference.attention import attention
from engine_kernels.reference.fp8_linear import emulated
from tests.helpers.configs import make
from tests.helpers.models import batch_of, feed_of
from tests.unit.plan.test_plan_memory import counted, kept_bytes

LLAMA = {
    "model__positions": Positions.rotary,
    "model__activation": Activation.swiglu,
    "model__bias": False,
    "model__num_kv_heads": 2,
}


@pytest.mark.parametrize("tiles", [Tiles.mlp, Tiles.block])
@pytest.mark.parametrize("changes", [{}, LLAMA, {"model__parallel_residual": True}], ids=["gpt", "llama", "parallel"])
def test_a_block_in_tiles_keeps_what_is_predicted(tiles: Tiles, changes: dict[str, Any]) -> None:
    cfg = make(kernels__attention=Attention.reference, train__tiles=tiles, train__tile_tokens=20, **changes)
    assert kept_bytes(cfg) == pytest.approx(block_activation_bytes(cfg), rel=0.03)


def test_all_but_the_core_in_tiles_keeps_input_queries_keys_values_and_output() -> None:
    cfg = make(precision__dtype=DType.bf16, train__tiles=Tiles.block, train__recompute=Recompute.selective, **LLAMA)
    # 48 wide, 6 query heads and 2 key heads of 8.
    assert block_activation_bytes(cfg) == 2 * (2 * 32) * (48 + 48 + 16 + 16 + 48)


def whole_bytes(cfg: Config, host: HostCheckpoints | None) -> int:
    """What all blocks of a model keep on the device."""
    layers = build_layers(cfg, ParallelContext.single(), Kernels(attention=attention))[2:-2]
    train = cfg.train
    groups = {"recompute": train.recompute_interval, "nested": train.recompute_nested, "host": host}
    (model,) = build_stacks(layers, [(0, len(layers))], random_weights(1), tp=ParallelContext.single().tp, **groups)  # type: ignore[arg-type]
    feed = feed_of(cfg.model, batch_of(cfg.model, cfg.train.micro_batch, cfg.data.seq_len))
    x = torch.randn(cfg.train.micro_batch, cfg.data.seq_len, cfg.model.hidden_size, requires_grad=True)
    return counted(lambda: model(x, feed), list(model.parameters()))


@pytest.mark.parametrize(("interval", "inputs"), [(1, 4), (2, 2), (3, 2)])
def test_groups_keep_their_inputs_here_or_on_the_host(interval: int, inputs: int) -> None:
    one = 4 * 2 * 32 * 48
    full = {"train__recompute": Recompute.full, "train__recompute_interval": interval}
    cfg = make(**full)
    assert whole_bytes(cfg, None) == activation_bytes(cfg, 4).device == inputs * one
    away, host = make(**full, train__recompute_offload=True), HostCheckpoints()
    whole_bytes(away, host)
    block = block_activation_bytes(cfg)
    assert activation_bytes(away, 4) == Kept(device=0, host=inputs * one, working=interval * block + 2 * one)
    assert host.buffer_bytes == memory(away, 1, 0).inputs == inputs * one
    assert memory(cfg, 1, 0).inputs == 0


def test_nested_groups_hold_their_blocks_inputs_and_one_block() -> None:
    cfg = make(train__recompute=Recompute.full, train__recompute_interval=3, train__recompute_nested=True)
    one, block = 4 * 2 * 32 * 48, block_activation_bytes(cfg)
    assert activation_bytes(cfg, 5) == Kept(device=2 * one, host=0, working=2 * one + block)


def test_inputs_on_the_host_count_every_micro_batch_in_flight() -> None:
    changes = {"parallel__pp": 2, "train__accum_steps": 4, "train__recompute": Recompute.full}
    got = [memory(make(**changes, train__recompute_offload=True), 2, stage) for stage in range(2)]
    held = [memory(make(**changes), 2, stage).activations for stage in range(2)]
    assert got[0].inputs > got[1].inputs > 0
    assert [m.activations + m.inputs for m in got] == [h + 2 * 4 * 2 * 32 * 48 for h in held]


def test_a_block_at_work_needs_gradients_or_a_tile() -> None:
    cfg = make(precision__dtype=DType.bf16, **LLAMA)
    tokens, inner = 2 * 32, 192
    assert working_bytes(cfg) == 2 * tokens * (2 * 48 + 3 * inner)
    cfg.train.tiles, cfg.train.tile_tokens = Tiles.mlp, 1
    weights = 48 * 3 * inner
    assert working_bytes(cfg) == 2 * tokens * 2 * 48 + 2 * (7 * inner + 2 * 48) + 6 * weights
    cfg.train.tiles = Tiles.block
    assert working_bytes(cfg) == 2 * tokens * 3 * 48 + 2 * (7 * inner + 4 * 48) + 6 * (weights + 48 * 48)
    cfg.data.seq_len = 32 * 1000
    long = 2 * 32 * 1000
    # Residual stream, output, queries, keys and values, and the queries' sums in fp32.
    assert working_bytes(cfg) == long * (2 * (48 + 2 * 48 + 2 * 16) + 4 * 48)


def test_what_a_block_needs_comes_after_the_logits_are_gone() -> None:
    cfg = make()
    assert memory(cfg, 1, 0).working == max(0, working_bytes(cfg) - loss_bytes(cfg)) == 0
    cfg.model.vocab_size = cfg.data.vocab_size = 1
    small = memory(cfg, 1, 0)
    assert small.working == working_bytes(cfg) - small.logits > 0


def test_the_fused_loss_holds_a_chunk_of_logits() -> None:
    cfg = make(precision__dtype=DType.bf16, kernels__loss=Kernel.triton, data__seq_len=64)
    assert loss_bytes(cfg) == 2 * 128 * 512 + 2 * 48 * (3 * 128 + 512)
    cfg.train.micro_batch = 2**14
    assert loss_bytes(cfg) == 504 * 2**20 + 2 * 48 * (3 * 2**20 + 512)


@pytest.mark.parametrize(("loss", "streams"), [(Kernel.torch, 1), (Kernel.triton, 2)])
def test_the_head_holds_gathered_positions_and_the_fused_loss_their_gradient(loss: Kernel, streams: int) -> None:
    cfg = make(precision__dtype=DType.bf16, kernels__loss=loss, data__seq_len=64, parallel__tp=2)
    whole = loss_bytes(cfg)
    cfg.parallel.sequence = True
    # 128 positions of 48 in two bytes; the norm's three tensors of triton's have half of them then.
    norm = 3 * 64 if loss is Kernel.triton else 0
    assert loss_bytes(cfg) - whole == 2 * 48 * (streams * 128 - norm)


def test_rotary_angles_are_counted() -> None:
    cfg = make(**LLAMA, model__max_positions=1000)
    assert memory(cfg, 1, 0).buffers == 2 * 4 * 1000 * 8 // 2


def test_bf16_states_are_eight_bytes_a_parameter() -> None:
    bf16 = {"precision__dtype": DType.bf16, "precision__grad_accum": DType.bf16}
    got = memory(make(**bf16, precision__states=DType.bf16), 1, 0)
    assert got.weights + got.gradients + got.optimizer == 8 * total_parameters(make().model)
    wide = memory(make(**bf16), 1, 0)
    assert (wide.weights, wide.gradients, wide.optimizer) == (got.weights, got.gradients, 3 * got.optimizer)


def test_the_long_experiment_fits_on_an_h200_with_room() -> None:
    cfg = load(["experiment=llama_8b_long_h200"])
    assert rules.check(cfg, 1) == []
    need = memory(cfg, 1, 0)
    assert cfg.data.seq_len == 350_208
    # As the comment of the file adds up.
    assert need.total / 2**30 == pytest.approx(113.5, abs=0.1)
    assert need.inputs == need.host == 0


@pytest.mark.parametrize("core", [Attention.reference, Attention.sdpa])
@pytest.mark.parametrize(
    "changes",
    [{}, {"model__activation": Activation.swiglu, "model__bias": False}, {"model__ffn_size": 100}],
    ids=str,
)
def test_linears_in_fp8_change_what_a_block_keeps_as_predicted(changes: dict[str, Any], core: Attention) -> None:
    # Wide enough that a byte per head and position is not lost among scales and means.
    changes = {**changes, "train__device": Device.cpu, "model__hidden_size": 96}
    cfg = make(kernels__attention=core, precision__dtype=DType.bf16, **changes)
    low = replace(cfg, precision=replace(cfg.precision, fp8=Fp8.tensorwise))
    kernels = Kernels(attention=attention if core is Attention.reference else sdpa_attention, linear=emulated)
    measured = kept_bytes(low, kernels) - kept_bytes(cfg, kernels)
    scales = 64
    assert measured == pytest.approx(block_activation_bytes(low) - block_activation_bytes(cfg), abs=scales)


def test_fp8_keeps_gathered_positions_and_saves_nothing_where_some_blocks_stay_in_bf16() -> None:
    # Of the four linears mlp.up and mlp.down have sizes for fp8.
    changes = {"parallel__tp": 2, "parallel__sequence": True, "model__ffn_size": 128}
    for device, last in ((Device.cpu, 1), (Device.cuda, 2)):
        cfg = make(precision__dtype=DType.bf16, train__device=device, **changes)
        low = replace(cfg, precision=replace(cfg.precision, fp8=Fp8.tensorwise))
        positions, gathered, cut = 2 * 32, 48, 48 // 2 * 2
        # Compiled blocks do not keep the last linear's input in fp8 either.
        assert block_activation_bytes(low) - block_activation_bytes(cfg) == positions * (
            gathered - cut - last * 128 // 2
        )
        low.precision.fp8_bf16_ends = 1
        assert block_activation_bytes(low) == block_activation_bytes(cfg)
