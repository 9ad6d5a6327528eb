"""One case: its systems in turn, their rows, and the fp32 loss that theirs are held against."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.kernels.sheet import Sheet
from benchmarks.step import systems
from benchmarks.step.breakdown import NoDeviceEvents, Trace, breakdown, largest_kernels, longest_gaps
from benchmarks.step.cases import Case
from benchmarks.step.figures import facts, samples_of
from benchmarks.step.systems import ONE_RANK, REFERENCE, Place, Record
from benchmarks.step.words import Words
from engine.config.load import config_hash, load
from engine.config.schema import Config
from engine.plan.costs import flops_per_token

SUITE = "step"
_FP32_FLOPS = {False: 45e12, True: 300e12}
"""Speed to expect of a large model in fp32 on an H200, without and with TF32: the reference is not begun in vain."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Seconds of the whole call."""

    seconds: float
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.start + self.seconds - time.monotonic()

    @property
    def over(self) -> str:
        """What a row says of a system that was not begun."""
        return f"not begun: the budget of {self.seconds:.0f} s was over"


@dataclass
class Contest:
    """The rounds of one case."""

    case: Case
    words: Words
    sheet: Sheet
    budget: Budget
    call: str
    """Names the call: figures of one call are compared with each other."""
    _records: dict[str, list[Record]] = field(default_factory=dict)
    _failed: set[str] = field(default_factory=set)
    _took: dict[str, float] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where processes write."""
        return self.sheet.path.parent

    def run(self, names: Sequence[str], rounds: int) -> None:
        """`rounds` rounds of the systems `names`, every other one in the opposite order, and the reference.

        The reference runs once, if a system that has losses did or if it is named.
        """
        print(f"{self.case.name}, {self.case.gpus} ranks", flush=True)
        timed = [name for name in names if name != REFERENCE]
        for turn in range(rounds):
            for name in timed if turn % 2 == 0 else reversed(timed):
                if name not in self._failed:
                    self._measure(name, turn)
        if self.case.reference_step and (set(self._records) - {ONE_RANK} or REFERENCE in names):
            self._reference()

    def _measure(self, name: str, turn: int) -> None:
        why = self._cannot(name)
        if why is None:
            case = self.case
            counted, profiled = case.warmup + case.measured, case.profiled if turn == 0 else 0
            words = [*systems.overrides_of(name, self.words), f"train.steps={counted + profiled}"]
            if profiled:
                words += [f"profile.start={counted}", f"profile.steps={profiled}"]
            why = self._keep(name, words, profiled)
        if why is None:
            return
        self._failed.add(name)
        if name in self._records:
            print(f"  {name}: no round {turn + 1}: {why}", flush=True)
        else:
            self._unavailable(name, why)

    def _keep(self, name: str, words: list[str], profiled: int) -> str | None:
        """Run a system once and write its row; why there is none."""
        start = time.monotonic()
        place = Place(self.folder, self.budget.left)
        record = systems.measure(name, self.case, words, place, profile=profiled > 0)
        self._took[name] = time.monotonic() - start
        if isinstance(record, str):
            return record
        self._records.setdefault(name, []).append(record)
        self._row(name, load([*words, f"run.name={self.case.name}"]))
        if profiled:
            self._breakdown(name, profiled)
        return None

    def _cannot(self, name: str) -> str | None:
        """Why a process of `name` is not begun."""
        if why := systems.missing(name):
            return why
        if name == ONE_RANK and self.case.gpus == 1:
            return "the case has one rank"
        gpus, needed = systems.visible_gpus(), systems.gpus_of(name, self.case)
        if gpus is not None and len(gpus) < needed:
            return f"needs {needed} GPUs, and {len(gpus)} are visible"
        # The last one of this system says how long it takes.
        return self.budget.over if self.budget.left <= self._took.get(name, 0.0) else None

    def _unavailable(self, name: str, why: str) -> None:
        self.sheet.unavailable(self.case.name, name, why, suite=SUITE, gpus=self.case.gpus, call=self.call)

    def _row(self, name: str, cfg: Config) -> None:
        case, records = self.case, self._records[name]
        seconds = [value for record in records for value in record.step_s[case.warmup : case.warmup + case.measured]]
        found = facts(cfg, case.gpus, median(seconds), self._hardware)
        losses = records[0].losses
        steps = sorted({1, self._reference_step, case.warmup + case.measured})
        peaks = [record.peak_memory_gib for record in records if record.peak_memory_gib is not None]
        row = self.sheet.add(
            case.name,
            name,
            "step",
            "s",
            seconds,
            suite=SUITE,
            call=self.call,
            rounds=len(records),
            warmup=case.warmup,
            peak_memory_gib=max(peaks, default=None),
            # A rank alone has none that mean anything.
            losses={} if name == ONE_RANK else {str(step): losses[step - 1] for step in steps},
            config_hash=config_hash(cfg),
            command=records[0].command,
            **found,
        )
        print(_line(row) + f", {self._took[name]:.0f} s in all", flush=True)

    def _breakdown(self, name: str, profiled: int) -> None:
        path = systems.trace_of(name, self.case, self.folder)
        row: dict[str, Any] = {"suite": SUITE, "gpus": self.case.gpus, "call": self.call}
        try:
            trace = Trace.read(path)
            row["parts"] = breakdown(trace, profiled)
            row |= {"longest_gaps": longest_gaps(trace), "kernels": largest_kernels(trace, profiled)}
        except NoDeviceEvents as error:
            row |= {"parts": {}, "note": str(error)}
        finally:
            shutil.rmtree(path.parent, ignore_errors=True)
        self.sheet.add(self.case.name, name, "breakdown", "ms", [sum(row["parts"].values())], **row)

    def _reference(self) -> None:
        step = self._reference_step
        words = [*self.words.reference, f"train.steps={step}"]
        cfg = load([*words, f"run.name={self.case.name}"])
        if torch.cuda.is_available():
            tokens = samples_of(cfg) * cfg.data.seq_len * step
            expected = tokens * flops_per_token(cfg.model, cfg.data.seq_len)[1] / _FP32_FLOPS[cfg.precision.tf32]
            if expected > self.budget.left:
                self._unavailable(
                    REFERENCE, f"not begun: {expected:.0f} s by arithmetic, {self.budget.left:.0f} s left"
                )
                return
        if self.budget.left <= 0:
            self._unavailable(REFERENCE, self.budget.over)
            return
        start = time.monotonic()
        record = systems.measure(REFERENCE, self.case, words, Place(self.folder, self.budget.left))
        if isinstance(record, str):
            self._unavailable(REFERENCE, record)
            return
        loss = record.losses[-1]
        products = "TF32" if cfg.precision.tf32 else "fp32"
        self.sheet.add(
            self.case.name,
            REFERENCE,
            "loss",
            "nats",
            [loss],
            suite=SUITE,
            gpus=self.case.gpus,
            call=self.call,
            step=step,
            products=products,
            command=record.command,
        )
        print(f"  {REFERENCE}: {loss:.5f} at step {step}, {time.monotonic() - start:.0f} s in all", flush=True)

    @property
    def _reference_step(self) -> int:
        return min(self.case.reference_step or 1, self.case.warmup + self.case.measured)

    @property
    def _hardware(self) -> str:
        return torch.cuda.get_device_name(self.sheet.device) if self.sheet.device.type == "cuda" else "CPU"


def _line(row: dict[str, Any]) -> str:
    mfu = f", C {row['mfu_c']:.1%} F {row['mfu_f']:.1%}" if row["mfu_c"] is not None else ""
    peak = f", {row['peak_memory_gib']:.1f} GiB" if row["peak_memory_gib"] is not None else ""
    rate = f"{row['tokens_per_s_per_gpu']:,.0f} tok/s per rank"
    return f"  {row['system']}: {row['p50'] * 1e3:.1f} ms, {rate}{mfu}{peak}"
