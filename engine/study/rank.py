"""`python -m engine.study rank --world N`: the first rank of a large layout, alone on this device.

It trains as it would among N ranks: the same model part, state, schedule, kernels and messages. The others are stood in
for by `engine.study.loopback`. So one GPU shows what a rank holds and how fast it can be at best, before N of them are
rented: others are not waited for, and messages begin at once.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch

from engine.config import rules
from engine.config.derived import padded_vocab, writes_checkpoints
from engine.config.enums import TpOverlap, Transport
from engine.config.hardware import resolve
from engine.config.launch_env import LaunchEnv
from engine.config.load import load
from engine.config.schema import Config
from engine.data.build.cache import RANDOM_SOURCE
from engine.errors import LaunchError
from engine.observe.log import say
from engine.plan import host
from engine.protocols import StepResult
from engine.study import loopback
from engine.study.loopback import Copies, Sent, Wire
from engine.train import exhausted, local, session
from engine.train.quiet import Quiet

DEFAULTS = [
    "data=random",
    "train.steps=9",
    "train.eval_batches=0",
    "checkpoint.save_final=false",
    "checkpoint.every=0",
    "logging.every=1",
    "logging.plot=false",
    "run.name=rank",
]
"""Overrides that come before the user's."""
WARMUP_STEPS = 3
REACHED = 0.35
"""What NCCL reaches of `hardware.link_gb_s`, which counts both directions: 8.0 GB from one H200 to another in 25.8 ms,
both ways at once, are 69 % of one direction."""


def main(argv: Sequence[str]) -> int:
    """Run `train.steps` steps; always 0.

    Raises:
        LaunchError: 527 what needs the other ranks, or no step after the warm-up; 528 the link's rate is not known; 591
            memory ran out.
    """
    options, overrides = _parser().parse_known_args(argv)
    cfg, world = with_own_tokens(load([*DEFAULTS, *overrides])), options.world
    rules.require(cfg, world)
    _require_alone(cfg)
    host.require(cfg, world, 1)
    messages = Messages()

    def join(env: LaunchEnv, device: torch.device, timeout_s: float) -> None:
        wire, messages.link_gb_s = _wire(cfg, device, options.link_gb_s)
        loopback.join(env.world_size, wire)

    try:
        summary = session.run(cfg, replace(local.alone(), world_size=world), join=join, hooks=[messages])
    except Exception as error:
        refusal = exhausted.explained(error, cfg, 0, world)
        if refusal is None:
            raise
        raise refusal from error
    for line in _report(summary, messages, world, cfg):
        say(line)
    return 0


class Messages(Quiet):
    """Times of steps, and the messages of each. Reads the loss, which waits for the device.

    Attributes:
        step_s: seconds of each step.
        infinite: measured steps whose gradients were infinite or not a number.
        of_step: the messages of the last one, by kind.
        link_gb_s: rate of messages in one direction; None: they are copies.
    """

    def __init__(self) -> None:
        self.step_s: list[float] = []
        self.infinite = 0
        self._norms: list[torch.Tensor] = []
        self.of_step: dict[str, Sent] = {}
        self.link_gb_s: float | None = None

    def before_training(self) -> None:
        self._since, self._before = time.perf_counter(), copy.deepcopy(loopback.sent)

    def after_step(self, step: int, result: StepResult, lr: float, data_wait_s: float) -> None:
        float(result.loss)
        now = time.perf_counter()
        self.step_s.append(now - self._since)
        self.of_step = {
            kind: Sent(all.count - self._before[kind].count, all.bytes - self._before[kind].bytes)
            for kind, all in loopback.sent.items()
            if all.count > self._before[kind].count
        }
        # Read after the last step, as that waits for the device. Copied, as a recorded graph writes to the same place.
        self._norms.append(result.grad_norm.clone())
        self._since, self._before = now, copy.deepcopy(loopback.sent)

    def after_training(self, summary: dict[str, Any]) -> None:
        summary["median_step_s"] = median(self.step_s[WARMUP_STEPS:])
        self.infinite = sum(not math.isfinite(norm) for norm in torch.stack(self._norms).tolist()[WARMUP_STEPS:])
        summary["link_gb_s"] = self.link_gb_s
        summary["steps_with_infinite_gradients"] = self.infinite
        summary["messages"] = {kind: asdict(sent) for kind, sent in self.of_step.items()}


def with_own_tokens(cfg: Config) -> Config:
    """`cfg`, changed: random tokens are of the first rank's part of the vocabulary alone.

    Others would be zero, as nobody adds them, and gradients infinite, as norms divide by the length of what they get.
    """
    if cfg.data.source == RANDOM_SOURCE:
        tp = cfg.parallel.tp
        cfg.data.vocab_size = min(cfg.data.vocab_size, padded_vocab(cfg.model, tp) // tp)
    return cfg


def _report(summary: dict[str, Any], messages: Messages, world: int, cfg: Config) -> list[str]:
    counted, step_s = messages.step_s[WARMUP_STEPS:], summary["median_step_s"]
    spread = f"{1e3 * min(counted):.1f} to {1e3 * max(counted):.1f} ms"
    first = f"one rank of {world}: {1e3 * step_s:.1f} ms a step, median of {len(counted)} ({spread})"
    if "tokens" in summary:
        first += f"; {summary['tokens'] / cfg.train.steps / world / step_s:,.0f} tok/s of each rank"
    if "peak_memory_gib" in summary:
        first += f"; {summary['peak_memory_gib']:.1f} GiB"
    kinds = [f"{kind} {sent.count}, {_size(sent.bytes)}" for kind, sent in sorted(messages.of_step.items())]
    lines = [
        first,
        f"its messages in a step: {'; '.join(kinds)}",
        "it waited for nobody: slower ranks and the bubble of a pipeline come on top. Losses mean nothing",
    ]
    if messages.infinite:
        lines.append(
            f"gradients of {messages.infinite} measured steps were not finite, so that their optimizer had less to do "
            "and products took less power: such times are too short"
        )
    return lines


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _wire(cfg: Config, device: torch.device, asked_gb_s: float | None) -> tuple[Wire, float | None]:
    """What messages on `device` take, and its rate.

    Raises:
        LaunchError: 528 no preset says, and `asked_gb_s` is None.
    """
    if device.type != "cuda":
        return Copies(), None
    torch.cuda.set_device(device)
    name = torch.cuda.get_device_name(device)
    known = resolve(cfg.hardware, name).link_gb_s
    if asked_gb_s is None and known is None:
        rule = f"how fast {name} sends to others is not known"
        raise LaunchError.of(528, "hardware.link_gb_s", None, rule, "Give --link-gb-s, GB/s of one direction")
    from engine_kernels.triton.link import Link

    wanted = asked_gb_s if asked_gb_s is not None else REACHED * float(known or 0)
    link = Link(wanted * 1e9)
    rate = link.measured(device) / 1e9
    say(f"messages at {rate:.0f} GB/s of one direction, for {wanted:.0f}")
    return link, rate


def _require_alone(cfg: Config) -> None:
    """Refuse what needs the other ranks."""
    if cfg.train.steps <= WARMUP_STEPS:
        rule = f"the first {WARMUP_STEPS} steps are warm-up and not measured"
        raise LaunchError.of(527, "train.steps", cfg.train.steps, rule, f"Use train.steps={WARMUP_STEPS + 1} or more")
    for option, keeps in (
        ("run.resume", cfg.run.resume),
        ("checkpoint.save_final", cfg.checkpoint.save_final),
        ("checkpoint.every", writes_checkpoints(cfg)),
    ):
        if keeps:
            rule = "the weights of one rank alone are those of no training"
            value, off = (cfg.checkpoint.every, "0") if option == "checkpoint.every" else (True, "false")
            raise LaunchError.of(527, option, value, rule, f"Use {option}={off}; python -m engine.train trains")
    for option, way, mapped in (
        ("zero.gather", cfg.zero.gather, Transport.copy_engine),
        ("parallel.tp_overlap", cfg.parallel.tp_overlap, TpOverlap.symmetric),
        ("parallel.pipeline_transport", cfg.parallel.pipeline_transport, Transport.copy_engine),
    ):
        if way is mapped:
            rule = "copy engines read the memory of other ranks, and there are none"
            raise LaunchError.of(527, option, way, rule, f"Use {option}=auto, whose messages are stood in for")


def _world(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 1; one rank is python -m engine.train")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e5:
        raise argparse.ArgumentTypeError(f"{text} is not a number of GB/s above 0")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine.study rank",
        description="Train for a few steps as the first of N ranks, alone on this device, with messages that go to "
        "nobody in the time they would take: what a rank holds, and how fast it is where none is waited for. Other "
        "arguments are overrides of the configuration, such as model=llama_8b parallel.tp=8 zero=z1.",
    )
    parser.add_argument("--world", type=_world, required=True, metavar="N", help="ranks of the layout")
    parser.add_argument(
        "--link-gb-s",
        type=_rate,
        metavar="GB/S",
        help="rate of messages in one direction (default: 0.35 of hardware.link_gb_s; GPUs alone, on a CPU they are "
        "copies)",
    )
    return parser
