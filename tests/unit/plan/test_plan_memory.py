"""Predicted memory against formulas of the literature, and against what a block really keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.config.enums import (
    Activation,
    Attention,
    Balance,
    Device,
    DType,
    Family,
    Kernel,
    Offload,
    OptimizerName,
    PipelineSchedule,
    Positions,
    Recompute,
)
from engine.config.load import load
from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.dist.init import DTYPES
from engine.model.build import build_layers
from engine.plan.activations import Kept, activation_bytes, block_activation_bytes
from engine.plan.costs import layer_costs, parameter_counts, total_parameters
from engine.plan.memory import memory, rank_parameters, state_bytes, step_timeline
from engine.plan.stages import chunk_owners, chunks, layers_of, stage_bounds
from engine.topology.schedule import build
from engine_kernels.ops import Kernels
from engine_kernels.reference.attention import attention
from tests.helpers.configs import make

INTERLEAVED = {
    "parallel__pp": 2,
    "parallel__schedule": PipelineSchedule.interleaved,
    "parallel__virtual_stages": 2,
    "train__accum_steps": 4,
}
DUALPIPEV = {"parallel__pp": 2, "parallel__schedule": PipelineSchedule.dualpipev, "train__accum_steps": 4}


def kept_bytes(cfg: Config, kernels: Kernels | None = None, compiled: Callable[..., Any] = lambda run: run) -> int:
    """Bytes of the tensors that autograd keeps in one block's forward pass, parameters left out."""
    layers = build_layers(cfg, ParallelContext.single(), kernels or Kernels(attention=attention))
    block = next(layer for layer in layers if layer.name == "block.0").factory()
    with torch.no_grad():
        for parameter in block.parameters():
            nn.init.normal_(parameter)
    block.to(DTYPES[cfg.precision.dtype])
    shape = (cfg.train.micro_batch, cfg.data.seq_len, cfg.model.hidden_size)
    x = torch.randn(shape, dtype=DTYPES[cfg.precision.dtype], requires_grad=True)
    run = compiled(block)
    run(x)  # What is traced is kept by nobody.
    return counted(lambda: run(x), list(block.parameters()))


def counted(run: Callable[[], object], parameters: list[nn.Parameter]) -> int:
    """Bytes that autograd keeps in `run`, without `parameters`."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__num_kv_heads": 2, "model__ffn_size": 100},
        {"model__activation": Activation.swiglu, "model__bias": False},
        {"model__family": Family.bert, "model__activation": Activation.gelu},
        {"data__seq_len": 64, "train__micro_batch": 3},
        {"model__parallel_residual": True},
        {"model__bias": False, "model__qkv_bias": True},
        {"model__positions": Positions.rotary},
        {"model__positions": Positions.rotary, "model__rotary_fraction": 0.25, "model__parallel_residual": True},
    ],
    ids=str,
)
def test_a_block_keeps_what_is_predicted(changes: dict[str, Any]) -> None:
    cfg = make(kernels__attention=Attention.reference, train__device=Device.cpu, **changes)
    # Means and standard deviations of the norms and the causal mask are what is left out.
    assert kept_bytes(cfg) == pytest.approx(block_activation_bytes(cfg), rel=0.03)


def test_activations_follow_korthikanti_less_the_masks() -> None:
    """34 s b h bytes in fp16 without the attention core are 2 for the dropout masks and 32 for the rest."""
    cfg = make(precision__dtype=DType.fp16, train__recompute=Recompute.selective)
    sbh = cfg.data.seq_len * cfg.train.micro_batch * cfg.model.hidden_size
    assert block_activation_bytes(cfg) == 32 * sbh
    cfg.parallel.tp = 2
    assert block_activation_bytes(cfg) == (8 + 24 / 2) * sbh
    cfg.parallel.sequence = True
    assert block_activation_bytes(cfg) == 32 / 2 * sbh


def test_the_reference_keeps_the_attention_matrix_and_selective_recomputation_drops_it() -> None:
    cfg = make(precision__dtype=DType.bf16, kernels__attention=Attention.reference, model__attention_dropout=0.1)
    selective = replace(cfg, train=replace(cfg.train, recompute=Recompute.selective))
    matrix = 4 * 2 * 6 * 32 * 32
    assert block_activation_bytes(cfg) - block_activation_bytes(selective) == 2 * matrix


def test_context_cuts_positions_and_repeats_few_key_heads() -> None:
    one = make(model__num_kv_heads=1, train__recompute=Recompute.selective)
    cfg = replace(one, parallel=replace(one.parallel, context=2))
    repeated = 4 * (2 * 32 // 2) * 2 * 8
    assert block_activation_bytes(cfg) == block_activation_bytes(one) / 2 + repeated


@pytest.mark.parametrize(("interval", "inputs", "working"), [(1, 5, 1), (2, 3, 2), (8, 1, 5)])
def test_full_recomputation_keeps_inputs_of_groups(interval: int, inputs: int, working: int) -> None:
    cfg = make(train__recompute=Recompute.full, train__recompute_interval=interval)
    one = 4 * 2 * 32 * 48
    block = block_activation_bytes(cfg)
    assert activation_bytes(cfg, 5) == Kept(device=inputs * one, host=0, working=working * block)
    four = activation_bytes(cfg, 4)
    assert memory(cfg, 1, 0).activations == four.device + four.working
    assert activation_bytes(make(), 5) == Kept(device=5 * block_activation_bytes(make()), host=0, working=0)


@pytest.mark.parametrize("changes", [{}, {"parallel__pp": 2, "train__accum_steps": 8}, INTERLEAVED, DUALPIPEV], ids=str)
def test_chunks_hold_every_layer_once_on_the_ranks_of_the_schedule(changes: dict[str, Any]) -> None:
    cfg = make(**changes)
    parallel = cfg.parallel
    program = build(parallel.schedule, parallel.pp, cfg.train.accum_steps, parallel.virtual_stages)
    assert tuple(chunk_owners(cfg)) == program.owner
    assert len(chunks(cfg)) == program.chunks
    names = [layer.name for layer in build_layers(cfg, ParallelContext.single(), Kernels(attention=attention))]
    assert [name for part in chunks(cfg) for name in part] == names
    assert sorted(name for stage in range(parallel.pp) for name in layers_of(cfg, stage)) == sorted(names)


def test_the_heads_of_bert_stay_on_one_stage() -> None:
    cfg = make(model__family=Family.bert, model__vocab_size=100_000, model__tied_head=False, parallel__pp=3)
    layers = build_layers(cfg, ParallelContext.single(), Kernels(attention=attention))
    bounds = stage_bounds(cfg)
    assert not any(layers[bound].glued for bound in bounds[1:-1])
    assert layers_of(cfg, 2)[-3:] == ["head.transform", "head", "head.bias"]


def test_parameters_of_ranks_add_up() -> None:
    cfg = make(parallel__pp=2, parallel__tp=2, model__tied_head=False)
    held = sum(sum(rank_parameters(cfg, stage).values()) for stage in range(2))
    replicated = cfg.model.max_positions * 48 + 2 * 48 + 4 * (2 * 2 * 48 + 2 * 48)
    assert 2 * held == total_parameters(cfg.model) + replicated


def test_a_tied_head_is_a_copy_on_another_stage_and_free_on_the_same() -> None:
    cfg = make(parallel__pp=2)
    assert rank_parameters(cfg, 1)["head"] == 512 * 48
    assert rank_parameters(make(**DUALPIPEV), 0)["head"] == 0


def test_zero_stages_shard_more_and_more() -> None:
    count = total_parameters(make().model)
    expected = {
        0: (4 * count, 4 * count, 8 * count),
        1: (4 * count, 4 * count, 12 * count / 4),
        2: (4 * count, count, 12 * count / 4),
        3: (count, count, 12 * count / 4),
    }
    for stage, sizes in expected.items():
        got = memory(make(zero__stage=stage), 4, 0)
        assert (got.weights, got.gradients, got.optimizer) == pytest.approx(sizes), stage
        shared = memory(make(zero__stage=stage, parallel__context=2), 4, 0)
        assert (shared.weights, shared.gradients, shared.optimizer) == (got.weights, got.gradients, got.optimizer)
        assert got.total == sum(sizes) + got.buffers + got.activations + got.logits + got.working


def test_bytes_a_parameter_in_mixed_precision_and_where_offload_puts_them() -> None:
    count = total_parameters(make().model)
    on_gpu = memory(make(precision__dtype=DType.fp16), 1, 0)
    # 16-bit weights and gradients, their sums in fp32, fp32 weights and two moments.
    assert on_gpu.weights + on_gpu.gradients + on_gpu.optimizer == (2 + 2 + 4 + 12) * count
    for dtype, sums, size in ((DType.bf16, DType.bf16, 2), (DType.bf16, DType.fp32, 4), (DType.fp32, DType.fp32, 4)):
        plain = make(precision__dtype=dtype, precision__grad_accum=sums, kernels__optimizer=Kernel.torch)
        assert memory(plain, 1, 0).gradients == size * count
    offload = {"zero__stage": 3, "zero__offload_optimizer": Offload.cpu, "precision__dtype": DType.bf16}
    got = memory(make(**offload), 1, 0)
    assert (got.optimizer, got.gradients, got.host) == (0, 0, 16 * count)
    second = memory(make(**{**offload, "zero__stage": 2}), 1, 0)
    # Measured with GPT 6.7B on an H200: the fp32 sums stay on the device, a bf16 copy of the weights is in host memory.
    assert (second.optimizer, second.gradients, second.host) == (0, 4 * count, 18 * count)
    streamed = {**offload, "zero__stage": 1, "zero__offload_ratio": 0.5, "train__accum_steps": 2}
    for more, state, beside in (
        ({}, 12, 0),
        ({"zero__offload_delay": 1}, 12, 4),
        ({"precision__states": DType.bf16}, 4, 2),
    ):
        got = memory(make(**streamed, **more), 2, 0)
        assert (got.gradients, got.optimizer) == (4 * count, state * count / 4)
        assert got.host == (state + beside) * count / 4
    half = memory(make(**offload, zero__offload_ratio=0.5), 2, 0)
    assert (half.optimizer, half.host) == (12 * count / 4, 16 * count / 4)
    both = memory(make(**offload, zero__offload_params=Offload.cpu), 2, 0)
    assert (both.weights, both.host) == (0, (16 + 2) * count / 2)
    disk = memory(make(**{**offload, "zero__offload_optimizer": Offload.nvme}), 1, 0)
    assert (disk.optimizer, disk.host) == (0, 0)


@pytest.mark.parametrize(
    ("name", "momentum", "size"),
    [("adamw", 0.0, 8), ("lamb", 0.0, 8), ("lion", 0.0, 4), ("sgd", 0.0, 0), ("sgd", 0.9, 4), ("adafactor", 0.0, 0)],
)
def test_optimizer_state(name: str, momentum: float, size: int) -> None:
    cfg = make(optim__name=OptimizerName[name], optim__momentum=momentum)
    assert state_bytes(cfg, {"block.0": 10, "head": 5}) == 15 * size


def test_muon_keeps_one_moment_of_matrices() -> None:
    cfg = make(optim__name=OptimizerName.muon)
    held = rank_parameters(cfg, 0)
    matrices = 4 * (4 * 48 * 48 + 8 * 48 * 48 + 3 * 48 + 192)
    assert state_bytes(cfg, held) == 4 * matrices + 8 * (sum(held.values()) - matrices)


def test_early_stages_keep_more_micro_batches() -> None:
    cfg = make(parallel__pp=4, train__accum_steps=8, model__vocab_size=1, model__num_layers=8, model__max_positions=32)
    one = block_activation_bytes(cfg)
    blocks = [sum(name.startswith("block.") for name in names) for names in chunks(cfg)]
    got = [memory(cfg, 4, stage).activations for stage in range(4)]
    assert got == [count * (4 - stage) * one for stage, count in enumerate(blocks)]
    assert [step_timeline(cfg).peak_in_flight(stage) for stage in range(4)] == [4, 3, 2, 1]


@pytest.mark.parametrize("changes", [INTERLEAVED, DUALPIPEV], ids=["interleaved", "dualpipev"])
def test_chunks_of_other_schedules_count_by_their_own_blocks(changes: dict[str, Any]) -> None:
    cfg = make(**changes, model__vocab_size=1, model__num_layers=8, model__max_positions=32)
    assert [sum(name.startswith("block.") for name in names) for names in chunks(cfg)] == [2, 2, 2, 2]
    peak = step_timeline(cfg).peak_in_flight(0)
    assert memory(cfg, 2, 0).activations == peak * 2 * block_activation_bytes(cfg)


def test_stages_of_several_parts_have_even_work() -> None:
    words = ["model=gpt_2_7b", "data.seq_len=2048", "train.accum_steps=4"]
    for schedule in ("interleaved", "dualpipev"):
        cfg = load([*words, f"parallel={schedule}"])
        work = dict(zip(parameter_counts(cfg.model), layer_costs(cfg.model, Balance.flops, 2048), strict=True))
        stages = [sum(work[name] for name in layers_of(cfg, stage)) for stage in range(2)]
        assert max(stages) < 1.02 * sum(stages) / 2


def test_logits_stand_on_the_rank_of_the_head() -> None:
    parallel = {"parallel__pp": 2, "parallel__tp": 2, "parallel__context": 2}
    cfg = make(**parallel, precision__dtype=DType.bf16, model__vocab_size=500, kernels__loss=Kernel.torch)
    assert memory(cfg, 8, 0).logits == 0
    assert memory(cfg, 8, 1).logits == (2 + 8) * 2 * 16 * 256


def test_buckets_are_no_larger_than_what_they_hold() -> None:
    count = total_parameters(make().model)
    assert memory(make(), 1, 0).buffers == 0
    assert memory(make(zero__stage=3), 1, 0).buffers == 4 * 2 * 28272
    assert memory(make(), 2, 0).buffers == 2 * 4 * count
    assert memory(make(zero__bucket_elements=100, zero__overlap_comm=False), 2, 0).buffers == 400
    assert memory(make(zero__bucket_elements=100, zero__stage=3), 2, 0).buffers == 4 * (2 * 100 + 4 * 28272)
    offloaded = make(zero__bucket_elements=100, zero__stage=3, zero__offload_optimizer=Offload.cpu)
    assert memory(offloaded, 2, 0).buffers == 4 * (2 * 100 + 2 * 28272)
