"""How far a measurement is from the oracle's, and what is too far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.config.enums import DType
from engine.dist.init import DTYPES
from engine.study.measure import Measured, Run

_FLOOR = 1e-3
"""Share of the global norm below which a parameter's own is not what errors are measured by."""
_LOSS_FLOOR = 1 / 256
"""Share of the dtype's epsilon: the rounding of hundreds of targets averages out, and a smaller error is luck."""

FP32 = {"gradient": 1e-5, "loss": 1e-6, "norm": 1e-6, "sgd": 1e-4, "adamw": 1e-4}
"""Largest relative errors in fp32: see `compare`."""
LOW = {"gradient": 2.0, "gradients": 2.0, "loss": 2.0}
"""Largest errors in bf16 and fp16, as multiples of one rank's: see `compare_low`."""


def limits(dtype: DType) -> dict[str, float]:
    """The largest errors that pass."""
    return FP32 if dtype is DType.fp32 else LOW


@dataclass(slots=True)
class Comparison:
    """Errors by kind, as in `limits`; the worst parameter of a kind; what cannot be compared."""

    errors: dict[str, float] = field(default_factory=dict)
    at: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def failures(self, allowed: Mapping[str, float]) -> list[str]:
        """What is wrong or too far off, in words; nothing when all is well."""
        found = list(self.problems)
        for kind, error in self.errors.items():
            if not error <= allowed[kind]:
                where = f" of {self.at[kind]}" if kind in self.at else ""
                found.append(f"{kind}{where}: {error:.2e} > {allowed[kind]:.0e}")
        return found

    def worst(self, kind: str, errors: Mapping[str, float]) -> None:
        """Enter the largest of `errors` by parameter."""
        name = max(errors, key=lambda name: _size(errors[name]))
        self.errors[kind], self.at[kind] = errors[name], name


def compare(got: Measured, want: Measured) -> Comparison:
    """Errors in fp32 against the oracle.

    gradient: norm of the difference over the larger of the oracle gradient's norm and 1e-3 of the global norm, since
    some gradients, such as a key bias, are zero in theory. sgd, adamw: norm of the parameters' difference after all
    steps over the distance moved, with the same floor. loss and norm: worst relative error of all steps of both.
    """
    out = _same_parameters(got, want)
    if out.problems:
        return out
    out.problems += [
        f"{n} starts from another value" for n in want.before if not torch.equal(got.before[n], want.before[n])
    ]
    out.worst("gradient", _distances(got.gradients, want.gradients, want.gradients))
    for kind, values in (("loss", _losses), ("norm", _norms)):
        pairs = [
            (a, b) for name in want.runs for a, b in zip(values(got.runs[name]), values(want.runs[name]), strict=True)
        ]
        out.errors[kind] = max((_relative(a, b) for a, b in pairs), key=_size)
    for name, run in want.runs.items():
        moved = {key: value - want.before[key] for key, value in run.after.items()}
        out.worst(name, _distances(got.runs[name].after, run.after, moved))
    return out


def compare_low(got: Measured, one: Measured, want: Measured, dtype: DType) -> Comparison:
    """Errors in 16 bits against the fp32 oracle, as multiples of those of `one` rank in the same dtype.

    gradients: norm of the difference of all gradients together. gradient: the same by parameter, where one rank's error
    counts as at least its error in all gradients together, relative to each: a parameter whose own error happens to be
    small on one rank is no measure of another order of summation. loss: root mean square of the relative errors of all
    steps, one rank's at least 1/256 of the dtype's epsilon (3e-5 in bf16), since losses can be right by luck.
    """
    out = _same_parameters(got, want)
    if out.problems:
        return out
    mine, base = (_distances(side.gradients, want.gradients, want.gradients) for side in (got, one))
    whole = [_whole_error(side.gradients, want.gradients) for side in (got, one)]
    out.errors["gradients"] = whole[0] / whole[1]
    out.worst("gradient", {name: error / max(base[name], whole[1]) for name, error in mine.items()})
    spread = [_spread(side.runs["sgd"].losses, want.runs["sgd"].losses) for side in (got, one)]
    out.errors["loss"] = spread[0] / max(spread[1], _LOSS_FLOOR * torch.finfo(DTYPES[dtype]).eps)
    return out


def _same_parameters(got: Measured, want: Measured) -> Comparison:
    different = sorted(want.gradients.keys() ^ got.gradients.keys())
    return Comparison(problems=[f"{name} is in one of the two only" for name in different])


def _losses(run: Run) -> list[float]:
    return run.losses


def _norms(run: Run) -> list[float]:
    return run.norms


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-30)


def _size(error: float) -> float:
    """An error as it is compared: NaN, which `>` and `max` pass over, is as bad as infinity."""
    return math.inf if math.isnan(error) else error


def _spread(losses: list[float], want: list[float]) -> float:
    squares = [_relative(a, b) ** 2 for a, b in zip(losses, want, strict=True)]
    return math.sqrt(sum(squares) / len(squares))


def _distances(got: Mapping[str, Tensor], want: Mapping[str, Tensor], scale: Mapping[str, Tensor]) -> dict[str, float]:
    """Norm of each difference over the norm of `scale`, or over `_FLOOR` of all of it where that is larger."""
    floor = _FLOOR * _norm(scale)
    return {
        name: _norm({name: got[name] - value.to(torch.float64)}) / max(_norm({name: scale[name]}), floor)
        for name, value in want.items()
    }


def _whole_error(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    return _norm({name: got[name] - value.double() for name, value in want.items()}) / _norm(want)


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return float(torch.stack([t.double().norm() for t in tensors.values()]).norm())
