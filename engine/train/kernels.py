"""Which kernels a run has: one choice for each operation, made before the model is built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from engine.config.derived import head_dim, is_causal, kv_heads, offloads
from engine.config.enums import Family, Fp8, Fp8Kernel, Kernel, OptimizerName, Positions
from engine.config.schema import Config
from engine.dist.init import DTYPES
from engine.errors import ConfigError, Violation
from engine.runtime.compile import wants_compile
from engine_kernels.ops import Kernels, kernels_of
from engine_kernels.registry import Choice, KernelUnavailable, Situation, choose

OPERATIONS = {
    "attention": "attention",
    "loss": "linear_cross_entropy",
    "norm": "norm",
    "rotary": "rotary",
    "activation": "activation",
    "optimizer": "adamw",
    "fp8": "fp8_linear",
}
"""Option of `kernels` -> operation of `engine_kernels`."""

_SLOW_FP8 = "Use precision=bf16, or kernels.fp8=emulated, which shows how fp8 trains and is slower than bf16"


@dataclass(frozen=True, slots=True)
class Chosen:
    """The choices of a run, by option of `kernels`: of all operations that it has."""

    choices: dict[str, Choice]
    asked: dict[str, str]

    @property
    def kernels(self) -> Kernels:
        """What the model is built with."""
        return kernels_of({choice.impl.op: choice for choice in self.choices.values()})

    def lines(self, device: torch.device) -> Iterator[str]:
        """For people: on a GPU why the others were passed over, a line for neighbours of which the same is said."""
        if device.type != "cuda":
            yield "kernels: " + ", ".join(f"{option} {choice.impl.name}" for option, choice in self.choices.items())
            return
        for said, group in groupby(self.choices.items(), key=lambda item: item[1].explained):
            yield f"{', '.join(option for option, _ in group)}: {said}"

    def record(self) -> dict[str, Any]:
        """Option -> implementation, what was asked for, and name -> reason of those that were passed over."""
        return {
            option: {
                "implementation": choice.impl.name,
                "asked": self.asked[option],
                "passed_over": dict(choice.passed_over),
            }
            for option, choice in self.choices.items()
        }


def situation(cfg: Config, device: torch.device) -> Situation:
    """What the implementations are asked about. The rules hold for `cfg`."""
    model, causal = cfg.model, is_causal(cfg.model)
    elsewhere = offloads(cfg)
    return Situation(
        device,
        DTYPES[cfg.precision.dtype],
        head_dim=head_dim(model),
        length=cfg.data.seq_len,
        groups=model.num_heads // kv_heads(model),
        causal=causal,
        dropout=model.attention_dropout > 0,
        documents=cfg.data.document_mask,
        # Queries of causal rows do not see padding, and other rows may be shorter than what they are rounded up to.
        padded=not causal,
        deterministic=cfg.kernels.deterministic,
        compiled=wants_compile(cfg, device),
        fp8=cfg.precision.fp8 is not Fp8.none,
        width=model.hidden_size,
        gathered=cfg.zero.stage == 3 and model.family is Family.bert,
        update=f"{cfg.optim.name} in host memory" if elsewhere else str(cfg.optim.name),
        flat=cfg.zero.stage > 0,
    )


def choose_kernels(cfg: Config, device: torch.device) -> Chosen:
    """The implementation of each operation that the run has, the same for every layer.

    Raises:
        ConfigError: one that was asked for by name cannot run here, or fp8 would be emulated on a GPU (330).
    """
    here = situation(cfg, device)
    chosen, violations = Chosen({}, {}), []
    for option, op in OPERATIONS.items():
        asked = getattr(cfg.kernels, option)
        if not _has(cfg, option, asked):
            continue
        chosen.asked[option] = str(asked)
        try:
            chosen.choices[option] = choose(op, str(asked), here)
            _refuse_slow_fp8(chosen.choices[option], asked, here)
        except KernelUnavailable as error:
            violations.append(
                Violation(
                    code=330,
                    option=f"kernels.{option}",
                    value=asked,
                    rule=str(error),
                    way_out=_SLOW_FP8 if option == "fp8" else f"Use kernels.{option}=auto",
                )
            )
    if violations:
        raise ConfigError(violations)
    return chosen


def _refuse_slow_fp8(choice: Choice, asked: object, here: Situation) -> None:
    """Emulation is for CPUs and for who asks for it: fp8 that is slower than bf16 is not what `auto` stands for."""
    if asked is Fp8Kernel.auto and here.device.type == "cuda" and choice.impl.name == Fp8Kernel.emulated:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.refused)
        raise KernelUnavailable(f"{choice.impl.op} would only be emulated on this GPU ({reasons})")


def _has(cfg: Config, option: str, asked: object) -> bool:
    """Whether the run does it at all; a kernel for another optimizer is refused where it was asked for."""
    if option == "rotary":
        return cfg.model.positions is Positions.rotary
    if option == "fp8":
        return cfg.precision.fp8 is not Fp8.none
    if option == "optimizer":
        here = cfg.optim.name is OptimizerName.adamw and not offloads(cfg)
        return here or asked is Kernel.triton
    return True
