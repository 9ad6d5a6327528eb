"""Parity cases: the settings, their values, and the configuration that a case means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from engine.config import rules
from engine.config.derived import parts_per_rank
from engine.config.enums import (
    Activation,
    Attention,
    DType,
    Family,
    Fp8,
    Kernel,
    Norm,
    Offload,
    OptimizerName,
    PipelineSchedule,
    Positions,
    Recompute,
    ScheduleName,
    SentenceHead,
    Switch,
    Tiles,
    WandbMode,
)
from engine.config.schema import Config, ModelConfig
from engine.errors import Violation

GLOBAL_BATCH = 32
"""Samples in every case's global batch, whatever the layout: micro_batch takes what dp and accumulation leave."""
LOSS_SCALE = 1024.0
"""Of fp16: constant, so that no step is left out."""

Domains = Mapping[str, Sequence[Any]]
"""Setting -> its values."""

LAYOUT: Domains = {
    "world": (1, 2, 4, 8),
    "pp": (1, 2, 4),
    "tp": (1, 2, 4),
    "context": (1, 2, 4),
    "sequence": (False, True),
    "schedule": ("one_f_one_b", "interleaved", "dualpipev"),
    "zero": (0, 1, 2, 3),
    "accum": (1, 4, 8),
    "offload": ("none", "cpu"),
    "flavour": ("gpt2", "llama", "bert", "neox", "qwen2"),
    "packed": (False, True),
}
"""Settings that rules relate to each other. packed: attention stays inside the documents of a row."""
FREE: Domains = {
    "recompute": ("none", "selective", "full", "full2", "nested2", "offload2"),
    "tiles": ("none", "mlp", "block"),
    "tied": (True, False),
    "dropout": (0.0, 0.1),
    "length": ("fixed", "variable"),
    "loss": ("plain", "smoothed"),
}
"""Settings legal in every layout. full2: groups of two blocks; nested2: these block by block; offload2: their inputs in
host memory. tiles: three for each sequence, the last one shorter. smoothed: label smoothing and z-loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One combination of settings. `dp` follows from `world`."""

    world: int
    pp: int = 1
    tp: int = 1
    context: int = 1
    sequence: bool = False
    schedule: str = "one_f_one_b"
    zero: int = 1
    accum: int = 1
    offload: str = "none"
    flavour: str = "gpt2"
    packed: bool = False
    recompute: str = "none"
    tiles: str = "none"
    tied: bool = True
    dropout: float = 0.0
    length: str = "fixed"
    loss: str = "plain"

    @property
    def dp(self) -> int:
        return self.world // (self.pp * self.context * self.tp)

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Cases of one grid share their processes."""
        return self.world, self.pp, self.context, self.tp

    def model_words(self) -> list[str]:
        """What the oracle must know of it, but for the depth."""
        words = [self.flavour, "tied" if self.tied else "untied"]
        words += ["packed"] * self.packed
        words += [f"dropout{self.dropout}"] * (self.dropout > 0) + ["variable"] * (self.length == "variable")
        return words + ["smoothed"] * (self.loss == "smoothed")

    def __str__(self) -> str:
        words = [f"pp{self.pp}", *[self.schedule] * (self.schedule != "one_f_one_b"), f"dp{self.dp}"]
        words += [f"cp{self.context}"] * (self.context > 1)
        words += [
            f"tp{self.tp}" + "+sequence" * self.sequence,
            f"zero{self.zero}" + "+offload" * (self.offload != "none"),
        ]
        words += [f"accum{self.accum}"]
        words += [f"recompute-{self.recompute}"] * (self.recompute != "none")
        words += [f"tiles-{self.tiles}"] * (self.tiles != "none")
        return " ".join([*words, *self.model_words()])


def with_flavour(cfg: Config, flavour: str, tied: bool) -> Config:
    """`cfg` with its sizes kept and everything else of the model as one of `LAYOUT`'s flavours has it."""
    # Section by section: a deep copy takes most of the time of planning.
    cfg = replace(cfg, **{section.name: replace(getattr(cfg, section.name)) for section in fields(cfg)})
    model = cfg.model
    llama, bert, neox = flavour in ("llama", "qwen2"), flavour == "bert", flavour == "neox"
    model.family = Family.bert if bert else Family.gpt
    model.tied_head, model.bias = tied, not llama
    model.qkv_bias = True if flavour == "qwen2" else None
    model.positions = Positions.rotary if llama or neox else Positions.learned
    model.parallel_residual, model.rotary_fraction = neox, 0.25 if neox else 1.0
    model.norm = Norm.rmsnorm if llama else Norm.layernorm
    model.norm_eps = 1e-12 if bert else 1e-5
    model.activation = Activation.swiglu if llama else Activation.gelu if bert or neox else Activation.gelu_tanh
    model.token_types = 2 if bert else 0
    model.sentence_head = SentenceHead.next_sentence if bert else SentenceHead.none
    if llama and model.num_kv_heads is None and model.num_heads % 2 == 0:
        model.num_kv_heads = model.num_heads // 2
    return cfg


def configure(base: Config, case: Case) -> Config:
    """The configuration of `case`: in the dtype of `base`, clipping on, the same global batch in every layout.

    The model is deeper than that of `base` where a schedule has more parts than it has blocks. Dropout of attention
    weights is the reference's, whose mask is the same in every layout. Kernels are those of `base` where they can run.
    """
    cfg = with_flavour(base, case.flavour, case.tied)
    _set_layout(cfg, case)
    train, optim, precision = cfg.train, cfg.optim, cfg.precision
    in_pairs = case.recompute.endswith("2")
    train.recompute = Recompute.full if in_pairs else Recompute[case.recompute]
    train.recompute_interval = 2 if in_pairs else 1
    train.recompute_nested, train.recompute_offload = (case.recompute == name for name in ("nested2", "offload2"))
    train.tiles = Tiles[case.tiles]
    train.tile_tokens = train.micro_batch * -(-cfg.data.seq_len // (3 * case.context))
    train.label_smoothing, train.z_loss = (0.1, 1e-3) if case.loss == "smoothed" else (0.0, 0.0)
    train.eval_batches = 0
    cfg.data.variable_length, cfg.data.document_mask = case.length == "variable", case.packed
    cfg.model.dropout = cfg.model.attention_dropout = case.dropout
    if case.dropout:
        cfg.kernels.attention = Attention.reference
    if case.zero == 3 and case.flavour == "bert":
        cfg.kernels.loss = Kernel.auto
    if case.offload != "none":
        cfg.kernels.optimizer = Kernel.auto
    optim.name, optim.schedule, optim.warmup_steps = OptimizerName.sgd, ScheduleName.constant, 0
    precision.tf32, precision.grad_accum = False, DType.fp32
    precision.loss_scale = LOSS_SCALE if precision.dtype is DType.fp16 else None
    cfg.kernels.cuda_graphs = Switch.off
    cfg.logging.wandb = WandbMode.disabled
    return cfg


def _set_layout(cfg: Config, case: Case) -> None:
    parallel = cfg.parallel
    parallel.pp, parallel.tp, parallel.dp, parallel.context = case.pp, case.tp, case.dp, case.context
    parallel.sequence, parallel.schedule = case.sequence, PipelineSchedule[case.schedule]
    parallel.virtual_stages = 2 if parallel.schedule is PipelineSchedule.interleaved else 1
    if case.schedule != "one_f_one_b":
        cfg.model.num_layers = max(cfg.model.num_layers, case.pp * parts_per_rank(parallel))
    cfg.zero.stage, cfg.zero.offload_optimizer = case.zero, Offload[case.offload]
    cfg.train.accum_steps = case.accum
    cfg.train.micro_batch = GLOBAL_BATCH // (case.accum * case.dp)


def oracle_config(base: Config, case: Case) -> Config:
    """What the oracle computes for `case`: the same model, data and loss, in fp32 on one rank by torch."""
    cfg = configure(base, alone(case, zero=0))
    cfg.model.num_layers = configure(base, case).model.num_layers
    cfg.precision.dtype, cfg.precision.loss_scale = DType.fp32, None
    cfg.precision.fp8 = Fp8.none
    kernels = cfg.kernels
    if kernels.attention is not Attention.reference:
        kernels.attention = Attention.auto
    kernels.loss = kernels.norm = kernels.rotary = kernels.activation = kernels.optimizer = Kernel.torch
    return cfg


def alone(case: Case, zero: int) -> Case:
    """`case` without anything parallel or memory-saving."""
    model = {name: getattr(case, name) for name in ("flavour", "packed", "tied", "dropout", "length", "loss")}
    return Case(world=1, zero=zero, **model)


def model_key(base: Config, case: Case) -> str:
    """Cases with equal keys share one oracle."""
    return "-".join([*case.model_words(), f"{configure(base, case).model.num_layers}blocks"])


def refusal(base: Config, case: Case) -> list[Violation]:
    """Why `case` cannot run."""
    return rules.check(configure(base, case), case.world)


def is_legal(base: Config, case: Case) -> bool:
    """Whether the rules allow `case`, the global batch comes out even, and its settings mean something."""
    if case.world % (case.pp * case.context * case.tp) or GLOBAL_BATCH % (case.dp * case.accum):
        return False
    return (case.tp > 1 or not case.sequence) and not refusal(base, case)


def sizes_of(model: ModelConfig) -> str:
    """The base model's sizes, for the report."""
    return f"{model.num_layers} blocks, {model.hidden_size} wide, {model.num_heads} heads, {model.vocab_size} tokens"
