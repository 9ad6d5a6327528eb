"""What optional fields mean when they are None, and sizes that follow from the others."""

from __future__ import annotations

from engine.config.enums import (
    Activation,
    Device,
    DType,
    Family,
    Fp8,
    Kernel,
    Offload,
    OffloadStrategy,
    OptimizerName,
    PipelineSchedule,
    Switch,
)
from engine.config.schema import Config, ModelConfig, OptimConfig, ParallelConfig


def is_causal(model: ModelConfig) -> bool:
    """Whether a position attends only to itself and those before it: `gpt` does, `bert` sees all."""
    return model.family is Family.gpt


def head_dim(model: ModelConfig) -> int:
    """Width H of one attention head: `model.head_dim`, or hidden_size / num_heads."""
    return model.hidden_size // model.num_heads if model.head_dim is None else model.head_dim


def kv_heads(model: ModelConfig) -> int:
    """Key and value heads: `model.num_kv_heads`, or as many as query heads."""
    return model.num_heads if model.num_kv_heads is None else model.num_kv_heads


def qkv_bias(model: ModelConfig) -> bool:
    """Whether query, key and value projections have biases: `model.qkv_bias`, or as all other layers."""
    return model.bias if model.qkv_bias is None else model.qkv_bias


def rotary_dim(model: ModelConfig) -> int:
    """Dims of each head that rotary angles turn, the first ones: int(head_dim * `model.rotary_fraction`)."""
    return int(head_dim(model) * model.rotary_fraction)


def ffn_size(model: ModelConfig) -> int:
    """Inner width F of the feed-forward: `model.ffn_size`, or 4 * hidden_size."""
    return 4 * model.hidden_size if model.ffn_size is None else model.ffn_size


def padded_vocab(model: ModelConfig, tp: int) -> int:
    """Rows of the embedding over all tp ranks: the vocabulary rounded up to a multiple of `vocab_multiple` * tp."""
    multiple = model.vocab_multiple * tp
    return -(-model.vocab_size // multiple) * multiple


def warmup_steps(optim: OptimConfig, total_steps: int) -> int:
    """Steps of warm-up: `optim.warmup_steps`, or a twentieth of the run."""
    return total_steps // 20 if optim.warmup_steps is None else optim.warmup_steps


def cooldown_steps(optim: OptimConfig, total_steps: int) -> int:
    """Steps of the decay that ends a `wsd` schedule: `optim.cooldown_steps`, or a tenth of the run."""
    return total_steps // 10 if optim.cooldown_steps is None else optim.cooldown_steps


def width_ratio(model: ModelConfig) -> float:
    """m of muP (arXiv 2203.03466): hidden_size over the width at which rates and init were tuned; 1 without muP."""
    return 1.0 if model.mup_base_width is None else model.hidden_size / model.mup_base_width


def matrix_init_scale(model: ModelConfig) -> float:
    """Factor of the initial standard deviation of matrices between hidden layers (variance 1/m, table 8 of muP).

    Tables, output projections, norms and biases start in every width as at the base width.
    """
    return float(width_ratio(model) ** -0.5)


def logit_scale(model: ModelConfig) -> float:
    """Factor of the output projection's result: 1/m (table 8 of muP)."""
    return 1.0 / width_ratio(model)


def attention_scale(model: ModelConfig) -> float:
    """Factor of query times key: 1/sqrt(head_dim), with muP 1/head_dim (arXiv 2203.03466, definition 4.1)."""
    width = head_dim(model)
    return float(width**-0.5) if model.mup_base_width is None else 1.0 / width


def can_stream(cfg: Config) -> bool:
    """Whether `engine.runtime.flat` can hold the offloaded state: AdamW's at ZeRO-1 of a bf16 model."""
    adamw, zero = cfg.optim.name is OptimizerName.adamw, cfg.zero
    return adamw and cfg.precision.dtype is DType.bf16 and zero.stage == 1 and zero.offload_optimizer is Offload.cpu


def streams(cfg: Config) -> bool:
    """Whether Octant itself keeps the optimizer's state outside the GPU, or a share of it."""
    return can_stream(cfg) and cfg.zero.offload_strategy in (OffloadStrategy.auto, OffloadStrategy.streamed)


def offloads(cfg: Config) -> bool:
    """Whether DeepSpeed keeps the optimizer's state outside the GPU."""
    return cfg.zero.offload_optimizer is not Offload.none and not streams(cfg)


def on_gpus(cfg: Config) -> bool:
    """Whether the run is meant for GPUs, as far as the config tells: one that leaves the device open is, but for the
    preset of CPUs.
    """
    return cfg.train.device is Device.cuda or (cfg.train.device is Device.auto and cfg.hardware.name != "cpu")


def compiles(cfg: Config) -> bool:
    """Whether blocks are compiled on the device that `on_gpus` expects."""
    return on_gpus(cfg) if cfg.kernels.compile is Switch.auto else cfg.kernels.compile is Switch.on


def fuses_loss(cfg: Config) -> bool:
    """Whether output projection and loss run in chunks: by `kernels.loss`, or what `auto` takes on that device."""
    lent = cfg.zero.stage == 3 and cfg.model.family is Family.bert
    taken = on_gpus(cfg) and cfg.precision.dtype is DType.bf16 and not lent
    return taken if cfg.kernels.loss is Kernel.auto else cfg.kernels.loss is Kernel.triton


def fuses_update(cfg: Config) -> bool:
    """Whether AdamW is one pass over weights, gradients and state: by `kernels.optimizer`, or what `auto` takes there.

    Where state is in one piece for each parameter (ZeRO-0) or outside the GPU it is torch's or DeepSpeed's.
    """
    here = cfg.optim.name is OptimizerName.adamw and cfg.zero.stage > 0 and not offloads(cfg)
    taken = on_gpus(cfg) and cfg.precision.dtype is DType.bf16 and here
    return taken if cfg.kernels.optimizer is Kernel.auto else cfg.kernels.optimizer is Kernel.triton


def has_own_stage3(cfg: Config) -> bool:
    """Whether `engine.runtime.stage3` has the gradients of ZeRO-3."""
    zero = cfg.zero
    return zero.stage == 3 and zero.offload_optimizer is Offload.none and zero.offload_params is Offload.none


def bucket_elements(cfg: Config) -> int:
    """Elements of a common message of gradients; with `has_own_stage3` at most 4 Mi: larger gradients go alone."""
    return min(cfg.zero.bucket_elements, 2**22) if has_own_stage3(cfg) else cfg.zero.bucket_elements


def offload_share(cfg: Config) -> float:
    """Share of the optimizer state that is offloaded: `zero.offload_ratio`, or all; 0 without offload."""
    if cfg.zero.offload_optimizer is Offload.none:
        return 0.0
    return 1.0 if cfg.zero.offload_ratio is None else cfg.zero.offload_ratio


FP8_MULTIPLE = 16
"""Sizes of the slice of a weight that tensor cores take in fp8: rows of 16 bytes."""


def block_linears(model: ModelConfig, tp: int) -> dict[str, tuple[int, int]]:
    """Rows and columns of this tensor-parallel rank's slice of each linear of a block."""
    hidden, inner = model.hidden_size, ffn_size(model)
    query, key_value = model.num_heads * head_dim(model), kv_heads(model) * head_dim(model)
    fused = 2 if model.activation is Activation.swiglu else 1
    return {
        "attention.qkv": ((query + 2 * key_value) // tp, hidden),
        "attention.out": (hidden, query // tp),
        "mlp.up": (fused * inner // tp, hidden),
        "mlp.down": (hidden, inner // tp),
    }


def fp8_linears(cfg: Config) -> frozenset[str]:
    """The linears of a block that multiply in fp8, by their names in `block_linears`."""
    if cfg.precision.fp8 is Fp8.none:
        return frozenset()
    sizes = block_linears(cfg.model, cfg.parallel.tp).items()
    return frozenset(name for name, shape in sizes if not any(size % FP8_MULTIPLE for size in shape))


def in_fp8(cfg: Config, block: int) -> bool:
    """Whether block number `block`, from 0, has linears in fp8."""
    ends = cfg.precision.fp8_bf16_ends
    return cfg.precision.fp8 is not Fp8.none and ends <= block < cfg.model.num_layers - ends


def sequence_multiple(parallel: ParallelConfig) -> int:
    """Sequences have a multiple of this many positions: context, times tp with `parallel.sequence`."""
    return parallel.context * (parallel.tp if parallel.sequence else 1)


def parts_per_rank(parallel: ParallelConfig) -> int:
    """Parts of the model that one pipeline rank holds; the layers are cut into pp times as many."""
    if parallel.schedule is PipelineSchedule.dualpipev:
        return 2
    return parallel.virtual_stages if parallel.schedule is PipelineSchedule.interleaved else 1


def writes_checkpoints(cfg: Config) -> bool:
    """Whether the run is long enough for checkpoints of the whole state."""
    return 0 < cfg.checkpoint.every <= cfg.train.steps
