"""Options of the training loop and of its number formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from engine.config.enums import (
    Device,
    DType,
    Fp8,
    Recompute,
    Tiles,
)

if TYPE_CHECKING:
    # `auto` is replaced by the number that is found, and the rules let nothing else pass: code sees a number.
    MicroBatch = int
else:
    # OmegaConf cannot compose a union in a mandatory section: the rules check the type.
    MicroBatch = Any


@dataclass(slots=True, kw_only=True)
class PrecisionConfig:
    """Number formats. There is no autocast: a tensor's dtype is what the code says."""

    dtype: DType = DType.fp32
    grad_accum: DType = DType.fp32
    """Dtype in which the gradients of the micro-batches are added up when `dtype` is bf16."""
    states: DType = DType.fp32
    """Dtype of master weights and AdamW's moments when `dtype` is bf16, at ZeRO-1: in `bf16` the weights are their own
    masters, and what a step changes is rounded by chance (arXiv 2010.06192). 6 bytes a parameter in place of 14."""
    loss_scale: float | None = None
    """fp16: constant factor of the loss. None: dynamic, halved when gradients overflow and doubled now and then."""
    initial_scale_power: int = 16
    """fp16: the dynamic scale starts at 2 to this power."""
    scale_window: int = 1000
    """fp16: steps without overflow before the dynamic scale is doubled."""
    fp8: Fp8 = Fp8.none
    """Products of the blocks' linears, forward and backward, in fp8, where `dtype` is bf16. Weights, activations,
    embeddings and the output projection stay in `dtype`."""
    fp8_bf16_ends: int = 0
    """Blocks at either end of the model whose linears stay in bf16 (`--first-last-layers-bf16` of Megatron-LM)."""
    tf32: bool = False
    """Let fp32 matrix products on GPUs use TF32 (10-bit mantissa). Off keeps the parity promise."""


@dataclass(slots=True, kw_only=True)
class TrainingConfig:
    """The training loop. Global batch = micro_batch * accum_steps * dp samples."""

    steps: int = MISSING
    """Optimizer steps."""
    micro_batch: MicroBatch = MISSING
    """Samples in one forward pass of one replica. `auto`: the largest that fits into the device, found by trial before
    the ranks of `python -m engine.train` start."""
    micro_batch_limit: int | None = None
    """Largest micro-batch that `auto` tries. None: 512 on GPUs, 16 on CPUs, where larger ones are no faster."""
    accum_steps: int = 1
    """Micro-batches whose gradients are averaged into one optimizer step; with pp > 1 they fill the pipeline."""
    global_batch: int | None = None
    """Samples of one optimizer step over all replicas; then accum_steps follows, global_batch / (micro_batch * dp).
    None: as many as micro_batch, accum_steps and dp make."""
    eval_every: int = 0
    """Steps between validations. 0: only at the end."""
    eval_batches: int = 8
    """Global batches of held-out samples in one validation. 0: no validation."""
    seed: int = 1234
    """Seed of initial weights and dropout."""
    label_smoothing: float = 0.0
    """Probability mass that the target shares evenly with the whole vocabulary (arXiv 1512.00567, section 7)."""
    z_loss: float = 0.0
    """Weight of the mean squared log-partition of the logits, which keeps them small (PaLM, arXiv 2204.02311)."""
    recompute: Recompute = Recompute.none
    recompute_interval: int = 1
    """Blocks in one recomputed group when `recompute` is full: more blocks store less and hold more at once."""
    recompute_nested: bool = False
    """Compute a recomputed group again block by block: it holds the inputs of its blocks and the activations of one of
    them, for one more forward pass of all but its last block."""
    recompute_offload: bool = False
    """Keep the inputs of recomputed groups in page-locked host memory: copied there beside the forward pass, and back
    one group ahead of the backward pass."""
    tiles: Tiles = Tiles.none
    """What of a block is computed tile by tile over the positions, and again in the backward pass (ALST, arXiv
    2506.13996, section 3.1): `mlp` the feed-forward, `block` all but the attention core, of which queries, keys, values
    and output are kept."""
    tile_tokens: int = 8192
    """Tokens of one tile: fewer hold less at once, and add more often to the gradients of the weights."""
    device: Device = Device.auto
    cpu_threads: int | None = None
    """Threads of one rank on the CPU. None: cores / local ranks, at least one."""
    timeout_s: float = 600.0
    """Longest wait for a collective before the job is stopped, seconds."""
