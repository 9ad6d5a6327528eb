"""The linear function of parameters that ZeRO-3 cuts, by itself."""

from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses
from torch.nn import functional

from engine.runtime.zero3 import _CutLinear


@pytest.mark.parametrize("shape", [(8,), (4, 8), (2, 4, 8)])
def test_a_result_is_torchs_and_may_be_changed_in_place(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", functional.linear, raising=False)
    x, weight, bias = torch.randn(shape), torch.randn(6, 8), torch.randn(6)
    gradients = []
    for linear in (_CutLinear.apply, functional.linear):
        inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
        out = linear(*inputs)
        out.mul_(2.0)
        gradients.append([out.detach(), *torch.autograd.grad(out.square().sum(), inputs)])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
