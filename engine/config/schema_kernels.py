"""Options of the kernels."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config.enums import Attention, Fp8Kernel, Kernel, Switch


@dataclass(slots=True, kw_only=True)
class KernelsConfig:
    """Choices among implementations of the same mathematics."""

    attention: Attention = Attention.auto
    loss: Kernel = Kernel.auto
    """Output projection and cross-entropy. `triton`: in chunks, so that logits never exist in full; not for bert
    under ZeRO-3, which keeps the projection's bias away from the loss. `auto`: `triton` in bf16 on GPUs, else
    `torch`."""
    norm: Kernel = Kernel.auto
    """LayerNorm and RMSNorm. `auto`: `triton` on GPUs, in compiled blocks in bf16 without fp8, else `torch`."""
    rotary: Kernel = Kernel.auto
    """Rotary positions of queries and keys, both in one launch with `triton`. `auto`: `triton` on GPUs where
    blocks are not compiled, else `torch`."""
    activation: Kernel = Kernel.auto
    """SwiGLU and GELU. `auto`: as for `norm`."""
    optimizer: Kernel = Kernel.auto
    """AdamW. `triton` passes once over flat state, which ZeRO has. `auto`: `triton` in bf16 on GPUs, else `torch`."""
    fp8: Fp8Kernel = Fp8Kernel.auto
    """Linears under `precision.fp8`. `auto`: `scaled_mm` on GPUs, `emulated` on CPUs."""
    deterministic: bool = False
    """Pass over kernels that add up in no fixed order: the same inputs give the same bits."""
    compile: Switch = Switch.auto
    """torch.compile for the transformer blocks and the loss. `auto`: on for GPUs."""
    cuda_graphs: Switch = Switch.off
    """Record the forward and backward pass of a micro-batch once and launch it as a whole, where the host is slower
    than the GPU. What a pass holds is then kept between passes, and validation needs memory of its own. `auto`: on for
    GPUs where the rules (385 to 389) let it. On CPUs passes run as ever."""
