"""The training loop. Everything beside the step itself is a hook."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import Any, Protocol

from engine.config.derived import sequence_multiple
from engine.config.schema import Config
from engine.data import Data, Split
from engine.data.loader import Loader
from engine.dist.context import ParallelContext
from engine.errors import EngineError
from engine.optim.schedule import learning_rate
from engine.plan.stages import chunk_owners, chunks
from engine.protocols import Engine, StepResult


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a run has come; the place in the data does not depend on the layout."""

    step: int = 0
    """Steps done."""
    samples: int = 0
    """Samples that all replicas together have read in them."""

    def after(self, step: int, size: int) -> Cursor:
        """The cursor after step number `step`, when the steps since this one read `size` samples each."""
        return Cursor(step, self.samples + (step - self.step) * size)


class StopRequested(Exception):
    """Training ends early, after step `step`, on every rank."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


class Hook(Protocol):
    """Called on every rank, in the order of the list, so that a hook may use collectives."""

    def before_training(self) -> None:
        """Before the first step."""

    def after_step(self, step: int, result: StepResult, lr: float, data_wait_s: float) -> None:
        """After step number `step` (from 1), for whose batch this rank has waited `data_wait_s`."""

    def after_training(self, summary: dict[str, Any]) -> None:
        """After the last step; may add to the summary."""

    def after_stop(self, step: int) -> None:
        """In place of `after_training`, when training ends early, after step `step`, to be resumed."""


def fit(
    engine: Engine,
    data: Data,
    cfg: Config,
    hooks: Sequence[Hook],
    start: Cursor = Cursor(),  # noqa: B008
) -> dict[str, Any]:
    """Train from `start` up to step `cfg.train.steps` and return the summary that the hooks filled.

    Raises:
        StopRequested: a hook has ended the training early.
    """
    size, steps = global_batch(cfg, engine.ctx), range(start.step, cfg.train.steps)
    firsts = range(start.samples, start.samples + size * len(steps), size)
    with load(data.train, firsts, cfg, engine.ctx) as loader:
        for hook in hooks:
            hook.before_training()
        for step, batches in zip(steps, loader, strict=True):
            lr = learning_rate(cfg.optim, step, cfg.train.steps)
            result = engine.train_step(batches, lr)
            try:
                for hook in hooks:
                    hook.after_step(step + 1, result, lr, loader.wait_s)
            except StopRequested as stop:
                _end(hooks, methodcaller("after_stop", stop.step))
                raise
    summary: dict[str, Any] = {}
    _end(hooks, methodcaller("after_training", summary))
    return summary


def _end(hooks: Sequence[Hook], end: Callable[[Hook], None]) -> None:
    """`end` of every hook. What one cannot write must not cost what the others have."""
    refused: list[EngineError] = []
    for hook in hooks:
        try:
            end(hook)
        except EngineError as error:
            refused.append(error)
    if refused:
        raise refused[0]


def global_batch(cfg: Config, ctx: ParallelContext) -> int:
    """Samples of a step, over all replicas."""
    return cfg.train.micro_batch * cfg.train.accum_steps * ctx.dp.size


def load(split: Split, firsts: Sequence[int], cfg: Config, ctx: ParallelContext) -> Loader:
    """What this rank reads of the global batches that begin with the samples `firsts`."""
    read = partial(
        split.micro_batches,
        dp_rank=ctx.dp.rank,
        dp=ctx.dp.size,
        micro_batch=cfg.train.micro_batch,
        accum_steps=cfg.train.accum_steps,
        multiple=sequence_multiple(cfg.parallel),
        read=reads_text(cfg, ctx.pp.rank),
    )
    return Loader(read, firsts, prefetch=cfg.data.prefetch, device=ctx.device)


def reads_text(cfg: Config, stage: int) -> bool:
    """Whether pipeline rank `stage` has a chunk that needs tokens, segments, labels or classes.

    Those are the embeddings of tokens and of segments, and the loss after the last chunk, which alone uses the count
    of targets: its ranks all know their labels. Blocks and position embeddings see lengths and documents only.
    """
    parts = chunks(cfg)
    reading = {index for index, names in enumerate(parts) if {"embed.tokens", "embed.rest"} & set(names)}
    reading.add(len(parts) - 1)
    return any(owner == stage and chunk in reading for chunk, owner in enumerate(chunk_owners(cfg)))
