"""The typed configuration: one dataclass per section, one docstring per field.

Not frozen, because OmegaConf fills the fields one by one. `engine.config.load` is the only place that makes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from engine.config.enums import (
    Activation,
    Balance,
    Family,
    Norm,
    Offload,
    OffloadStrategy,
    OptimizerName,
    PipelineSchedule,
    Positions,
    ScheduleName,
    SentenceHead,
    TpOverlap,
    Transport,
    WandbMode,
)
from engine.config.schema_checkpoint import CheckpointConfig
from engine.config.schema_data import DataConfig
from engine.config.schema_hardware import HardwareConfig
from engine.config.schema_kernels import KernelsConfig
from engine.config.schema_launch import LaunchConfig
from engine.config.schema_search import SearchConfig
from engine.config.schema_training import PrecisionConfig, TrainingConfig


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """A transformer. GPT-2, Llama, GPT-NeoX and Qwen2 are points of `gpt`, BERT and ALBERT's objective of `bert`."""

    name: str = MISSING
    """Name of the preset, for logs and file names."""
    family: Family = Family.gpt
    num_layers: int = MISSING
    """Transformer blocks."""
    hidden_size: int = MISSING
    """Width D of the residual stream."""
    num_heads: int = MISSING
    """Query heads N."""
    num_kv_heads: int | None = None
    """Key and value heads (grouped-query attention). None: as many as query heads."""
    head_dim: int | None = None
    """Width H of one head. None: hidden_size / num_heads."""
    ffn_size: int | None = None
    """Inner width F of the feed-forward. None: 4 * hidden_size."""
    vocab_size: int = MISSING
    """Logical vocabulary V. Padding to a multiple of `vocab_multiple` * tp never reaches logits or loss."""
    vocab_multiple: int = 64
    """Rows of the embedding on one tensor-parallel rank are a multiple of this (GEMM tiles)."""
    max_positions: int = MISSING
    """Longest sequence the model accepts, tokens."""
    positions: Positions = Positions.learned
    rotary_base: float = 10000.0
    """Base theta of the rotary angles (RoFormer, arXiv 2104.09864, eq. 15)."""
    rotary_fraction: float = 1.0
    """Share of each head's dims, the first ones, that rotary angles turn (GPT-NeoX, arXiv 2204.06745: 0.25)."""
    parallel_residual: bool = False
    """`gpt`: attention and feed-forward read the same x, x + attn(norm1(x)) + mlp(norm2(x)) (arXiv 2204.06745)."""
    norm: Norm = Norm.layernorm
    norm_eps: float = 1e-5
    activation: Activation = Activation.gelu_tanh
    bias: bool = True
    """Biases in linear layers and layer norms (RMSNorm has none)."""
    qkv_bias: bool | None = None
    """Biases of the query, key and value projections (Qwen2 has no others). None: as `bias`."""
    tied_head: bool = True
    """The output projection shares the token embedding's weight."""
    dropout: float = 0.0
    """Probability of dropping an element of the embeddings and of each sublayer's output."""
    attention_dropout: float = 0.0
    """Probability of dropping an attention weight."""
    init_std: float = 0.02
    """Standard deviation of initial weights; residual projections of `gpt` are scaled by 1/sqrt(2 num_layers)."""
    token_types: int = 0
    """Segment embeddings (`bert`): 2 for sentence pairs, 0 for none."""
    sentence_head: SentenceHead = SentenceHead.none
    """Pooler and two-way classifier over the first token (`bert`), trained beside the masked-token loss."""
    mup_base_width: int | None = None
    """Hidden width at which learning rate and init were tuned: with it, both are scaled to this width (muP, arXiv
    2203.03466, table 8: matrices' rate and variance and the logits by 1/m, attention by 1/head_dim). None: off."""


@dataclass(slots=True, kw_only=True)
class ParallelConfig:
    """Degrees of the mesh axes, outermost first: pp, dp, context, tp."""

    pp: int = 1
    """Pipeline stages."""
    tp: int = 1
    """Tensor-parallel ranks inside one stage."""
    dp: int | None = None
    """Data-parallel replicas. None: whatever the launcher gives, world_size / (pp * context * tp)."""
    context: int = 1
    """Ranks that share each sequence (Ulysses, arXiv 2309.14509): each computes 1/context of the positions, and in
    attention 1/context of the heads over all positions."""
    sequence: bool = False
    """Megatron's sequence parallelism (arXiv 2205.05198, section 4.2.2): outside the tensor-parallel layers each tp
    rank holds 1/tp of the positions. Saves activations at equal traffic."""
    tp_overlap: TpOverlap = TpOverlap.auto
    """Collectives of tensor-parallel layers beside their products. auto: chunked on GPUs, none on CPUs."""
    schedule: PipelineSchedule = PipelineSchedule.one_f_one_b
    virtual_stages: int = 1
    """Parts of the model on one pipeline rank when `schedule` is interleaved (arXiv 2104.04473, section 2.2)."""
    pipeline_transport: Transport = Transport.auto
    """How messages between stages travel. auto: nccl."""
    balance: Balance = Balance.flops
    """Cost that the pipeline stages share evenly."""


@dataclass(slots=True, kw_only=True)
class ZeroConfig:
    """ZeRO (arXiv 1910.02054): what the data-parallel replicas shard among them."""

    stage: int = 1
    """0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters. Pipelines allow 0 to 2."""
    bucket_elements: int = 200_000_000
    """Elements in one collective of the ZeRO optimizers. Stage 3 without offload: in one of several gradients, at most
    4 Mi; a larger gradient goes alone, straight from where it is."""
    overlap_comm: bool = True
    """Reduce buckets while the backward pass goes on (pp=1; on GPUs, and in bf16 at stage 1 on CPUs too). In bf16 at
    stage 1 new weights arrive while the next forward pass goes on, too."""
    gather: Transport = Transport.auto
    """How stage 3 gathers a block's parameters. copy_engine: each rank reads the others' parts itself, without waiting
    for them to send (GPUs of one host, nothing offloaded). auto: nccl."""
    offload_optimizer: Offload = Offload.none
    """Keep optimizer state and fp32 weights in host memory and step there, or on NVMe (stage 3)."""
    offload_params: Offload = Offload.none
    """Keep parameters in host memory or on NVMe and fetch them layer by layer (stage 3)."""
    offload_ratio: float | None = None
    """Share of the optimizer state that is offloaded (streamed, and at stage 3 to cpu). None: streamed on GPUs, the
    least with which the plan fits the device; else all."""
    offload_strategy: OffloadStrategy = OffloadStrategy.auto
    """auto: streamed with AdamW in bf16 at stage 1, else plain."""
    offload_delay: int = 0
    """Steps by which streamed weights lag behind: 0, or 1, when the host steps beside the next step's passes (delayed
    parameter update, arXiv 2101.06840, section 5.2)."""
    nvme_path: str | None = None
    """Folder on a local NVMe disk for `nvme`."""
    pin_memory: bool = True
    """Page-locked host memory for what is offloaded: faster copies, and the host cannot swap it out."""


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: OptimizerName = OptimizerName.adamw
    lr: float = MISSING
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.0
    """For sgd; muon uses 0.95 unless it is set."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices and embeddings; norms and biases are never decayed."""
    clip_norm: float = 1.0
    """Gradients are scaled so that their global L2 norm is at most this. 0: no clipping, the norm is still reported."""
    schedule: ScheduleName = ScheduleName.cosine
    warmup_steps: int | None = None
    """Steps of linear warm-up from lr / warmup_steps. None: a twentieth of train.steps."""
    decay_steps: int | None = None
    """Step at which min_lr_ratio is reached. None: train.steps."""
    min_lr_ratio: float = 0.1
    """Final learning rate over the peak."""
    cooldown_steps: int | None = None
    """Steps of the linear decay at the end of `wsd` (warm-up, stable, decay). None: a tenth of train.steps."""


@dataclass(slots=True, kw_only=True)
class LoggingConfig:
    """What is reported, and how often."""

    every: int = 1
    """Steps between lines of metrics.jsonl and updates of the progress bar."""
    progress: bool = True
    """Progress bar on a terminal, plain lines elsewhere. Off: neither."""
    plot: bool = True
    """Draw `loss.png` into the run folder at the end."""
    wandb: WandbMode = WandbMode.disabled
    """`offline` writes a W&B run beside the metrics; `online` sends it."""
    wandb_project: str = "octant"
    verbose: bool = False
    """Show what DeepSpeed and other libraries print."""


@dataclass(slots=True, kw_only=True)
class ProfileConfig:
    """torch.profiler over a window of steps; the trace and a table of operators go to the run folder."""

    start: int = 0
    """First profiled step. Used when `steps` is positive."""
    steps: int = 0
    """Profiled steps. 0: no profile."""


@dataclass(slots=True, kw_only=True)
class RunConfig:
    """Where results go: `<dir>/<name>/`."""

    name: str = MISSING
    dir: str = "runs"
    overwrite: bool = False
    """Replace the results of an earlier run of the same name."""
    resume: bool = False
    """Go on from the newest whole checkpoint of the run of the same name, in any layout; start where there is none."""


@dataclass(slots=True, kw_only=True)
class RuntimeConfig:
    """The DeepSpeed bridge."""

    deepspeed_extra: dict[str, Any] = field(default_factory=dict)
    """Extra entries of DeepSpeed's own configuration. Keys that Octant sets itself, and unknown keys, are refused."""


@dataclass(slots=True, kw_only=True)
class Config:
    """Everything that defines a run."""

    model: ModelConfig = MISSING
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    data: DataConfig = MISSING
    optim: OptimConfig = MISSING
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    train: TrainingConfig = MISSING
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    run: RunConfig = field(default_factory=RunConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
