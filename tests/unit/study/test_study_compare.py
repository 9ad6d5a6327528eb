"""A comparison finds each kind of difference, names it, and is not fooled by NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from engine.config.enums import DType
from engine.study.compare import FP32, LOW, Comparison, compare, compare_low
from engine.study.measure import Measured, Run


def measured() -> Measured:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (4, 3), "b.bias": (5,), "c.weight": (2, 2)}
    before = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    gradients = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    runs = {
        name: Run(
            [5.0, 4.5, 4.0, 3.5, 3.0],
            [1.0, 2.0, 3.0, 2.0, 1.0],
            {key: value - rate * gradients[key] for key, value in before.items()},
        )
        for name, rate in (("sgd", 0.5), ("adamw", 0.1))
    }
    return Measured(before, gradients, runs)


def changed(where: str, key: str | int, factor: float, run: str = "sgd") -> Measured:
    got = measured()
    part: Any = getattr(got.runs[run] if where in ("losses", "norms", "after") else got, where)
    part[key] = part[key] * factor
    return got


def failures(got: Measured) -> list[str]:
    """What the study says of `got`."""
    return compare(got, measured()).failures(FP32)


def test_equal_measurements_differ_in_nothing() -> None:
    assert compare(measured(), measured()).errors == dict.fromkeys(FP32, 0.0)
    assert failures(measured()) == []


def test_a_wrong_gradient_is_named_and_measured() -> None:
    result = compare(changed("gradients", "b.bias", 1.01), measured())
    assert result.at["gradient"] == "b.bias"
    assert result.errors["gradient"] == pytest.approx(0.01, rel=1e-4)
    assert [result.errors[kind] for kind in ("loss", "norm", "sgd", "adamw")] == [0.0] * 4
    assert failures(changed("gradients", "b.bias", 1.01)) == ["gradient of b.bias: 1.00e-02 > 1e-05"]


def test_the_worst_of_several_gradients_is_named() -> None:
    got = changed("gradients", "a.weight", 1.001)
    got.gradients["c.weight"] *= 1.1
    got.gradients["b.bias"] *= 1.01
    assert compare(got, measured()).at["gradient"] == "c.weight"


@pytest.mark.parametrize("run", ["sgd", "adamw"])
@pytest.mark.parametrize("step", [0, 3, 4])
def test_a_wrong_loss_of_any_step(step: int, run: str) -> None:
    got = changed("losses", step, 1 + 1e-5, run)
    assert compare(got, measured()).errors["loss"] == pytest.approx(1e-5, rel=1e-4)
    assert failures(got) == ["loss: 1.00e-05 > 1e-06"]


@pytest.mark.parametrize("run", ["sgd", "adamw"])
@pytest.mark.parametrize("step", [0, 4])
def test_a_wrong_norm_of_any_step(step: int, run: str) -> None:
    assert failures(changed("norms", step, 0.5, run)) == ["norm: 5.00e-01 > 1e-06"]


@pytest.mark.parametrize(("run", "rate"), [("sgd", 0.5), ("adamw", 0.1)])
def test_a_parameter_that_moved_too_far_is_named_by_the_distance(run: str, rate: float) -> None:
    got = measured()
    got.runs[run].after["a.weight"] = got.before["a.weight"] - 1.2 * rate * got.gradients["a.weight"]
    result = compare(got, measured())
    assert result.at[run] == "a.weight"
    assert result.errors[run] == pytest.approx(0.2, rel=1e-4)
    assert failures(got) == [f"{run} of a.weight: 2.00e-01 > 1e-04"]


def test_a_parameter_that_did_not_move_is_found() -> None:
    got = measured()
    got.runs["sgd"].after["c.weight"] = got.before["c.weight"]
    assert compare(got, measured()).errors["sgd"] == pytest.approx(1.0)


def test_another_start_is_found_even_if_all_else_agrees() -> None:
    assert failures(changed("before", "a.weight", 1 + 1e-6)) == ["a.weight starts from another value"]


@pytest.mark.parametrize("extra", [True, False])
def test_a_parameter_that_only_one_side_has(extra: bool) -> None:
    got = measured()
    for part in (got.gradients, got.before, got.runs["sgd"].after):
        if extra:
            part["d.weight"] = torch.ones(2)
        else:
            del part["a.weight"]
    assert failures(got) == [f"{'d.weight' if extra else 'a.weight'} is in one of the two only"]


@pytest.mark.parametrize("name", ["a.weight", "b.bias", "c.weight"])
@pytest.mark.parametrize("where", ["gradients", "after"])
def test_nan_in_any_tensor_is_a_miss_whatever_comes_after_it(where: str, name: str) -> None:
    kind = "gradient" if where == "gradients" else "sgd"
    assert failures(changed(where, name, math.nan)) == [f"{kind} of {name}: nan > {FP32[kind]:.0e}"]


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
    assert compare(got, want).errors["gradient"] == pytest.approx(expected, rel=1e-3)
    assert expected < FP32["gradient"]


def test_a_small_but_real_gradient_is_not_forgiven_by_that() -> None:
    want, got = measured(), measured()
    want.gradients["b.bias"] *= 1e-2
    got.gradients["b.bias"] = want.gradients["b.bias"] * 2
    assert compare(got, want).errors["gradient"] == pytest.approx(1.0)


def low(gradient: float, loss: float) -> Measured:
    """As measured in 16 bits: every element of every gradient off by `gradient`, and losses by `loss`, relative."""
    got = measured()
    del got.runs["adamw"]
    got.gradients = {name: value * (1 + gradient) for name, value in got.gradients.items()}
    got.runs["sgd"].losses = [value * (1 + loss) for value in got.runs["sgd"].losses]
    return got


def test_16_bits_may_be_twice_as_far_off_as_one_rank() -> None:
    one = low(0.01, 1e-3)
    good, bad = low(0.019, 1.9e-3), low(-0.021, -2.1e-3)
    assert compare_low(good, one, measured(), DType.bf16).failures(LOW) == []
    errors = compare_low(bad, one, measured(), DType.bf16).errors
    assert errors == pytest.approx({"gradient": 2.1, "gradients": 2.1, "loss": 2.1}, rel=1e-3)
    assert len(compare_low(bad, one, measured(), DType.bf16).failures(LOW)) == 3


def test_a_parameter_that_one_rank_got_right_by_luck_is_measured_by_the_whole() -> None:
    one, got = low(0.01, 1e-3), low(0.01, 1e-3)
    one.gradients["b.bias"] = measured().gradients["b.bias"]
    assert compare_low(got, one, measured(), DType.bf16).errors["gradient"] < 1.5
    got.gradients["b.bias"] = measured().gradients["b.bias"] * 1.1
    result = compare_low(got, one, measured(), DType.bf16)
    assert result.at["gradient"] == "b.bias"
    assert result.errors["gradient"] > 2


def test_a_loss_that_one_rank_got_right_by_luck_is_measured_by_the_floor() -> None:
    floor = torch.finfo(torch.bfloat16).eps / 256
    assert compare_low(low(0.01, 1.9 * floor), low(0.01, 0.0), measured(), DType.bf16).failures(LOW) == []
    assert compare_low(low(0.01, 2.1 * floor), low(0.01, 0.0), measured(), DType.bf16).errors["loss"] > 2


def test_nan_in_16_bits_is_a_miss() -> None:
    got = low(0.01, 1e-3)
    got.gradients["a.weight"] = got.gradients["a.weight"] * math.nan
    assert "gradient of a.weight: nan > 2e+00" in compare_low(got, low(0.01, 1e-3), measured(), DType.bf16).failures(
        LOW
    )


def test_nothing_measured_is_told_apart_from_nothing_wrong() -> None:
    assert Comparison(problems=["its ranks failed or hung, see above"]).failures(FP32) != []
