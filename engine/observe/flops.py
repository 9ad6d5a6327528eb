"""Peak speed of known GPUs, and model FLOPs utilisation."""

from __future__ import annotations

import re

_PEAKS: tuple[tuple[str, float], ...] = (
    (r"GB200", 2500e12),
    (r"B200", 2250e12),
    (r"B100", 1750e12),
    (r"GH200 \w+( HBM3e?)?", 989e12),
    (r"H200", 989e12),
    (r"H200 NVL", 835.5e12),
    (r"H100 \d+GB HBM\w+", 989e12),
    (r"H100 PCIe", 756e12),
    (r"H100 NVL", 835.5e12),
    (r"H800", 989e12),
    (r"H20", 148e12),
    (r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe|A800-SXM4-\d+GB|A800 80GB PCIe", 312e12),
    (r"A40", 149.7e12),
    (r"A30", 165e12),
    (r"A10", 125e12),
    (r"L40S", 362e12),
    (r"L40", 181e12),
    (r"L4", 121e12),
    (r"RTX A6000", 154.8e12),
    (r"RTX 6000 Ada Generation", 364.2e12),
    (r"GeForce RTX 4090", 165e12),
    (r"GeForce RTX 3090", 71e12),
)
"""Device name without the leading "NVIDIA" -> peak FLOP/s in bf16 with fp32 accumulation, dense.

Source: NVIDIA's datasheets and architecture papers. Where a datasheet gives only the figure with 2:4 sparsity, half
of it. Cards without bf16 tensor cores (V100, T4) are left out on purpose: a utilisation of their fp16
peak could not be compared. So are slices of a card (MIG), whose name matches no row.
"""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of the GPU that `torch.cuda.get_device_name` calls `device_name`.

    None for a card that is not in the table: no utilisation is better than a wrong one.
    """
    name = device_name.strip().removeprefix("NVIDIA ")
    return next((peak for pattern, peak in _PEAKS if re.fullmatch(pattern, name)), None)


def mfu(tokens_per_s_per_gpu: float, flops_per_token: float, peak: float) -> float:
    """Model FLOPs utilisation, 0 to 1 (PaLM, arXiv 2204.02311, appendix B).

    Args:
        tokens_per_s_per_gpu: trained tokens per second, divided by the number of GPUs.
        flops_per_token: FLOPs of forward and backward for one token; recomputed activations do not count.
        peak: dense peak of one GPU in FLOP/s.
    """
    return tokens_per_s_per_gpu * flops_per_token / peak
