"""flash-attention's rule: a fused kernel may err twice as much as torch does in the same dtype, both against fp64."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float64: 2.0**-52}


def assert_twice_as_good(name: str, found: Tensor, baseline: Tensor, exact: Tensor) -> None:
    """Largest and root-mean-square error of `found` are at most twice those of `baseline`.

    Where torch is exact by luck, one rounding of the largest value (largest error) or a tenth of it (mean) is allowed.
    """
    assert found.dtype == baseline.dtype, f"{name}: {found.dtype}, torch {baseline.dtype}"
    assert found.shape == exact.shape, f"{name}: {tuple(found.shape)}, not {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    assert bool(found.isfinite().all()), f"{name}: not finite"
    error, other = ((x.double() - exact.double()).abs() for x in (found, baseline))
    step = _ROUNDING[found.dtype] * float(exact.double().abs().max())
    for kind, mine, theirs, luck in (
        ("largest", error.max(), other.max(), step),
        ("mean", error.square().mean().sqrt(), other.square().mean().sqrt(), step / 10),
    ):
        assert float(mine) <= 2 * float(theirs) + luck, f"{name}: {kind} error {mine:.2e}, torch {theirs:.2e}"
