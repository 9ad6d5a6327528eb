"""Parity cases: which layouts, which flavours, and the configuration of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

from engine.config import rules
from engine.config.enums import Activation, DType, Norm, OptimizerName, Positions, ScheduleName, Switch, WandbMode
from engine.config.schema import Config
from engine.errors import Violation

GLOBAL_BATCH = 32
"""Samples in every case's global batch, whatever the layout: micro_batch takes what dp and accumulation leave."""
SGD_LR = 1.0
"""Large on purpose: a weight near 1 that moves little shows the rounding of its storage, not an error of the engine."""


@dataclass(frozen=True, slots=True)
class Case:
    """One layout of one model. `dp` follows from `world`."""

    world: int
    pp: int
    tp: int
    zero: int
    accum: int
    flavour: str
    tied: bool

    @property
    def dp(self) -> int:
        return self.world // (self.pp * self.tp)

    @property
    def model_key(self) -> str:
        """Cases with equal keys share one reference."""
        return f"{self.flavour}-{'tied' if self.tied else 'untied'}"

    def __str__(self) -> str:
        return f"pp{self.pp} dp{self.dp} tp{self.tp} zero{self.zero} accum{self.accum} {self.model_key}"


FLAVOURS = ("gpt2", "llama")


def with_flavour(cfg: Config, flavour: str, tied: bool) -> Config:
    """`cfg` with its sizes kept and everything else of the model as GPT-2 or Llama has it."""
    cfg = deepcopy(cfg)
    model = cfg.model
    model.tied_head = tied
    llama = flavour == "llama"
    model.positions = Positions.rotary if llama else Positions.learned
    model.norm = Norm.rmsnorm if llama else Norm.layernorm
    model.activation = Activation.swiglu if llama else Activation.gelu_tanh
    model.bias = not llama
    return cfg


def configure(base: Config, case: Case) -> Config:
    """The configuration of `case`: fp32, plain SGD, clipping on, no dropout, the same global batch in every layout."""
    cfg = with_flavour(base, case.flavour, case.tied)
    cfg.model.dropout = cfg.model.attention_dropout = 0.0
    cfg.parallel.pp, cfg.parallel.tp, cfg.parallel.dp = case.pp, case.tp, case.dp
    cfg.zero.stage = case.zero
    cfg.train.accum_steps = case.accum
    cfg.train.micro_batch = GLOBAL_BATCH // (case.accum * case.dp)
    cfg.train.eval_batches = 0
    cfg.optim.name, cfg.optim.schedule = OptimizerName.sgd, ScheduleName.constant
    cfg.optim.lr, cfg.optim.momentum, cfg.optim.weight_decay, cfg.optim.warmup_steps = SGD_LR, 0.0, 0.0, 0
    cfg.precision.dtype, cfg.precision.tf32 = DType.fp32, False
    cfg.kernels.compile = Switch.off
    cfg.logging.wandb = WandbMode.disabled
    return cfg


def enumerate_cases(
    base: Config,
    *,
    worlds: Sequence[int],
    pp: Sequence[int],
    tp: Sequence[int],
    zero: Sequence[int],
    accum: Sequence[int],
    flavours: Sequence[str],
    tied: Sequence[bool],
) -> Iterator[Case]:
    """Every combination that the rules allow, grouped by world size and layout."""
    for world in worlds:
        for p in pp:
            for t in tp:
                if world % (p * t):
                    continue
                for case in (
                    Case(world, p, t, z, a, f, k) for z in zero for a in accum for f in flavours for k in tied
                ):
                    if GLOBAL_BATCH % (case.dp * case.accum) == 0 and not rules.check(configure(base, case), world):
                        yield case


def refusal(base: Config, case: Case) -> list[Violation]:
    """Why `case` cannot run."""
    return rules.check(configure(base, case), case.world)


def covering_subset(cases: Sequence[Case]) -> list[Case]:
    """A small subset in which every pair of values of two settings that occurs at all occurs at least once (greedy)."""
    fields = ("world", "pp", "tp", "zero", "accum", "flavour", "tied")

    def pairs(case: Case) -> set[tuple[str, object, str, object]]:
        values = [(name, getattr(case, name)) for name in fields]
        return {(*a, *b) for i, a in enumerate(values) for b in values[i + 1 :]}

    missing = set().union(*(pairs(case) for case in cases)) if cases else set()
    chosen: list[Case] = []
    while missing:
        best = max(cases, key=lambda case: (len(pairs(case) & missing), -case.world))
        chosen.append(best)
        missing -= pairs(best)
    return sorted(chosen, key=lambda case: (case.world, case.pp, case.tp, case.zero))
