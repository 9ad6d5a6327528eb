"""`train.micro_batch=auto`: the largest micro-batch that fits, by trials in processes of their own before the run."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from typing import Any

import torch

from engine.config import launch_env, rules
from engine.config.batch import AUTO
from engine.config.load import load, to_dict
from engine.config.schema import Config
from engine.data.storage.files import read_json
from engine.dist.init import resolve_device_type
from engine.errors import LaunchError
from engine.observe.folder import MICRO_BATCH_FILE, usable_run_folder
from engine.observe.log import say
from engine.plan import host
from engine.plan.fit import peak_bytes, size_of, sizes, ways, with_micro_batch
from engine.train import local, session
from engine.tune.largest import Attempt, search
from engine.tune.trial import rank_budget

GRACE_S = 2.0
"""Seconds that ranks of a trial live on when one has run out of memory: they wait for it in vain."""
_OPTION = "train.micro_batch"
_SECTIONS = ("model", "parallel", "zero", "precision", "kernels", "runtime", "hardware")
_NO_MATTER = ("micro_batch", "steps", "eval_every", "eval_batches", "seed", "cpu_threads", "timeout_s")
"""Options of `train` on which memory does not depend."""
_SAID_LINES = 15


def main(argv: Sequence[str]) -> int:
    """Find the micro-batch for the options `argv` and say it; exit code 0."""
    words = [*argv, f"{_OPTION}={AUTO}"]
    cfg = load(words)
    found = find(cfg, words, local.world_size(cfg))
    print(f"{_OPTION}={found['micro_batch']}")
    return 0


def settled(cfg: Config, argv: Sequence[str], world_size: int) -> list[str]:
    """`argv` with the number in place of `auto`: as found by the run that is resumed, if there is nothing else to find.

    Raises as `find` does.
    """
    usable_run_folder(cfg.run)
    path = Path(cfg.run.dir, cfg.run.name, MICRO_BATCH_FILE)
    found = read_json(path) if cfg.run.resume and path.is_file() else {}
    if found.get("options") == _options(cfg, world_size):
        say(f"{_OPTION}={AUTO}: {found['micro_batch']}, as {path} says")
    else:
        if found:
            say(f"{path} is of another model, layout or device: {_OPTION} is looked for anew")
        found = find(cfg, argv, world_size)
        os.environ[session.FOUND] = json.dumps(found, indent=1) + "\n"
    return [*argv, f"{_OPTION}={found['micro_batch']}"]


def find(cfg: Config, argv: Sequence[str], world_size: int) -> dict[str, Any]:
    """Search, and say what was found; the record that goes into the run folder.

    Raises:
        LaunchError: 592 a trial failed for another reason than memory, 593 not even the smallest fits, 595 under a
            launcher.
        EngineError: what training refuses with the smallest micro-batch.
        KeyboardInterrupt, SystemExit: a signal has ended a trial.
    """
    if launch_env.read(os.environ) is not None:
        rule = "a launcher has started this, and every one of its ranks would search"
        way_out = "Start it as python -m engine.tune micro_batch, and give the ranks the number that it finds"
        raise LaunchError.of(595, _OPTION, AUTO, rule, way_out)
    cpu = resolve_device_type(cfg.train.device) == "cpu"
    among = sizes(cfg, world_size, cpu=cpu)
    first = with_micro_batch(cfg, among[0] if among else 1)
    rules.require(first, world_size)
    host.require(first, world_size, world_size)
    session.prepare(first, torch.device("cpu" if cpu else "cuda"), verify=False)
    budget = rank_budget(cfg, world_size if cpu else 1)
    say(f"{_OPTION}={AUTO}: trying {', '.join(map(str, among))} in {_told(budget)} of each rank")
    made = search(
        among,
        lambda size: peak_bytes(_with(cfg, size, world_size), world_size),
        budget,
        lambda size: attempt(_with(cfg, size, world_size), argv, world_size),
    )
    fitting = [one for one in made if one.fits]
    if not fitting:
        raise _nothing_fits(first, world_size, made, budget)
    best = max(fitting, key=lambda one: one.size)
    above = [one for one in made if not one.fits]
    why = "the largest that may be tried"
    if above:
        least = min(above, key=lambda one: one.size)
        why = f"{least.size} does not fit: {least.reason}"
    seconds = sum(one.seconds for one in made)
    peak = f"peak {size_of(best.peak_bytes or 0)} of {_told(budget)}"
    say(f"{_OPTION}={best.size}: {peak}; {why}; {len(made)} trials, {seconds:.0f} s")
    return {
        "micro_batch": best.size,
        "why": why,
        "budget_bytes": budget,
        "sizes": among,
        "attempts": [asdict(one) for one in made],
        "options": _options(cfg, world_size),
    }


def attempt(cfg: Config, argv: Sequence[str], world_size: int) -> Attempt:
    """Train a few steps with the micro-batch of `cfg` in processes of their own. Raises as `find` does."""
    size, train = cfg.train.micro_batch, cfg.train
    # Gradients are held from the second micro-batch on; a pipeline holds the activations of as many as it likes.
    accum = min(train.accum_steps, 2) if cfg.parallel.pp == 1 else train.accum_steps
    words = [
        f"{_OPTION}={size}",
        f"train.accum_steps={accum}",
        "train.global_batch=null",
        # Padded to the longest sample that there may be.
        "data.variable_length=false",
        "checkpoint.load=null",
        "checkpoint.initial_weights=null",
    ]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="octant-trial-") as name:
        folder = Path(name)
        store, environments = local.places(world_size, cfg)
        with (folder / "log").open("wb") as log:
            command = [sys.executable, "-m", "engine.tune.trial", name, *argv, *words]
            code = local.supervise(command, environments, output=log, grace_s=GRACE_S)
        del store  # It has to outlive the ranks.
        found = [read_json(path) for path in sorted(folder.glob("*.json"))]
        said = (folder / "log").read_text(errors="replace").splitlines()[-_SAID_LINES:]
    if code == 128 + SIGINT:
        raise KeyboardInterrupt
    if code == 128 + SIGTERM:
        raise SystemExit(code)
    reasons = [outcome["reason"] for outcome in found if not outcome["fits"]]
    if code == 128 + SIGKILL and not reasons:
        reasons = ["a rank was killed, as Linux does where the host's memory is used up"]
    peaks = [outcome["peak_bytes"] for outcome in found]
    complete = len(found) == world_size and None not in peaks
    if not reasons and not (code == 0 and complete):
        rule = f"the trial of {size} failed, and not for want of memory: {' | '.join(said) or 'it said nothing'}"
        raise LaunchError.of(592, _OPTION, AUTO, rule, f"Use {_OPTION}={size} to see it fail as a run")
    result = Attempt(
        size=size,
        fits=not reasons,
        peak_bytes=max(peaks) if complete else None,
        reason=reasons[0] if reasons else "",
        seconds=time.perf_counter() - started,
    )
    told = f"fits, peak {size_of(result.peak_bytes or 0)}" if result.fits else result.reason
    say(f"  micro-batch {size}: {told} ({result.seconds:.0f} s)")
    return result


def _with(cfg: Config, size: int, world_size: int) -> Config:
    """A copy of `cfg` with this micro-batch and the accumulation that follows from it."""
    changed = with_micro_batch(cfg, size)
    rules.require(changed, world_size)
    return changed


def _nothing_fits(first: Config, world_size: int, made: Sequence[Attempt], budget: int | None) -> LaunchError:
    least = min(made, key=lambda one: one.size)
    rule = f"not even {least.size} fits into {_told(budget)} of a rank: {least.reason}"
    found = ways(first, world_size)
    way_out = f"Use {', or '.join(map(str, found[:4]))}" if found else "Use more ranks, or a smaller model"
    return LaunchError.of(593, _OPTION, AUTO, rule, way_out)


def _told(budget: int | None) -> str:
    return "unknown memory" if budget is None else f"{size_of(budget)} (margin left out)"


def _options(cfg: Config, world_size: int) -> dict[str, Any]:
    """What decides which micro-batch fits: a record with the same holds for this run too."""
    content = to_dict(cfg)
    cuda = resolve_device_type(cfg.train.device) == "cuda"
    # As it stands in the file.
    found: dict[str, Any] = json.loads(
        json.dumps(
            {section: content[section] for section in _SECTIONS}
            | {
                "train": {name: value for name, value in content["train"].items() if name not in _NO_MATTER},
                "optim": cfg.optim.name.name,
                "seq_len": cfg.data.seq_len,
                "world_size": world_size,
                "device": torch.cuda.get_device_name() if cuda else "cpu",
                "torch": torch.__version__,
            }
        )
    )
    return found
