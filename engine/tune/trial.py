"""`python -m engine.tune.trial FOLDER [overrides]`: a few real steps, to see whether they fit into a rank's memory.

One process of each rank, started by `engine.tune.micro_batch`. What it finds stands in FOLDER/<rank>.json.
"""

from __future__ import annotations

import os
import re
import resource
import sys
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from engine.config import launch_env, rules
from engine.config.hardware import resolve
from engine.config.load import load
from engine.config.schema import Config
from engine.data.storage.files import write_json
from engine.dist import init
from engine.errors import LaunchError
from engine.observe import log
from engine.optim.schedule import learning_rate
from engine.plan.fit import budget_bytes, size_of
from engine.plan.host import available_bytes
from engine.train import session
from engine.train.exhausted import asked, is_out_of_memory
from engine.train.loop import global_batch
from engine.train.loop import load as load_data

STEPS = 3
"""The first makes state and compiles, the second has all memory taken, the third must not have to give any back."""
EXHAUSTED = 3
"""Exit code of a rank that has run out of memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one rank has found."""

    fits: bool
    peak_bytes: int | None
    reason: str


def main(argv: list[str]) -> int:
    """Exit code: 0 the steps are done, 1 failed, 2 refused, 3 out of memory."""
    folder, cfg = Path(argv[0]), load(argv[1:])
    env = launch_env.read(os.environ)
    if env is None:
        rule = "it is a part of python -m engine.tune micro_batch, which starts it"
        raise LaunchError.of(594, "engine.tune.trial", "(command)", rule, "Run python -m engine.tune micro_batch")
    rules.require(cfg, env.world_size)
    code = 0
    try:
        outcome = steps(cfg, env)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        budget = rank_budget(cfg, env.local_world_size)
        allowed = "" if budget is None else f" (a rank may take {size_of(budget)})"
        outcome = Outcome(fits=False, peak_bytes=None, reason=asked(str(error)) + allowed)
        code = EXHAUSTED
    write_json(folder / f"{env.rank}.json", asdict(outcome))
    return code


def steps(cfg: Config, env: launch_env.LaunchEnv) -> Outcome:
    """`STEPS` steps of the run's own engine and samples, in what memory a rank may take."""
    log.configure(env.rank)
    device = init.local_device(init.resolve_device_type(cfg.train.device), env.local_rank)
    init.export(env)
    init.init_process_group(env, device, cfg.train.timeout_s)
    budget = _bounded(cfg, device, env.local_world_size)
    engine, split = session.open_rank(cfg, empty=True)
    size = global_batch(cfg, engine.ctx)
    retries = 0
    with load_data(split, range(0, STEPS * size, size), cfg, engine.ctx) as loader:
        for step, batches in enumerate(loader):
            before = _retries(device)
            # Reading the loss waits for the step.
            float(engine.train_step(batches, learning_rate(cfg.optim, 0, cfg.train.steps)).loss)
            retries = _retries(device) - before if step == STEPS - 1 else 0
    if device.type == "cuda":
        # Weights of the last step still arrive, from ranks that might end before.
        torch.cuda.synchronize(device)
    peak, reason = _peak(device), ""
    if budget is not None and peak > budget:
        reason = f"the peak {size_of(peak)} is above {size_of(budget)}"
    elif retries:
        reason = f"a step had to give memory back {retries} times to get on"
    return Outcome(fits=not reason, peak_bytes=peak, reason=reason)


def memory_bytes(cfg: Config, local_ranks: int) -> int | None:
    """Memory that a rank finds: its device's, or its share of what the host has free; None where nobody can see it."""
    if init.resolve_device_type(cfg.train.device) == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    free = available_bytes()
    return None if free is None else free // local_ranks


def rank_budget(cfg: Config, local_ranks: int) -> int | None:
    """What a rank may take, margin left out; None where neither the machine nor `hardware.memory_gib` says."""
    cuda = init.resolve_device_type(cfg.train.device) == "cuda"
    hardware = resolve(cfg.hardware, torch.cuda.get_device_name() if cuda else None)
    # A preset that is found by name may be of a smaller variant: the device knows its own memory.
    hardware = replace(hardware, memory_gib=cfg.hardware.memory_gib)
    memory = memory_bytes(cfg, local_ranks)
    if memory is None and hardware.memory_gib is None:
        return None
    return budget_bytes(hardware, memory if memory is not None else sys.maxsize)


def _bounded(cfg: Config, device: torch.device, local_ranks: int) -> int | None:
    """Hold this process to its budget, so that the allocation that passes it fails; the budget in bytes.

    On the CPU what is allocated counts, touched or not, as it does on a GPU.
    """
    budget = rank_budget(cfg, local_ranks)
    if budget is None:
        return None
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # CUDA's own share, and that of others on the device, is out of the allocator's hands.
        share = (budget - (total - free)) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)), device)
    else:
        status = _status()
        limit = status["VmData"] + max(0, budget - status["VmRSS"])
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return budget


def _peak(device: torch.device) -> int:
    """Most bytes that this process, and on a GPU whatever else is there, has taken."""
    if device.type == "cpu":
        return _status()["VmHWM"]
    free, total = torch.cuda.mem_get_info(device)
    beside = total - free - torch.cuda.memory_reserved(device)
    return int(torch.cuda.max_memory_reserved(device) + beside)


def _status() -> dict[str, int]:
    """Sizes of this process in bytes, by Linux's names; getrusage would count the parent's from before the exec."""
    rows = re.findall(r"^(Vm\w+):\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return {name: int(size) * 1024 for name, size in rows}


def _retries(device: torch.device) -> int:
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0)) if device.type == "cuda" else 0


if __name__ == "__main__":
    try:
        exit_code = main(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        exit_code = 1
    # The others may be inside a collective: leaving the process group would wait for them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
