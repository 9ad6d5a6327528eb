"""What happens around the steps: metrics, validation, profile, weights, plot, summary."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from engine.config.derived import writes_checkpoints
from engine.config.enums import WandbMode
from engine.config.load import config_hash, to_dict
from engine.config.schema import Config
from engine.data import Data
from engine.observe.flops import mfu, peak_flops
from engine.observe.folder import METRICS_FILE
from engine.observe.log import say, warn
from engine.observe.plot import plot_losses
from engine.observe.progress import Progress
from engine.observe.sinks import Fanout, JsonlSink, MetricSink, WandbSink
from engine.observe.throughput import StepTimer
from engine.parallel.symmetric import peak_bytes
from engine.plan.costs import flops_per_token
from engine.protocols import Engine, StepResult
from engine.train.checkpoints import Checkpoints, Facts, Weights
from engine.train.loop import Cursor, Hook, global_batch, load
from engine.train.quiet import Quiet
from engine.train.stop import StopSignal


class Metrics(Quiet):
    """Rank 0's metrics and progress. Reads the loss, which waits for the device, only every `logging.every` steps.

    Tokens are positions, padding included. They and the speed are said where each sample has data.seq_len of them:
    with data.variable_length nobody counts them.
    `step_s` is the mean time of the steps since the line before, validation left out, and `data_wait_s` the part of it
    that rank 0 waited for its batch; `data_wait_share` in the summary is that part over the whole run.
    """

    def __init__(
        self, cfg: Config, world_size: int, sink: MetricSink, tokens_per_step: int, device: torch.device
    ) -> None:
        self._cfg, self._world, self._sink, self._tokens, self._device = cfg, world_size, sink, tokens_per_step, device
        self._progress = Progress(cfg.train.steps, every=cfg.logging.every, enabled=cfg.logging.progress)
        self._timer = StepTimer()
        self._flops = flops_per_token(cfg.model, cfg.data.seq_len)
        self._peak = None
        if device.type == "cuda":
            self._peak = peak_flops(torch.cuda.get_device_name(device), cfg.hardware)
        self._since, self._steps_since, self.excluded_s = 0.0, 0, 0.0
        self._waited_s, self._all_waited_s, self._all_steps_s = 0.0, 0.0, 0.0
        self._last: dict[str, float] = {}

    def before_training(self) -> None:
        self._since = time.perf_counter()

    def after_step(self, step: int, result: StepResult, lr: float, data_wait_s: float) -> None:
        self._steps_since += 1
        self._waited_s += data_wait_s
        if step % self._cfg.logging.every and step != self._cfg.train.steps:
            return
        # Read together: each reading waits for the device.
        loss, grad_norm = torch.stack([result.loss, result.grad_norm.to(result.loss)]).tolist()
        metrics = {"loss": loss, "grad_norm": grad_norm, "lr": lr}
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            warn(f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}: no update of the weights")
        now = time.perf_counter()
        spent_s = now - self._since - self.excluded_s
        step_s = spent_s / self._steps_since
        self._all_steps_s += spent_s
        self._all_waited_s += self._waited_s
        for _ in range(self._steps_since):
            self._timer.add(step_s, self._tokens)
        metrics |= {"step_s": step_s, "data_wait_s": self._waited_s / self._steps_since}
        if not self._cfg.data.variable_length:
            metrics |= {"tokens": float(step * self._tokens)} | self._speed()
        if self._device.type == "cuda":
            metrics["peak_memory_gib"] = peak_bytes(self._device) / 2**30
        self._sink.write(step, metrics)
        left = self._timer.time_left_s(self._cfg.train.steps - step)
        self._progress.update(step, metrics | ({} if left is None else {"time_left_s": left}))
        self._since, self._steps_since, self.excluded_s, self._waited_s, self._last = now, 0, 0.0, 0.0, metrics

    def _speed(self) -> dict[str, float]:
        tokens_per_s = self._timer.tokens_per_s() or 0.0
        speed = {"tokens_per_s": tokens_per_s}
        if self._peak is not None:
            causal, full = (mfu(tokens_per_s / self._world, flops, self._peak) for flops in self._flops)
            speed |= {"mfu": causal, "mfu_full": full}
        return speed

    def after_stop(self, step: int) -> None:
        self._progress.close()

    def after_training(self, summary: dict[str, Any]) -> None:
        self._progress.close()
        summary |= {"steps": self._cfg.train.steps, "config_hash": config_hash(self._cfg)}
        summary["data_wait_share"] = self._all_waited_s / self._all_steps_s if self._all_steps_s else 0.0
        summary |= {f"final_{name}" if name == "loss" else name: value for name, value in self._last.items()}


class Validation(Quiet):
    """Loss on held-out samples before the first step, every `train.eval_every` steps and at the end.

    Global batches weigh as many as their samples, inside of which each target weighs the same: where samples have
    unequal numbers of targets, this is not the mean over all targets.
    """

    def __init__(
        self, engine: Engine, data: Data, cfg: Config, sink: MetricSink, metrics: Metrics | None, start: int
    ) -> None:
        self._engine, self._data, self._cfg, self._sink, self._metrics = engine, data, cfg, sink, metrics
        self._start = start
        self._losses: list[float] = []

    def before_training(self) -> None:
        self._evaluate(self._start)

    def after_step(self, step: int, result: StepResult, lr: float, data_wait_s: float) -> None:
        every = self._cfg.train.eval_every
        if step == self._cfg.train.steps or (every and step % every == 0):
            self._evaluate(step)

    def _evaluate(self, step: int) -> None:
        cfg, ctx, valid = self._cfg, self._engine.ctx, self._data.valid
        assert valid is not None
        start = time.perf_counter()
        size = global_batch(cfg, ctx)
        count = min(cfg.train.eval_batches, valid.num_batches(size))
        firsts = range(0, count * size, size)
        total, samples = 0.0, 0
        with load(valid, firsts, cfg, ctx) as loader:
            for first, batches in zip(firsts, loader, strict=True):
                # The last batch may hold fewer samples than the others.
                held = min(size, valid.num_samples - first)
                total += float(self._engine.eval_step(batches)) * held
                samples += held
        loss = total / samples
        self._losses.append(loss)
        self._sink.write(step, {"val_loss": loss})
        say(f"step {step}: validation loss {loss:.4f}")
        if self._metrics is not None:
            self._metrics.excluded_s += time.perf_counter() - start

    def after_training(self, summary: dict[str, Any]) -> None:
        summary |= {"first_val_loss": self._losses[0], "final_val_loss": self._losses[-1]}


class Profile(Quiet):
    """torch.profiler over `profile.steps` steps of rank 0: a trace for chrome://tracing and a table of operators."""

    def __init__(self, cfg: Config, folder: Path) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._first, self._last = cfg.profile.start, cfg.profile.start + cfg.profile.steps
        self._folder = folder
        self._profiler = torch.profiler.profile(activities=activities)

    def before_training(self) -> None:
        if self._first == 0:
            self._profiler.start()

    def after_step(self, step: int, result: StepResult, lr: float, data_wait_s: float) -> None:
        if step in (self._first, self._last):
            float(result.loss)
        self.after_finished_step(step)

    def after_finished_step(self, step: int) -> None:
        """Start or stop after step number `step` (from 1), whose device work is done."""
        if step == self._first:
            self._profiler.start()
        if step == self._last:
            self._profiler.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self._folder / "trace.json"))
            key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = self._profiler.key_averages().table(sort_by=key, row_limit=60)
            (self._folder / "operators.txt").write_text(table)


class Results(Quiet):
    """Closes the sinks, draws the losses and writes `summary.json`. Rank 0."""

    def __init__(self, cfg: Config, folder: Path, sink: MetricSink) -> None:
        self._cfg, self._folder, self._sink = cfg, folder, sink

    def after_training(self, summary: dict[str, Any]) -> None:
        self._sink.close()
        if self._cfg.logging.plot:
            plot_losses(self._folder / METRICS_FILE, self._folder / "loss.png", self._cfg.run.name)
        (self._folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        say(f"results in {self._folder}/")

    def after_stop(self, step: int) -> None:
        self._sink.close()


def standard_hooks(
    engine: Engine, data: Data, cfg: Config, folder: Path, start: Cursor, stop: StopSignal
) -> list[Hook]:
    """The hooks of a training run, the same list on every rank but for those that only rank 0 needs."""
    main = engine.ctx.is_main
    facts = Facts(engine, cfg, data.fingerprint, start)
    sink = Fanout([])
    if main:
        sinks: list[MetricSink] = [JsonlSink(folder / METRICS_FILE), facts]
        if cfg.logging.wandb is not WandbMode.disabled:
            sinks.append(WandbSink(cfg.logging.wandb_project, cfg.run.name, folder, cfg.logging.wandb, to_dict(cfg)))
        sink = Fanout(sinks)
    tokens = global_batch(cfg, engine.ctx) * cfg.data.seq_len
    metrics = Metrics(cfg, engine.ctx.grid.world_size, sink, tokens, engine.ctx.device) if main else None
    hooks: list[Hook] = [metrics] if metrics is not None else []
    if cfg.train.eval_batches and data.valid is not None:
        hooks.append(Validation(engine, data, cfg, sink, metrics, start.step))
    if main and cfg.profile.steps:
        hooks.append(Profile(cfg, folder / "profile"))
    if writes_checkpoints(cfg):
        hooks.append(Checkpoints(engine, cfg, folder, facts, stop))
    if cfg.checkpoint.save_final:
        hooks.append(Weights(engine, cfg, folder, facts))
    if main:
        hooks.append(Results(cfg, folder, sink))
    return hooks
