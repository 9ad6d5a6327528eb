"""Rules for fp8 (codes 376..378)."""

from __future__ import annotations

import math

from engine.config.derived import FP8_MULTIPLE, block_linears, fp8_linears
from engine.config.enums import DType, Fp8
from engine.config.schema import Config
from engine.errors import Violation


def fp8_violations(cfg: Config, *, sized: bool) -> list[Violation]:
    """fp8 is for bf16 runs (376), and something is left to be multiplied in it (377, 378).

    Args:
        sized: the numbers of model and layout are in range, so that sizes can be compared.
    """
    precision, found = cfg.precision, []
    if precision.fp8 is Fp8.none:
        return []
    if precision.dtype is not DType.bf16:
        found.append(
            Violation(
                code=376,
                option="precision.fp8",
                value=precision.fp8,
                rule=f"products in fp8 give bf16, and precision.dtype is {precision.dtype}",
                way_out="Use precision=fp8, which is bf16 with fp8 linears, or precision.fp8=none",
            )
        )
    if sized and not fp8_linears(cfg):
        found.append(_no_sizes(cfg))
    layers, ends = cfg.model.num_layers, precision.fp8_bf16_ends
    if sized and 0 < layers <= 2 * ends:
        most = (layers - 1) // 2
        found.append(
            Violation(
                code=378,
                option="precision.fp8_bf16_ends",
                value=ends,
                rule=f"with {ends} blocks at either end in bf16 none of model.num_layers {layers} is left for fp8",
                way_out=f"Use precision.fp8_bf16_ends={most}, or precision=bf16",
            )
        )
    return found


def _no_sizes(cfg: Config) -> Violation:
    """377: names the sizes, and what to change so that some of them fit."""
    model, tp = cfg.model, cfg.parallel.tp
    sizes = ", ".join(f"{name} {rows} x {columns}" for name, (rows, columns) in block_linears(model, tp).items())
    way_out = "Use a smaller parallel.tp, or precision=bf16"
    if model.hidden_size % FP8_MULTIPLE:
        step = math.lcm(FP8_MULTIPLE, model.num_heads if model.head_dim is None else 1)
        way_out = f"Use model.hidden_size={-(-model.hidden_size // step) * step}, or precision=bf16"
    return Violation(
        code=377,
        option="precision.fp8",
        value=cfg.precision.fp8,
        rule=f"fp8 takes slices of weights whose sizes are multiples of {FP8_MULTIPLE}, and with tp({tp}) no linear of "
        f"a block has them: {sizes}",
        way_out=way_out,
    )
