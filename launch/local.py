"""`launch=local`: one script that trains on this machine, in the foreground."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from places import render

from engine.config.schema import Config
from engine.errors import Violation

SCRIPT = "local.sh"
"""Its command is the run itself: `submit.py` becomes it, so that signals reach it."""


def files(cfg: Config, words: list[str], folder: Path) -> dict[str, str]:
    """The script, by its name in `folder`. `words` are the overrides of training."""
    values = {
        "NAME": " ".join(cfg.run.name.split()),
        "CWD": shlex.quote(str(Path.cwd())),
        "PYTHON": shlex.quote(sys.executable),
        "WORDS": shlex.join(words),
    }
    return {SCRIPT: render(Path(__file__).with_name(SCRIPT), values)}


def command(cfg: Config, folder: Path) -> list[str]:
    """What starts the run."""
    return ["bash", str(folder / SCRIPT)]


def after(cfg: Config, folder: Path, said: str) -> list[str]:
    """How to follow, cancel and resume. `said` is not used: the run has not begun."""
    again = shlex.join(command(cfg, folder))
    return [
        f"follow:  tail -f {shlex.quote(str(folder.parent / 'metrics.jsonl'))}",
        "cancel:  Ctrl-C, or SIGTERM to this process: that saves first and ends with exit code 75",
        f"resume:  {again}",
    ]


def violations(cfg: Config) -> list[Violation]:
    """What this machine cannot do (530, 531)."""
    found, launch = [], cfg.launch
    if launch.nodes > 1:
        found.append(
            Violation(
                code=530,
                option="launch.nodes",
                value=launch.nodes,
                rule="launch=local starts ranks on this machine alone, which is 1 node",
                way_out="Use launch.nodes=1, launch=slurm or launch=kubernetes",
            )
        )
    gpus = launch.gpus_per_node or 0
    if gpus:
        import torch  # Two seconds that only this question needs.

        here = torch.cuda.device_count()
        if gpus > here:
            found.append(
                Violation(
                    code=531,
                    option="launch.gpus_per_node",
                    value=gpus,
                    rule=f"this machine shows {here} GPUs",
                    way_out=f"Use launch.gpus_per_node={here}{' for CPU ranks' if not here else ''}, or launch=slurm",
                )
            )
    return found
