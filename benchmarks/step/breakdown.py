"""Where the time of a profiled step goes, from a chrome trace of torch.profiler."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

KINDS = (
    ("attention", r"flash|fmha|attention|cudnn_generated|sdpa"),
    ("gemm", r"gemm|cutlass|nvjet|xmma|splitk|cublas"),
    ("optimizer", r"adam|lamb|multi_tensor_apply.*(adam|sgd)|fused_adam"),
    ("communication", r"nccl"),
    ("reduction of norms", r"norm.*(reduce|cleanup)|multi_tensor.*norm|lpnorm"),
    ("compiled elementwise", r"triton_"),
    ("elementwise, copies in kernels", r"elementwise|copy|fill|cat|vectorized"),
)
"""Name of a class of kernels -> pattern; the first that matches counts."""


def breakdown(trace: Path, steps: int) -> dict[str, float]:
    """Milliseconds per step by class of GPU work, and `idle`: when no kernel or copy ran. They sum to `window`.

    Work that overlaps is counted in its class each time, and the overlap is given back as `overlap` (negative).

    Args:
        trace: `trace.json` that the profile hook wrote.
        steps: steps in the profiled window.
    """
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("cat") in _GPU]
    if not events:
        raise ValueError(f"{trace} holds no GPU events")
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events)
    totals: defaultdict[str, float] = defaultdict(float)
    for event in events:
        totals[_kind(event)] += event["dur"]
    busy, end = 0.0, spans[0][0]
    for begin, stop in spans:
        busy += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    window = end - spans[0][0]
    result = {name: value / 1e3 / steps for name, value in sorted(totals.items(), key=lambda item: -item[1])}
    result["overlap"] = (busy - sum(totals.values())) / 1e3 / steps
    result["idle"] = (window - busy) / 1e3 / steps
    result["window"] = window / 1e3 / steps
    result["launches"] = len(events) / steps
    return result


_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}


def _kind(event: dict[str, Any]) -> str:
    if event["cat"] != "kernel":
        return str(event["cat"])
    name = event["name"].lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other kernels")
