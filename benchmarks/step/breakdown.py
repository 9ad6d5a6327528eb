"""Where the time of a profiled step goes, from a chrome trace of torch.profiler."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
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
    (COMMUNICATION, r"nccl|symm_mem|one_shot_all|two_shot_all|multimem"),
    # Inductor names a kernel after all the operations in it, and a template after what it computes.
    ("attention", r"^triton_tem_.*attention"),
    ("GEMM", r"^triton_tem_.*mm"),
    ("other kernels", r"^triton_(poi|red|per|for|spl|mix)"),
    ("attention", r"flash|fmha|attention|cudnn_generated|sdpa|^(forward|keys|queries|delta|document_bounds)_kernel"),
    ("optimizer", r"adam|lamb|multi_tensor|squared_norm|clip_factor"),
    ("GEMM", r"gemm|gemv|cutlass|nvjet|xmma|splitk|cublas|_mm_"),
    (COPIES, r"copy|memcpy|fill|catarray|memset"),
)
"""Class of a kernel by its name, lower case; the first pattern that matches decides."""
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST = ("cpu_op", "cuda_runtime", "cuda_driver", "user_annotation")


class NoDeviceEvents(ValueError):
    """A trace without work of a GPU."""


def breakdown(trace: Path, steps: int) -> dict[str, float]:
    """Milliseconds of a step of rank 0 by `PARTS`; they add up to the profiled step.

    Each moment counts once: as the work that runs in it, as exposed communication where no other kernel runs, as a copy
    where nothing but copies does, and as a host gap where the device has nothing to do. The profiled window begins with
    the first call of the host and ends with the last event; the profiler itself makes gaps longer.

    Args:
        trace: `trace.json` of `engine.train.hooks.Profile`.
        steps: steps in the profiled window.

    Raises:
        NoDeviceEvents: as from a CPU.
    """
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("ph") == "X"]
    work = [event for event in events if event.get("cat") in _DEVICE]
    if not work:
        raise NoDeviceEvents("the trace has no work of a GPU in it")
    window = [event for event in events if event.get("cat") in (*_DEVICE, *_HOST)]
    start, end = min(event["ts"] for event in window), max(event["ts"] + event["dur"] for event in window)
    totals = dict.fromkeys(PARTS, 0.0)
    for name, seconds in _moments([(event["ts"], event["ts"] + event["dur"], kind_of(event)) for event in work]):
        totals[name] += seconds
    totals[GAPS] = (end - start) - sum(totals.values())
    return {name: value / 1e3 / steps for name, value in totals.items()}


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
