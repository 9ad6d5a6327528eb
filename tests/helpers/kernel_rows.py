"""Rows of kernels as a GPU would give them, with invented figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]
AROUND = {
    "hardware": "NVIDIA H200",
    "commit": "abc1234",
    "versions": {"torch": "2.11.0", "cuda": "13.0", "triton": "3.6.0", "cudnn": 91900, "flash-attn-4": None},
    "architecture": "sm90",
    "quick": False,
}


def figure(case: str, system: str, metric: str, unit: str, value: float, **facts: Any) -> Row:
    head = {"case": case, "system": system, "metric": metric, "unit": unit}
    return {**AROUND, **head, "p20": value * 0.98, "p50": value, "p80": value * 1.03, "n": 20, **facts}


def unavailable(case: str, system: str, reason: str, **facts: Any) -> Row:
    head = {"case": case, "system": system, "metric": "unavailable", "unit": "", "values": {}}
    return {**AROUND, **head, **facts, "unavailable": reason}


def attention(seconds: Mapping[str, float], length: int = 4096, **facts: Any) -> list[Row]:
    """Forward, backward and both of each system, of which `seconds` are the last."""
    told = {"head_dim": 128, "causal": True, "documents": False, "heads": 16, "kv_heads": 16, "suite": "attention"}
    told |= {"length": length, "error": 3e-3, **facts}
    mask = "causal" if told["causal"] else "full"
    case = f"{told['suite']} {mask} H{told['head_dim']} S{length} K{told['kv_heads']}"
    rate = 16384 * length * 14 * 16 * 128 / 2 / 1e12
    return [
        figure(case, system, phase, "s", share * both, tflops=work * rate / (share * both), **told)
        for system, both in seconds.items()
        for phase, share, work in (("fwd", 0.3, 2 / 7), ("bwd", 0.7, 5 / 7), ("fwd+bwd", 1.0, 1.0))
    ]


def auto(case: str, system: str, ratio: float) -> Row:
    facts = {"suite": "attention", "chosen": "triton", "best": "sdpa_cudnn", "ratio": ratio, "causal": True}
    return figure(case, system, "fwd+bwd over the best", "ratio", ratio, **facts)


def all_met() -> list[Row]:
    """Every target is met."""
    rows = attention({"sdpa_cudnn": 1e-3, "triton": 1.1e-3, "triton tutorial": 2e-3})
    rows += attention({"sdpa_cudnn": 2e-3, "triton": 2.4e-3}, 8192)
    rows += attention({"triton": 9e-4}, 8192, suite="documents", documents=True)
    rows += [auto("a", "auto", 1.01), auto("a", "auto without flash_attn_4", 1.0)]
    rows += [figure("d", "triton", "speed over dense causal", "x", 2.8, suite="documents")]
    for system, seconds, gib in (("octant triton", 0.06, 0.3), ("liger", 0.07, 0.9), ("torch.compile", 0.058, 6.0)):
        rows.append(figure("l", system, "fwd+bwd", "s", seconds, suite="loss", tflops=400.0, error=0.01))
        rows.append(figure("l", system, "extra memory", "GiB", gib, suite="loss"))
    for phase in ("fwd", "bwd"):
        for case in ("rms_norm", "swiglu"):
            rows.append(figure(case, "octant triton", f"of copy: {phase}", "ratio", 0.9, suite="elementwise"))
            rows.append(figure(case, "torch", f"of copy: {phase}", "ratio", 0.3, suite="elementwise"))
    rows.append(figure("adamw", "octant triton", "of copy: step", "ratio", 0.86, suite="optimizer"))
    rows.append(figure("adamw", "octant triton", "step", "s", 0.010, suite="optimizer", gb_per_s=3900.0))
    rows.append(figure("adamw", "torch fused + copies", "step", "s", 0.013, suite="optimizer", gb_per_s=3000.0))
    return rows
