"""Which checkpoints of a run stay."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint.commit import write_durably
from engine.checkpoint.manifest import COMPLETE, MANIFEST, is_complete
from engine.config.schema_checkpoint import CheckpointConfig

CHECKPOINTS = "checkpoints"
LATEST, ASIDE = "latest", ".set-aside"
_STEP = re.compile(r"step-(\d{8,})$")
_BEGUN = re.compile(r"step-(\d{8,})(\.partial|\.old)?$")


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps goes."""
    return run / CHECKPOINTS / f"step-{step:08d}"


def complete_steps(folder: Path) -> list[Path]:
    """The finished checkpoints in a folder of checkpoints, the newest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP.match(path.name))]
    return [path for _, path in sorted(found, reverse=True) if is_complete(path)]


@dataclass(frozen=True, slots=True)
class Kept:
    """A finished checkpoint, and what decides whether it stays."""

    folder: Path
    step: int
    loss: float
    """On held-out samples; infinite where none was measured."""


def superfluous(found: Sequence[Kept], cfg: CheckpointConfig) -> list[Path]:
    """The checkpoints that are neither among the last, nor multiples of `keep_every`, nor among the best."""
    newest = sorted(found, key=lambda kept: -kept.step)
    best = sorted((kept for kept in newest if math.isfinite(kept.loss)), key=lambda kept: kept.loss)
    stay = {kept.folder for kept in [*newest[: cfg.keep_last], *best[: cfg.keep_best]]}
    if cfg.keep_every:
        stay |= {kept.folder for kept in newest if kept.step % cfg.keep_every == 0}
    return [kept.folder for kept in reversed(newest) if kept.folder not in stay]


def tidy(folder: Path, cfg: CheckpointConfig, say: Callable[[str], None]) -> None:
    """Point `latest` to the newest checkpoint in `folder`, and remove those that need not stay. Rank 0.

    A checkpoint that cannot be read counts for nothing here and is left alone; what was begun and never finished up to
    the newest one goes. Trouble is said, never raised.
    """
    try:
        found = [kept for kept in map(_kept, complete_steps(folder)) if kept is not None]
        if found:
            write_durably(folder / f"{LATEST}.tmp", f"{found[0].folder.name}\n".encode())
            (folder / f"{LATEST}.tmp").replace(folder / LATEST)
        for path in superfluous(found, cfg):
            # Without its marker it is no checkpoint any more, however far the rest gets.
            (path / COMPLETE).unlink()
            shutil.rmtree(path)
        for path in remnants(folder):
            shutil.rmtree(path)
    except OSError as error:
        say(f"old checkpoints in {folder} could not be removed ({error})")


def remnants(folder: Path) -> list[Path]:
    """What saves and removals that were killed have left in a folder of checkpoints, up to its newest finished one.

    To be asked for between two saves.
    """
    newest = max((int(path.name.removeprefix("step-")) for path in complete_steps(folder)), default=0)
    found = [(path, match) for path in folder.iterdir() if (match := _BEGUN.match(path.name)) and path.is_dir()]
    return [path for path, match in found if int(match[1]) <= newest and (match[2] or not is_complete(path))]


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, which a run was not to go on from or could not: their steps come again.

    They would count for the newest, and those that are still to be written for superfluous.
    """
    later = [path for path in complete_steps(folder) if int(path.name.removeprefix("step-")) > step]
    for path in later:
        shutil.rmtree(path.with_name(path.name + ASIDE), ignore_errors=True)
        path.rename(path.with_name(path.name + ASIDE))
    return later


def _kept(folder: Path) -> Kept | None:
    try:
        raw = json.loads((folder / MANIFEST).read_bytes())
        whole = all((folder / file["name"]).stat().st_size == file["size"] for file in raw["files"])
        loss = raw.get("metrics", {}).get("val_loss")
        return Kept(folder, int(raw["step"]), math.inf if loss is None else float(loss)) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
