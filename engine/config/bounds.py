"""Ranges of single numbers (code 301), as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import attrgetter

from engine.config.options import is_missing, options
from engine.config.schema import Config
from engine.errors import Violation


@dataclass(frozen=True, slots=True)
class Range:
    """Legal values of one option. Infinity and NaN are never legal."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` is inside."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        low = f"greater than {self.low:g}" if self.open_low else f"at least {self.low:g}"
        if self.high == math.inf:
            return low
        return f"{low} and {'less than' if self.open_high else 'at most'} {self.high:g}"

    def nearest(self, value: float, path: str) -> str:
        """Way out: the bound that was passed, or the default where the bound itself is not legal."""
        bound = self.low if not value > self.low else self.high
        if self.holds(bound):
            return f"Use {path}={bound:g}"
        default = options()[path].default
        example = "" if is_missing(options()[path]) or default is None else f", such as the default {path}={default}"
        return f"Use a number {self}{example}"


_AT_LEAST_ONE = Range(1)
_NOT_NEGATIVE = Range(0)
_POSITIVE = Range(0, open_low=True)
_SHARE = Range(0, 1, open_high=True)

RANGES: dict[Range, tuple[str, ...]] = {
    _AT_LEAST_ONE: (
        "model.num_layers",
        "model.hidden_size",
        "model.num_heads",
        "model.num_kv_heads",
        "model.head_dim",
        "model.ffn_size",
        "model.vocab_size",
        "model.vocab_multiple",
        "model.max_positions",
        "model.mup_base_width",
        "parallel.virtual_stages",
        "zero.bucket_elements",
        "data.seq_len",
        "data.vocab_size",
        "data.max_bytes",
        "data.workers",
        "optim.decay_steps",
        "train.steps",
        "train.micro_batch",
        "train.accum_steps",
        "train.global_batch",
        "train.micro_batch_limit",
        "train.cpu_threads",
        "train.recompute_interval",
        "train.tile_tokens",
        "precision.scale_window",
        "checkpoint.keep_last",
        "launch.nodes",
        "launch.ranks_per_node",
        "launch.slurm.jobs",
        "launch.slurm.trials_at_once",
        "launch.slurm.cpus_per_task",
        "logging.every",
        "search.jobs",
        "search.trials",
        "search.prune_checks",
    ),
    _NOT_NEGATIVE: (
        "model.token_types",
        "data.seed",
        "precision.fp8_bf16_ends",
        "data.overlap",
        "data.prefetch",
        "optim.weight_decay",
        "optim.clip_norm",
        "optim.warmup_steps",
        "optim.cooldown_steps",
        "train.eval_every",
        "train.eval_batches",
        "train.seed",
        "train.z_loss",
        "checkpoint.every",
        "checkpoint.keep_every",
        "checkpoint.keep_best",
        "launch.gpus_per_node",
        "launch.slurm.warn_s",
        "launch.kubernetes.grace_s",
        "launch.kubernetes.retries",
        "hardware.margin_gib",
        "profile.start",
        "profile.steps",
        "search.fine_trials",
        "search.final_seeds",
        "search.seed",
    ),
    _POSITIVE: (
        "model.rotary_base",
        "model.norm_eps",
        "model.init_std",
        "optim.lr",
        "optim.eps",
        "precision.loss_scale",
        "train.timeout_s",
        "data.wait_s",
        "hardware.memory_gib",
        "hardware.bf16_tflops",
        "hardware.memory_gb_s",
        "hardware.link_gb_s",
        "hardware.host_memory_gib",
    ),
    _SHARE: (
        "model.dropout",
        "model.attention_dropout",
        "data.valid_fraction",
        "data.test_fraction",
        "optim.beta1",
        "optim.beta2",
        "optim.momentum",
        "train.label_smoothing",
    ),
    Range(0, 1): ("optim.min_lr_ratio", "data.fim_rate", "zero.offload_delay"),
    Range(0, 1, open_low=True): (
        "model.rotary_fraction",
        "zero.offload_ratio",
        "data.mask_rate",
        "search.coarse_steps",
        "search.fine_steps",
    ),
    # 2**127 is the largest power of two in fp32, in which the scale is held.
    Range(0, 127): ("precision.initial_scale_power",),
    Range(0, 3): ("zero.stage",),
}


def bound_violations(cfg: Config) -> list[Violation]:
    """Every number outside its range. Options that are None, or a word in place of a number, are not checked."""
    found = []
    for legal, paths in RANGES.items():
        for path in paths:
            value = attrgetter(path)(cfg)
            if value is not None and not isinstance(value, str) and not legal.holds(value):
                way_out = legal.nearest(value, path)
                found.append(Violation(code=301, option=path, value=value, rule=f"must be {legal}", way_out=way_out))
    return found
