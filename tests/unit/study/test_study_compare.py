"""A comparison finds each kind of difference, names it, and is not fooled by NaN."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch

from engine.study import parity
from engine.study.cases import Case
from engine.study.measure import Comparison, Measured, compare

CASE = Case(world=4, pp=2, tp=1, zero=1, accum=4, flavour="gpt2", tied=True)


def measured() -> Measured:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (4, 3), "b.bias": (5,), "c.weight": (2, 2)}
    before = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    gradients = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    after = {name: value - 0.5 * gradients[name] for name, value in before.items()}
    return Measured(gradients, [5.0, 4.5, 4.0, 3.5, 3.0], [1.0, 2.0, 3.0, 2.0, 1.0], before, after)


def changed(where: str, key: str | int, factor: float) -> Measured:
    got = deepcopy(measured())
    getattr(got, where)[key] = getattr(got, where)[key] * factor
    return got


def failures(got: Measured) -> list[str]:
    """What the study says of `got`."""
    return parity._judge(CASE, compare(got, measured()))["failed"]


def test_equal_measurements_differ_in_nothing() -> None:
    assert compare(measured(), measured()) == Comparison()
    assert failures(measured()) == []


def test_a_wrong_gradient_is_named_and_measured() -> None:
    result = compare(changed("gradients", "b.bias", 1.01), measured())
    assert result.gradient_at == "b.bias"
    assert result.gradient == pytest.approx(0.01, rel=1e-4)
    assert (result.loss, result.norm, result.parameters) == (0.0, 0.0, 0.0)
    assert failures(changed("gradients", "b.bias", 1.01)) == ["gradient of b.bias: 1.00e-02 > 1e-05"]


def test_the_worst_of_several_gradients_is_named() -> None:
    got = changed("gradients", "a.weight", 1.001)
    got.gradients["c.weight"] *= 1.1
    got.gradients["b.bias"] *= 1.01
    assert compare(got, measured()).gradient_at == "c.weight"


@pytest.mark.parametrize("step", [0, 3, 4])
def test_a_wrong_loss_of_any_step(step: int) -> None:
    result = compare(changed("losses", step, 1 + 1e-5), measured())
    assert result.loss == pytest.approx(1e-5, rel=1e-4)
    assert failures(changed("losses", step, 1 + 1e-5)) == ["loss: 1.00e-05 > 1e-06"]


@pytest.mark.parametrize("step", [0, 4])
def test_a_wrong_norm_of_any_step(step: int) -> None:
    assert compare(changed("norms", step, 0.5), measured()).norm == pytest.approx(0.5)
    assert failures(changed("norms", step, 0.5)) == ["norm: 5.00e-01 > 1e-06"]


def test_a_parameter_that_moved_too_far_is_named_by_the_distance() -> None:
    got = measured()
    got.after["a.weight"] = got.before["a.weight"] - 0.6 * got.gradients["a.weight"]
    result = compare(got, measured())
    assert result.parameters_at == "a.weight"
    assert result.parameters == pytest.approx(0.2, rel=1e-4)
    assert failures(got) == ["parameters of a.weight: 2.00e-01 > 1e-04"]


def test_a_parameter_that_did_not_move_is_found() -> None:
    got = measured()
    got.after["c.weight"] = got.before["c.weight"]
    assert compare(got, measured()).parameters == pytest.approx(1.0)


def test_another_start_is_found_even_if_all_else_agrees() -> None:
    assert failures(changed("before", "a.weight", 1 + 1e-6)) == ["a.weight starts from another value"]


@pytest.mark.parametrize("extra", [True, False])
def test_a_parameter_that_only_one_side_has(extra: bool) -> None:
    got = measured()
    for part in (got.gradients, got.before, got.after):
        if extra:
            part["d.weight"] = torch.ones(2)
        else:
            del part["a.weight"]
    assert failures(got) == [f"{'d.weight' if extra else 'a.weight'} is in one of the two only"]


@pytest.mark.parametrize("name", ["a.weight", "b.bias", "c.weight"])
@pytest.mark.parametrize("where", ["gradients", "after"])
def test_nan_in_any_tensor_is_a_miss_whatever_comes_after_it(where: str, name: str) -> None:
    kind = "gradient" if where == "gradients" else "parameters"
    assert failures(changed(where, name, math.nan)) == [f"{kind} of {name}: nan > {parity.limits()[kind]:.0e}"]


@pytest.mark.parametrize("step", [0, 2, 4])
@pytest.mark.parametrize("where", ["losses", "norms"])
def test_nan_in_any_step_is_a_miss(where: str, step: int) -> None:
    (failure,) = failures(changed(where, step, math.nan))
    assert failure.startswith(("loss: nan", "norm: nan"))


def test_a_gradient_that_is_zero_in_theory_is_measured_against_the_whole() -> None:
    want, got = measured(), measured()
    want.gradients["b.bias"] = torch.zeros(5)
    got.gradients["b.bias"] = torch.full((5,), 1e-9)
    # Below 1e-3 of the global norm the error counts against that share of it.
    global_norm = float(torch.cat([g.flatten() for g in want.gradients.values()]).norm())
    expected = 1e-9 * 5**0.5 / (1e-3 * global_norm)
    assert compare(got, want).gradient == pytest.approx(expected, rel=1e-3)
    assert expected < parity.GRADIENT


def test_a_small_but_real_gradient_is_not_forgiven_by_that() -> None:
    want, got = measured(), measured()
    want.gradients["b.bias"] *= 1e-2
    got.gradients["b.bias"] = want.gradients["b.bias"] * 2
    assert compare(got, want).gradient == pytest.approx(1.0)
