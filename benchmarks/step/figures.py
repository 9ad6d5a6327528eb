"""What follows from a step's median time: rates and utilisations."""

from __future__ import annotations

from typing import Any

from engine.config.derived import head_dim, is_causal
from engine.config.enums import Balance, Recompute
from engine.config.schema import Config
from engine.observe.flops import mfu, peak_flops
from engine.plan.costs import flops_per_token, layer_costs, parameter_counts, total_parameters
from engine.topology.schedule import bubble_formula


def hardware_flops_per_token(cfg: Config) -> float:
    """FLOPs of a token with what the backward pass computes again: C, and the forward pass of blocks or of attention.

    As in arXiv 2205.05198, section 5; what kernels recompute inside of themselves does not count.
    """
    model, seq_len = cfg.model, cfg.data.seq_len
    causal, _ = flops_per_token(model, seq_len)
    if cfg.train.recompute is Recompute.full:
        costs = zip(parameter_counts(model), layer_costs(model, Balance.flops, seq_len), strict=True)
        return causal + sum(cost for name, cost in costs if name.startswith("block."))
    if cfg.train.recompute is Recompute.selective:
        attended = seq_len * (0.5 if is_causal(model) else 1.0)
        return causal + model.num_layers * 4.0 * model.num_heads * head_dim(model) * attended
    return causal


def samples_of(cfg: Config) -> int:
    """Samples of a step over all replicas; `parallel.dp` is given."""
    return cfg.train.micro_batch * cfg.train.accum_steps * (cfg.parallel.dp or 1)


def facts(cfg: Config, gpus: int, step_s: float, hardware: str) -> dict[str, Any]:
    """Rates, utilisations (None where the peak is not known, as of a CPU) and shape of a case.

    `mfu_c` counts the causal half of attention, `mfu_f` all of it, `hfu` is `mfu_c` with recomputed FLOPs; all are
    shares of the bf16 peak, in fp8 too.
    """
    samples = samples_of(cfg)
    rate = samples * cfg.data.seq_len / step_s / gpus
    causal, full = flops_per_token(cfg.model, cfg.data.seq_len)
    peak = peak_flops(hardware)
    flops = {"mfu_c": causal, "mfu_f": full, "hfu": hardware_flops_per_token(cfg)}
    found: dict[str, Any] = {
        "tokens_per_s": rate * gpus,
        "tokens_per_s_per_gpu": rate,
        "samples_per_s": samples / step_s,
        "tflops_c": rate * causal / 1e12,
        **{name: mfu(rate, value, peak) if peak else None for name, value in flops.items()},
        "gpus": gpus,
        "model": cfg.model.name,
        "parameters": total_parameters(cfg.model),
        "seq_len": cfg.data.seq_len,
        "micro_batch": cfg.train.micro_batch,
        "accum_steps": cfg.train.accum_steps,
        "global_batch": samples,
        "recompute": str(cfg.train.recompute),
    }
    if cfg.parallel.pp > 1:
        parallel = cfg.parallel
        found["ideal_bubble"] = bubble_formula(
            parallel.schedule, parallel.pp, cfg.train.accum_steps, parallel.virtual_stages
        )
    return found
