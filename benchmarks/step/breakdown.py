"""Where the time of a profiled step goes, from a chrome trace of torch.profiler."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

GAPS = "host gaps"
COMMUNICATION = "exposed communication"
COPIES = "copies"
PARTS = ("GEMM", "attention", "other kernels", COMMUNICATION, "optimizer", COPIES, GAPS)
"""What a step is divided into."""
_ORDER = ("GEMM", "attention", "optimizer", "other kernels", COMMUNICATION, COPIES)
"""Of work that runs at the same time the first is counted."""
_PATTERNS = (
    (COMMUNICATION, r"nccl|^_link_(gather|reduce|scale)|symm_mem|one_shot_all|two_shot_all|multimem"),
    # Inductor names a kernel after all the operations in it, and a template after what it computes.
    ("attention", r"^triton_tem_.*attention"),
    ("GEMM", r"^triton_tem_.*mm"),
    ("other kernels", r"^triton_(poi|red|per|for|spl|mix)"),
    ("attention", r"flash|fmha|attention|cudnn_generated|sdpa|^(forward|keys|queries|delta|document_bounds)_kernel"),
    ("optimizer", r"adam|lamb(?!da)|multi_tensor|squared_norm|clip_factor"),
    ("GEMM", r"gemm|gemv|cutlass|nvjet|xmma|splitk|cublas|_mm_"),
    (COPIES, r"copy|memcpy|fill|catarray|memset"),
)
"""Class of a kernel by its name, lower case; the first pattern that matches decides."""
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST = ("cpu_op", "cuda_runtime", "cuda_driver", "user_annotation")


class NoDeviceEvents(ValueError):
    """A trace without work of a GPU."""


@dataclass(frozen=True, slots=True)
class Trace:
    """The events of a chrome trace that have a duration, those of the device in the order of their beginnings."""

    host: list[dict[str, Any]]
    device: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Trace:
        """From `trace.json` of `engine.train.hooks.Profile`.

        Raises:
            NoDeviceEvents: as from a CPU.
        """
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
        device = sorted((event for event in events if event.get("cat") in _DEVICE), key=itemgetter("ts"))
        if not device:
            raise NoDeviceEvents("the trace has no work of a GPU in it")
        return cls([event for event in events if event.get("cat") in _HOST], device)


def breakdown(trace: Trace, steps: int) -> dict[str, float]:
    """Milliseconds of a step of rank 0 by `PARTS`; they add up to the profiled step.

    Each moment counts once: as the work that runs in it, as exposed communication where no other kernel runs, as a copy
    where nothing but copies does, and as a host gap where the device has nothing to do. The profiled window begins with
    the first call of the host and ends with the last event; the profiler itself makes gaps longer.

    Args:
        steps: steps in the profiled window.
    """
    window = [*trace.host, *trace.device]
    start, end = min(event["ts"] for event in window), max(event["ts"] + event["dur"] for event in window)
    totals = dict.fromkeys(PARTS, 0.0)
    for name, seconds in _moments(
        [(event["ts"], event["ts"] + event["dur"], kind_of(event)) for event in trace.device]
    ):
        totals[name] += seconds
    totals[GAPS] = (end - start) - sum(totals.values())
    return {name: value / 1e3 / steps for name, value in totals.items()}


def longest_gaps(trace: Trace, count: int = 8) -> list[dict[str, Any]]:
    """The longest stretches, in milliseconds, between two pieces of work in which the device had nothing to do.

    `after` and `before` name the work around one. `host` says what the host did meanwhile: calls into CUDA and
    operators by the time that they shared with it, at most three.
    """
    found, last = [], trace.device[0]
    for event in trace.device[1:]:
        if event["ts"] > last["ts"] + last["dur"]:
            found.append((last["ts"] + last["dur"], event["ts"], last["name"], event["name"]))
        last = max(last, event, key=lambda one: one["ts"] + one["dur"])
    found.sort(key=lambda gap: gap[0] - gap[1])
    return [
        {"ms": (end - start) / 1e3, "after": after, "before": before, "host": _during(trace.host, start, end)}
        for start, end, after, before in found[:count]
    ]


def largest_kernels(trace: Trace, steps: int, count: int = 40) -> list[dict[str, Any]]:
    """Kernels and copies by name, those that took longest first: milliseconds and launches of a step of rank 0.

    Work that runs beside other work counts in full here.
    """
    spent: dict[tuple[str, str], list[float]] = {}
    for event in trace.device:
        spent.setdefault((kind_of(event), event["name"]), []).append(event["dur"] / 1e3)
    largest = sorted(spent.items(), key=lambda entry: -sum(entry[1]))[:count]
    return [
        {"part": part, "name": name[:200], "ms": sum(ms) / steps, "launches": len(ms) / steps}
        for (part, name), ms in largest
    ]


def _during(host: Sequence[dict[str, Any]], start: float, end: float) -> list[str]:
    shares: dict[str, float] = {}
    for event in host:
        shared = min(end, event["ts"] + event["dur"]) - max(start, event["ts"])
        if shared > 0:
            shares[event["name"]] = shares.get(event["name"], 0.0) + shared
    return [f"{name} {shares[name] / 1e3:.2f} ms" for name in sorted(shares, key=shares.__getitem__, reverse=True)[:3]]


def kind_of(event: dict[str, Any]) -> str:
    """One of `PARTS` for an event of the device."""
    if event["cat"] != "kernel":
        return COPIES
    name = event["name"].lower()
    return next((kind for kind, pattern in _PATTERNS if re.search(pattern, name)), "other kernels")


def _moments(spans: Sequence[tuple[float, float, str]]) -> Iterator[tuple[str, float]]:
    """Stretches of time in which the same work runs, each under the first of `_ORDER` that does; gaps left out."""
    borders = sorted([(begin, 1, kind) for begin, _, kind in spans] + [(stop, -1, kind) for _, stop, kind in spans])
    running = dict.fromkeys(_ORDER, 0)
    before = borders[0][0]
    for at, change, kind in borders:
        if at > before and (name := next((kind for kind in _ORDER if running[kind]), None)):
            yield name, at - before
        running[kind] += change
        before = at
