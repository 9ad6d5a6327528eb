"""Peak speed of known GPUs, and model FLOPs utilisation."""

from __future__ import annotations

from engine.config.hardware import resolve
from engine.config.schema_hardware import HardwareConfig


def peak_flops(device_name: str, asked: HardwareConfig | None = None) -> float | None:
    """Dense bf16 peak in FLOP/s of the GPU that `torch.cuda.get_device_name` calls `device_name`.

    `asked` is the run's `hardware` section. None for a card that no preset of `conf/hardware/` describes. Cards without
    bf16 tensor cores (V100, T4) have none on purpose: a utilisation of their fp16 peak could not be compared.
    """
    tflops = resolve(asked or HardwareConfig(), device_name).bf16_tflops
    return None if tflops is None else tflops * 1e12


def mfu(tokens_per_s_per_gpu: float, flops_per_token: float, peak: float) -> float:
    """Model FLOPs utilisation, 0 to 1 (PaLM, arXiv 2204.02311, appendix B).

    Args:
        tokens_per_s_per_gpu: trained tokens per second, divided by the number of GPUs.
        flops_per_token: FLOPs of forward and backward for one token; recomputed activations do not count.
        peak: dense peak of one GPU in FLOP/s.
    """
    return tokens_per_s_per_gpu * flops_per_token / peak
