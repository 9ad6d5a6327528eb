"""The hooks that save state and weights, and what brings a run back to where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.checkpoint.compare import unequal
from engine.checkpoint.initial import WEIGHTS
from engine.checkpoint.manifest import is_complete
from engine.checkpoint.mirror import Mirror
from engine.checkpoint.reader import Reader
from engine.checkpoint.restore import LOAD, candidates, require_same_tensors
from engine.checkpoint.retention import CHECKPOINTS, complete_steps, set_aside, step_folder, tidy
from engine.checkpoint.save import Saver
from engine.config.load import config_hash, to_dict
from engine.config.schema import Config
from engine.errors import CheckpointError
from engine.observe.environment import environment
from engine.observe.log import say, warn
from engine.observe.sinks import json_number
from engine.optim.state import WEIGHT
from engine.parallel.logical import LogicalTensor
from engine.protocols import Engine, StepResult
from engine.topology.grid import AXIS_ORDER
from engine.train.loop import Cursor, StopRequested, global_batch
from engine.train.quiet import Quiet
from engine.train.stop import StopSignal

RESUME = "run.resume"


class Facts:
    """What a checkpoint says of its run."""

    def __init__(self, engine: Engine, cfg: Config, fingerprint: str, start: Cursor) -> None:
        self.start, self._size = start, global_batch(cfg, engine.ctx)
        self._metrics: dict[int, dict[str, float | str]] = {}
        self._fixed = {
            "config": to_dict(cfg),
            "config_hash": config_hash(cfg),
            "grid": {axis: getattr(engine.ctx.grid, axis) for axis in AXIS_ORDER},
            "data": {"fingerprint": fingerprint},
            # Data, dropout and initial weights are functions of seeds and of the number of the sample: there is no
            # generator whose state could be lost.
            "seeds": {"train": cfg.train.seed, "data": cfg.data.seed},
            "environment": environment(),
        }

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `MetricSink`: what is measured after a step goes into its checkpoint."""
        self._metrics = {step: self._metrics.get(step, {})}
        self._metrics[step] |= {name: json_number(value) for name, value in metrics.items()}

    def close(self) -> None:
        """See `MetricSink`."""

    def after(self, step: int) -> dict[str, Any]:
        """The facts after `step` steps."""
        cursor = self.start.after(step, self._size)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return {
            "step": step,
            "samples": cursor.samples,
            "time": now,
            "metrics": self._metrics.get(step, {}),
            **self._fixed,
        }


class Checkpoints(Quiet):
    """The whole state every `checkpoint.every` steps and at the end, in the background.

    A checkpoint that cannot be written is a warning, and the next one is tried again: a full disk must not end a run
    that can still be saved. The last one is an error.
    """

    def __init__(self, engine: Engine, cfg: Config, folder: Path, facts: Facts, stop: StopSignal) -> None:
        self._cfg, self._folder, self._facts, self._stop = cfg, folder, facts, stop
        mirror = None if cfg.checkpoint.mirror is None else Mirror(cfg.checkpoint.mirror)
        self._saver = Saver(engine, asynchronous=cfg.checkpoint.asynchronous, also=mirror)
        self._main = engine.ctx.is_main
        self._stall_s, self._count = 0.0, 0
        self._trouble: CheckpointError | None = None

    def before_training(self) -> None:
        if self._main:
            for path in set_aside(self._folder / CHECKPOINTS, self._facts.start.step):
                say(f"{path} is of a later step than the run goes on from: set aside")
        if self._cfg.checkpoint.asynchronous:
            # Page-locked memory takes seconds to get: not while a step waits.
            self._saver.prepare()

    def after_step(self, step: int, result: StepResult, lr: float, data_wait_s: float) -> None:
        stop = self._stop.agreed()
        if self._saver.failed:
            self._settle()
        if not stop and step % self._cfg.checkpoint.every and step != self._cfg.train.steps:
            return
        started = time.perf_counter()
        self._settle()
        folder = step_folder(self._folder, step)
        try:
            self._saver.save(folder, self._facts.after(step), self._committed(step))
        except CheckpointError as error:
            self._trouble = error
        self._stall_s += time.perf_counter() - started
        self._count += 1
        if stop and step != self._cfg.train.steps:
            self._stop.announce(step)
            raise StopRequested(step)

    def after_stop(self, step: int) -> None:
        self.after_training({})

    def _settle(self) -> None:
        """Wait for the last save, and warn when there is no checkpoint of it."""
        try:
            self._saver.wait()
        except CheckpointError as error:
            self._trouble = error
        if self._trouble is not None:
            warn(f"no checkpoint; training goes on. {self._trouble}")
            self._trouble = None

    def _committed(self, step: int) -> Callable[[], None]:
        def done() -> None:
            say(f"step {step}: checkpoint in {step_folder(self._folder, step)}/")
            tidy(self._folder / CHECKPOINTS, self._cfg.checkpoint, warn)

        return done

    def after_training(self, summary: dict[str, Any]) -> None:
        summary |= {"checkpoints": self._count, "checkpoint_stall_s": self._stall_s}
        self._saver.close()
        if self._trouble is not None:
            raise self._trouble


class Weights(Quiet):
    """The final weights alone."""

    def __init__(self, engine: Engine, cfg: Config, folder: Path, facts: Facts) -> None:
        self._engine, self._cfg, self._folder, self._facts = engine, cfg, folder, facts

    def after_training(self, summary: dict[str, Any]) -> None:
        saver = Saver(self._engine, asynchronous=False, weights_only=True)
        saver.save(self._folder / WEIGHTS, self._facts.after(self._cfg.train.steps))
        saver.close()


def beginnings(cfg: Config) -> tuple[list[Path], str]:
    """The checkpoints to go on from, the first to try in front, and the option that names them; none: start anew.

    Raises:
        CheckpointError: 631 `checkpoint.load` names none, 642 the run to resume has ended without any.
    """
    run = Path(cfg.run.dir) / cfg.run.name
    found = complete_steps(run / CHECKPOINTS) if cfg.run.resume else []
    if found:
        return found, RESUME
    if cfg.run.resume and is_complete(run / WEIGHTS):
        rule = f"{run} has ended, with weights and without a checkpoint, so starting anew would replace them"
        way_out = "Take another run.name, and checkpoint.initial_weights to start from its weights"
        raise CheckpointError.of(642, RESUME, cfg.run.resume, rule, way_out)
    if cfg.checkpoint.load is not None:
        return candidates(Path(cfg.checkpoint.load)), LOAD
    return [], RESUME


def fetch_missing(cfg: Config) -> None:
    """Bring the newest checkpoint of the mirror here when the run is to be resumed and has none. Rank 0.

    Raises:
        CheckpointError: see `Mirror`.
    """
    folder = Path(cfg.run.dir) / cfg.run.name / CHECKPOINTS
    if not (cfg.run.resume and cfg.checkpoint.mirror) or complete_steps(folder):
        return
    mirror = Mirror(cfg.checkpoint.mirror)
    names = mirror.steps()
    for number, name in enumerate(names):
        try:
            mirror.fetch(name, folder, say)
            return
        except CheckpointError as error:
            if number + 1 == len(names):
                raise
            say(f"{error}\ngoing on with the one before, {names[number + 1]}")


def shapes_of(tensors: Mapping[str, LogicalTensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    return {name: logical.shape for name, logical in tensors.items()}


def require_fitting(
    reader: Reader, cfg: Config, fingerprint: str, shapes: dict[str, tuple[int, ...]], option: str
) -> None:
    """Refuse a checkpoint of another model or corpus, and one that has nothing left to train.

    Raises:
        CheckpointError: 638 and 639 see `require_same_tensors`, 640 the corpus is another, 641 no steps are left.
    """
    require_same_tensors(reader, WEIGHT, shapes, option)
    facts = reader.manifest.facts
    recorded = facts.get("data", {}).get("fingerprint")
    if recorded != fingerprint and not cfg.checkpoint.allow_changed_data:
        raise CheckpointError.of(
            640,
            option,
            reader.folder,
            f"it was trained on other data (fingerprint {recorded}; corpus, tokenizer and split of this run have "
            f"{fingerprint}), so its place in the data, sample {facts['samples']}, means nothing here",
            "Use the data options of the run that wrote it, or checkpoint.allow_changed_data=true",
        )
    done = reader.manifest.step
    # A run that was stopped after its last step has its weights to write yet.
    if done > cfg.train.steps or (done == cfg.train.steps and option == LOAD):
        raise CheckpointError.of(
            641,
            option,
            reader.folder,
            f"it has done {done} steps, and train.steps={cfg.train.steps}: there is nothing left to do",
            f"Use train.steps={done + 1} or more",
        )


def changed_options(reader: Reader, cfg: Config) -> Iterator[str]:
    """What the run is told of options that shape its course and are not those of the checkpoint."""
    before, now = reader.manifest.facts.get("config", {}), to_dict(cfg)
    found = [
        f"{section}.{name} {was} -> {value}"
        for section in ("optim", "train", "data", "precision")
        for name, was, value in unequal(before.get(section), now[section])
    ]
    if found:
        yield f"options that were others before: {', '.join(found)}"


def rewind(path: Path, step: int) -> None:
    """Drop the lines of a metrics file that come after `step`: the run does these steps again."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        # The half line of a run that was killed.
        return float("inf")
