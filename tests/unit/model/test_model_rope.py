"""Rotary positions against a formula in complex numbers, and normalisation against its definition in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.dist.context import SINGLE
from engine.model.norm import LayerNorm, RMSNorm, make_norm
from engine.model.rope import RotaryTable
from engine_kernels.ops import Kernels
from engine_kernels.reference.attention import attention
from tests.helpers.models import GPT2, LLAMA

CPU = torch.device("cpu")
B, S, N, H = 2, 9, 3, 8
KERNELS = Kernels(attention=attention)


def turn(table: RotaryTable, x_BSNH: Tensor) -> Tensor:
    q, k = KERNELS.rotate_qk(x_BSNH, x_BSNH, table.cos_SR, table.sin_SR)
    assert torch.equal(q, k)
    return q


def heads(seed: int = 0, length: int = S) -> Tensor:
    return torch.randn(B, length, N, H, generator=torch.Generator().manual_seed(seed))


def rotated_by_hand(x_BSNH: Tensor, base: float) -> Tensor:
    """Pair i, x_i + j x_{i + H/2}, times exp(j m base^(-2i/H)) at position m, in complex128 and one pair at a time."""
    out = torch.empty_like(x_BSNH, dtype=torch.float64)
    half = x_BSNH.shape[-1] // 2
    for m in range(x_BSNH.shape[1]):
        for i in range(half):
            pair = torch.complex(x_BSNH[:, m, :, i].double(), x_BSNH[:, m, :, i + half].double())
            pair = pair * torch.exp(torch.tensor(1j * m * base ** (-2 * i / (2 * half)), dtype=torch.complex128))
            out[:, m, :, i], out[:, m, :, i + half] = pair.real, pair.imag
    return out


@pytest.mark.parametrize("base", [10_000.0, 500_000.0, 2.0])
def test_rotation_is_multiplication_by_a_complex_phase(base: float) -> None:
    table = RotaryTable(16, H, base, CPU)
    torch.testing.assert_close(turn(table, heads()).double(), rotated_by_hand(heads(), base), rtol=0, atol=1e-6)


def test_late_positions_keep_their_precision() -> None:
    # In fp32 the product 8191 * frequency alone would be off by 5e-4.
    table = RotaryTable(8192, 2, 1.0, CPU)
    angle = torch.tensor(8191.0, dtype=torch.float64)
    assert float(table.cos_SR[-1, 0]) == pytest.approx(float(angle.cos()), abs=1e-7)
    table = RotaryTable(8192, 64, 500_000.0, CPU)
    angle = torch.tensor(8191.0 * 500_000.0 ** (-2 / 64), dtype=torch.float64)
    assert float(table.sin_SR[-1, 1]) == pytest.approx(float(angle.sin()), abs=1e-7)


@pytest.mark.parametrize("turned", [2, 4, 6])
def test_a_part_of_each_head_is_turned_as_a_head_of_that_width_and_the_rest_left(turned: int) -> None:
    x_BSNH = heads()
    out = turn(RotaryTable(16, turned, 10_000.0, CPU), x_BSNH)
    expected = rotated_by_hand(x_BSNH[..., :turned], 10_000.0)
    torch.testing.assert_close(out[..., :turned].double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(out[..., turned:], x_BSNH[..., turned:])
    half = turn(RotaryTable(16, turned, 10_000.0, CPU), x_BSNH.bfloat16())
    whole = turn(RotaryTable(16, turned, 10_000.0, CPU), x_BSNH.bfloat16().float())
    assert torch.equal(half, whole.bfloat16()), "rounded once, at the end"


def test_scores_depend_on_the_distance_alone() -> None:
    table = RotaryTable(32, H, 100.0, CPU)
    q, k = (x.expand(1, 32, 1, H) for x in heads(1, 2)[:1, :, :1].split(1, dim=1))
    scores = torch.einsum("bqnh,bknh->qk", turn(table, q), turn(table, k))
    for distance in (0, 3, -5):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert abs(float(scores[0, 0] - scores[0, 3])) > 1e-2


def test_the_first_position_is_left_as_it_is_and_the_dtype_kept() -> None:
    table = RotaryTable(S, H, 10_000.0, CPU)
    assert torch.equal(turn(table, heads())[:, 0], heads()[:, 0])
    half = turn(table, heads().bfloat16())
    assert half.dtype is torch.bfloat16
    assert torch.equal(half, turn(table, heads().bfloat16().float()).bfloat16()), "rounded once, at the end"


def test_norms_are_their_formulas() -> None:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)) * 4 + 2
    weight, bias = torch.linspace(-1, 2, 16), torch.linspace(3, 0, 16)
    layer, rms = (
        LayerNorm(16, KERNELS, eps=0.1, bias=True, tp=SINGLE, sequence=False),
        RMSNorm(16, KERNELS, eps=0.1, tp=SINGLE, sequence=False),
    )
    assert layer.bias is not None
    with torch.no_grad():
        layer.weight.copy_(weight), layer.bias.copy_(bias), rms.weight.copy_(weight)
    z = x.double()
    centred = z - z.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight + bias
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-6, atol=1e-6)
    expected = z / (z.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight
    torch.testing.assert_close(rms(x).double(), expected, rtol=1e-6, atol=1e-6)


def test_the_config_chooses_norm_and_bias() -> None:
    norm = make_norm(replace(GPT2, norm_eps=0.25), SINGLE, KERNELS, sequence=False)
    assert isinstance(norm, LayerNorm)
    assert norm.bias is not None
    assert norm.eps == 0.25
    assert make_norm(replace(GPT2, bias=False), SINGLE, KERNELS, sequence=False).bias is None
    assert isinstance(make_norm(LLAMA, SINGLE, KERNELS, sequence=False), RMSNorm)
