"""Rules for the optimizer's schedule, a run's folder and state, and DeepSpeed (308..313, 355, 380..382, 384)."""

from __future__ import annotations

import re
from pathlib import Path

from engine.config.deepspeed_keys import KNOWN, OWNED
from engine.config.derived import cooldown_steps, warmup_steps, writes_checkpoints
from engine.config.enums import Offload, OffloadStrategy, ScheduleName
from engine.config.schema import Config
from engine.errors import Violation, nearest


def optim_violations(cfg: Config) -> list[Violation]:
    """Warm-up ends in time (308), decay begins after it (309), and both leave room for each other (355)."""
    found = []
    steps, decay = cfg.train.steps, cfg.optim.decay_steps
    warmup = warmup_steps(cfg.optim, max(steps, 0))
    if warmup > steps > 0:  # No steps are refused themselves.
        found.append(
            Violation(
                code=308,
                option="optim.warmup_steps",
                value=warmup,
                rule=f"the warm-up is longer than the {steps} steps of train.steps",
                way_out=f"Use optim.warmup_steps={steps // 10}, or train.steps={warmup} or more",
            )
        )
    if decay is not None and decay <= warmup:
        found.append(
            Violation(
                code=309,
                option="optim.decay_steps",
                value=decay,
                rule=f"the decay would end before the warm-up does, at step {warmup} (optim.warmup_steps)",
                way_out=f"Use optim.decay_steps={max(steps, warmup + 1)}, or optim.decay_steps=null for train.steps",
            )
        )
    end = steps if decay is None else decay
    cooldown = cooldown_steps(cfg.optim, max(steps, 0))
    if cfg.optim.schedule is ScheduleName.wsd and warmup < end < warmup + cooldown:
        found.append(
            Violation(
                code=355,
                option="optim.cooldown_steps",
                value=cooldown,
                rule=f"warm-up {warmup} and cooldown {cooldown} are together longer than the {end} steps they share",
                way_out=f"Use optim.cooldown_steps={end - warmup}, or optim.warmup_steps={max(0, end - cooldown)}",
            )
        )
    return found


def run_violations(cfg: Config) -> list[Violation]:
    """A run's name is one folder (310); the profile lies inside the run (311)."""
    found = []
    name, start, length, steps = cfg.run.name, cfg.profile.start, cfg.profile.steps, cfg.train.steps
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or set(name) == {"."}:
        clean = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"
        rule = "names one folder: letters, digits, '.', '_' and '-'"
        found.append(Violation(code=310, option="run.name", value=name, rule=rule, way_out=f"Use run.name={clean}"))
    if length > 0 and start + length > steps > 0:
        fits = max(0, steps - length)
        rule = f"profiled steps {start} to {start + length - 1} reach past train.steps {steps}"
        way_out = f"Use profile.start={fits} profile.steps={min(length, steps)}, or train.steps={start + length}"
        found.append(Violation(code=311, option="profile.start", value=start, rule=rule, way_out=way_out))
    return found


def state_violations(cfg: Config) -> list[Violation]:
    """One beginning (380, 381) that stays (384); state that is saved or loaded is where Octant can reach it (382)."""
    found = []
    run, checkpoint, zero = cfg.run, cfg.checkpoint, cfg.zero
    if run.resume and run.overwrite:
        rule = "run.overwrite=true removes what it would go on from"
        way_out = "Use one of them"
        found.append(Violation(code=380, option="run.resume", value=run.resume, rule=rule, way_out=way_out))
    if checkpoint.load is not None and checkpoint.initial_weights is not None:
        rule = "checkpoint.initial_weights is set too, and a state has weights of its own"
        way_out = "Use checkpoint.load=null to start from the weights, or checkpoint.initial_weights=null to go on"
        found.append(Violation(code=381, option="checkpoint.load", value=checkpoint.load, rule=rule, way_out=way_out))
    own = Path(run.dir, run.name).absolute()
    for option in ("load", "initial_weights"):
        value = getattr(checkpoint, option)
        if run.overwrite and value is not None and own in (Path(value).absolute(), *Path(value).absolute().parents):
            rule = f"run.overwrite=true removes it: it lies in {run.dir}/{run.name}"
            way_out = f"Use another run.name, such as run.name={run.name}-2, without run.overwrite"
            found.append(Violation(code=384, option=f"checkpoint.{option}", value=value, rule=rule, way_out=way_out))
    where = {
        "zero.offload_optimizer": zero.offload_optimizer is Offload.nvme and zero.offload_optimizer,
        "zero.offload_params": zero.offload_params is Offload.nvme and zero.offload_params,
        "zero.offload_strategy": zero.offload_strategy in (OffloadStrategy.zenflow, OffloadStrategy.superoffload)
        and zero.offload_strategy,
    }
    away = [f"{option}={value}" for option, value in where.items() if value]
    asked = {
        "run.resume": run.resume,
        "checkpoint.load": checkpoint.load,
        "checkpoint.every": writes_checkpoints(cfg) and checkpoint.every,
    }
    for option, value in asked.items():
        if value and away:
            rule = f"{away[0]} keeps optimizer state where checkpoints cannot reach it"
            none = "checkpoint.every=0, or " if option == "checkpoint.every" else ""
            way_out = f"Use {none}plain offload to host memory (=cpu, zero.offload_strategy=plain)"
            found.append(Violation(code=382, option=option, value=value, rule=rule, way_out=way_out))
    return found


def extra_violations(cfg: Config) -> list[Violation]:
    """Keys that Octant sets (312), and keys that DeepSpeed would ignore (313)."""
    found = []
    for key, value in cfg.runtime.deepspeed_extra.items():
        option = f"runtime.deepspeed_extra.{key}"
        if key in OWNED:
            rule, way_out = "Octant sets this key of DeepSpeed itself", f"Use {OWNED[key]}"
            found.append(Violation(code=312, option=option, value=value, rule=rule, way_out=way_out))
        elif key not in KNOWN:
            rule = "DeepSpeed 0.19 has no such top-level key and would ignore it"
            way_out = nearest(str(key), KNOWN - OWNED.keys())
            found.append(Violation(code=313, option=option, value=value, rule=rule, way_out=way_out))
    return found
