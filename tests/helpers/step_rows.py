"""Rows of training steps as a GPU would give them, with invented figures."""

from __future__ import annotations

from typing import Any

from benchmarks.step.breakdown import PARTS

Row = dict[str, Any]
AROUND: Row = {
    "suite": "step",
    "hardware": "NVIDIA H200",
    "commit": "abc1234",
    "call": "2026-11-22T10:00:00+00:00",
    "versions": {"torch": "2.11.0", "cuda": "13.0", "triton": "3.6.0", "deepspeed": "0.19.8", "liger-kernel": "0.8.5"},
    "quick": False,
    "gpus": 1,
}


def step(case: str, system: str, rate: float, **facts: Any) -> Row:
    """`rate`: tokens/s per GPU."""
    gpus = facts.get("gpus", 1)
    seconds = 16384 / rate
    return {
        **AROUND,
        "case": case,
        "system": system,
        "metric": "step",
        "unit": "s",
        "p20": seconds * 0.99,
        "p50": seconds,
        "p80": seconds * 1.02,
        "n": 24,
        "tokens_per_s": rate * gpus,
        "tokens_per_s_per_gpu": rate,
        "samples_per_s": rate / 2048 * gpus,
        "tflops_c": rate * 8.5e-3,
        "mfu_c": 0.5,
        "mfu_f": 0.53,
        "hfu": 0.66,
        "peak_memory_gib": 40.25,
        "parameters": 1.3e9,
        "seq_len": 2048,
        "losses": {"1": 11.2, "10": 11.09},
        **facts,
    }


def profiled(case: str, system: str, *parts: float) -> Row:
    """`parts`: milliseconds in the order of `PARTS`."""
    values = dict(zip(PARTS, parts, strict=True))
    head = {"case": case, "system": system, "metric": "breakdown", "unit": "ms", "parts": values, "n": 1}
    total = sum(parts)
    return {**AROUND, **head, "p20": total, "p50": total, "p80": total}


def reference(case: str, loss: float, at: int = 10) -> Row:
    head = {"case": case, "system": "fp32 reference", "metric": "loss", "unit": "nats", "n": 1}
    return {**AROUND, **head, "p20": loss, "p50": loss, "p80": loss, "step": at, "products": "fp32"}


def unavailable(case: str, system: str, reason: str) -> Row:
    head = {"case": case, "system": system, "metric": "unavailable", "unit": "", "values": {}}
    return {**AROUND, **head, "unavailable": reason}
