"""The learning-rate range test: its ramp, its suggestion, its refusals."""

from __future__ import annotations

import math

import pytest

from engine.errors import LaunchError
from engine.tune import __main__ as entry
from engine.tune.lr_range import ramp, require_range, suggestion


def test_the_ramp_rises_by_equal_factors_from_end_to_end() -> None:
    assert ramp(1e-4, 1.0, 5) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_the_suggestion_is_where_the_loss_falls_fastest_before_its_lowest() -> None:
    rates = ramp(1e-5, 1.0, 6)
    assert suggestion(rates, [7.0, 6.9, 6.0, 4.0, 3.5, 9.0]) == rates[2]


def test_losses_from_the_first_that_is_not_finite_on_do_not_count() -> None:
    rates = ramp(1e-5, 1.0, 6)
    assert suggestion(rates, [7.0, 6.0, 5.9, math.nan, 1.0, 0.5]) == rates[0]


@pytest.mark.parametrize("losses", [[1.0, 2.0, 3.0], [math.nan, 1.0, 2.0]])
def test_a_loss_that_never_falls_suggests_nothing(losses: list[float]) -> None:
    assert suggestion([1e-3, 1e-2, 1e-1], losses) is None


def test_what_is_no_test_is_refused() -> None:
    with pytest.raises(LaunchError, match=r"\[OCT587\] --low=2: the rate rises from it to --high 1. Use --low 1e-6"):
        require_range(2, 1.0, 100)
    with pytest.raises(
        LaunchError, match=r"\[OCT587\] train.steps=5: a curve needs at least 10 steps. Use train.steps"
    ):
        require_range(1e-6, 1.0, 5)


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["repotr"]) == 2
    assert "[OCT589] command=repotr: no such command. Nearest: report" in capsys.readouterr().err
