"""`python -m engine.tune lr_range [overrides]`: the learning-rate range test (Smith, arXiv 1506.01186, section 3.3).

The rate rises by the same factor after each of `train.steps` steps. Where the loss falls fastest over the logarithm of
the rate is a good rate, and where it is lowest is already too much.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence

import numpy as np

from engine.config import rules
from engine.config.load import load
from engine.config.schema import Config
from engine.data import prepare
from engine.dist.init import resolve_device_type
from engine.dist.spawn import run_ranks
from engine.errors import LaunchError
from engine.observe.folder import open_run_folder
from engine.observe.log import quiet_libraries, say
from engine.observe.plot import smooth
from engine.study.run import PRELOAD
from engine.train.local import world_size
from engine.train.loop import global_batch
from engine.train.loop import load as read_ahead
from engine.tune.pictures import range_test

DEFAULTS = ["train.steps=100", "run.name=lr_range", "checkpoint.every=0"]
"""Overrides that come before the user's."""
FEWEST_STEPS = 10
TIMEOUT_S = 3600.0


def main(argv: Sequence[str]) -> int:
    """Run the test, write lr_range.png and lr_range.json into the run folder, print a suggestion; 0, or 1 without one.

    Raises:
        LaunchError: 587 no range, or too few steps; else as `rules.require` and `open_run_folder` do.
    """
    parser = argparse.ArgumentParser(prog="python -m engine.tune lr_range", description=__doc__)
    parser.add_argument("--low", type=float, default=1e-6, help="first learning rate (default 1e-6)")
    parser.add_argument("--high", type=float, default=1.0, help="last learning rate (default 1)")
    options, overrides = parser.parse_known_args(argv)
    cfg = load([*DEFAULTS, *overrides])
    require_range(options.low, options.high, cfg.train.steps)
    world = world_size(cfg)
    rules.require(cfg, world)
    quiet_libraries(cfg.logging.verbose)
    prepare(cfg.data, say)
    folder = open_run_folder(cfg.run)
    rates = ramp(options.low, options.high, cfg.train.steps)
    backend = "nccl" if resolve_device_type(cfg.train.device) == "cuda" else "gloo"
    losses = run_ranks(losses_of, world, (cfg, rates), backend=backend, timeout_s=TIMEOUT_S, preload=PRELOAD)[0]
    smoothed = smooth(losses, span=len(losses) / 20)
    best = suggestion(rates, smoothed)
    found = {"low": options.low, "high": options.high, "suggested": best, "rates": rates, "losses": losses}
    (folder / "lr_range.json").write_text(json.dumps(found, indent=1) + "\n")
    if best is None:
        say(f"the loss never falls: start lower than --low {options.low:g}, or with more steps; rows in {folder}")
        return 1
    range_test(folder / "lr_range.png", rates, losses, smoothed, best)
    say(f"suggested: optim.lr={best:.2e}; picture and rows in {folder}")
    return 0


def require_range(low: float, high: float, steps: int) -> None:
    """Refuse what is no test (587)."""
    if not 0 < low < high:
        raise LaunchError.of(587, "--low", low, f"the rate rises from it to --high {high:g}", "Use --low 1e-6 --high 1")
    if steps < FEWEST_STEPS:
        rule = f"a curve needs at least {FEWEST_STEPS} steps"
        raise LaunchError.of(587, "train.steps", steps, rule, "Use train.steps=100")


def ramp(low: float, high: float, steps: int) -> list[float]:
    """`steps` rates from `low` to `high`, with equal ratios between neighbours."""
    return [low * (high / low) ** (step / (steps - 1)) for step in range(steps)]


def suggestion(rates: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """The rate, below that of the lowest smoothed loss, at which it falls fastest over log(rate); None: nowhere."""
    finite = next((end for end, loss in enumerate(smoothed) if not math.isfinite(loss)), len(smoothed))
    lowest = int(np.argmin(smoothed[:finite])) if finite else 0
    if lowest < 1:
        return None
    slopes = np.gradient(np.asarray(smoothed[: lowest + 1]), np.log(rates[: lowest + 1]))
    return float(rates[int(np.argmin(slopes))])


def losses_of(cfg: Config, rates: Sequence[float]) -> list[float]:
    """Body of one rank: the training loss before each step of a rate, nats per target. Equal on all ranks."""
    from engine.train.session import open_rank

    engine, train = open_rank(cfg)
    size = global_batch(cfg, engine.ctx)
    with read_ahead(train, range(0, size * len(rates), size), cfg, engine.ctx) as batches:
        return [float(engine.train_step(next(batches), rate).loss) for rate in rates]
