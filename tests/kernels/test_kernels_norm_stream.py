"""A residual stream read on beside its norm: the gradients of both, in Triton and in torch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from engine_kernels import plain as torch_ops
from engine_kernels.kernels import Norms
from engine_kernels.with_triton import IMPLS
from tests.kernels.test_kernels_norm import EPS, FP32, inputs, torch_norm


def stream(
    x: Tensor, weight_D: Tensor, bias_D: Tensor | None, residual: Tensor | None, norms: Norms, kind: str
) -> tuple[Tensor, Tensor]:
    if kind == "rms":
        return norms.add_rms_norm(x, residual, weight_D, eps=EPS)
    return norms.add_layer_norm(x, residual, weight_D, bias_D, eps=EPS)


NORMS = {
    "torch": Norms(torch_ops.rms_norm, torch_ops.layer_norm, torch_ops.add_rms_norm, torch_ops.add_layer_norm),
    "triton": IMPLS["norm"].fn,
}


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("used", ["y", "s", "both"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_stream_is_read_on_beside_its_norm(
    kind: str, name: str, used: str, compiled: bool, device: torch.device
) -> None:
    given = inputs(kind, (9, 41), FP32, device, residual=True, bias=True)
    fn = torch.compile(stream, fullgraph=True, backend="aot_eager") if compiled else stream
    for residual in (None, given["residual"]):
        grads = []
        for call in (partial(fn, norms=NORMS[name], kind=kind), partial(torch_norm_and_sum, kind=kind)):
            leaves = {key: given[key].clone().requires_grad_() for key in ("x", "weight_D", "bias_D") if key in given}
            if residual is not None:
                leaves["residual"] = residual.clone().requires_grad_()
            y, s = call(leaves["x"], leaves["weight_D"], leaves.get("bias_D"), residual=leaves.get("residual"))
            outputs = {"y": (y,), "s": (s,), "both": (y, s)}[used]
            wanted = [leaf for key, leaf in leaves.items() if used != "s" or key not in ("weight_D", "bias_D")]
            weights = (given["ds"], given["dy"])[: len(outputs)]
            grads.append((y, s, *torch.autograd.grad(outputs, wanted, weights)))
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs)


def torch_norm_and_sum(
    x: Tensor, weight_D: Tensor, bias_D: Tensor | None, *, residual: Tensor | None, kind: str
) -> tuple[Tensor, Tensor]:
    s = x if residual is None else x + residual
    y = torch_norm(s, weight_D, bias_D, kind=kind, residual=None)
    assert isinstance(y, Tensor)
    return y, s
