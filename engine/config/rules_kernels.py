"""Rules for passes that are recorded as CUDA graphs (codes 385..389)."""

from __future__ import annotations

from engine.config.batch import replicas
from engine.config.enums import DType, Offload, Switch, Tiles
from engine.config.schema import Config
from engine.errors import Violation

_OFF = "or kernels.cuda_graphs=off"

_Row = tuple[int, dict[str, bool], str, str]
"""Code, settings that stand in the way, why they do, way out."""


def graph_violations(cfg: Config, world_size: int) -> list[Violation]:
    """Why passes cannot be recorded, where that is asked for by name."""
    return obstacles(cfg, replicas(cfg.parallel, world_size)) if cfg.kernels.cuda_graphs is Switch.on else []


def obstacles(cfg: Config, dp: int) -> list[Violation]:
    """What of `cfg` a graph could not repeat: it holds addresses, sizes and numbers of the pass that was recorded."""
    rows = (_state(cfg), _axes(cfg), _reduction(cfg, dp), _passes(cfg), _numbers(cfg))
    found = [(code, [name for name, here in named.items() if here], why, way_out) for code, named, why, way_out in rows]
    return [
        Violation(
            code=code,
            option="kernels.cuda_graphs",
            value=cfg.kernels.cuda_graphs,
            rule=f"{why}, and here is {', '.join(names)}",
            way_out=way_out,
        )
        for code, names, why, way_out in found
        if names
    ]


def _state(cfg: Config) -> _Row:
    """Gradients go to the same place in every pass (385)."""
    dtype, zero = cfg.precision.dtype, cfg.zero
    named = {
        f"precision.dtype={dtype}": dtype is not DType.bf16,
        f"zero.stage={zero.stage}": zero.stage != 1,
        f"zero.offload_optimizer={zero.offload_optimizer}": zero.offload_optimizer is not Offload.none,
    }
    why = (
        "passes are recorded where gradients are added up in flat sums: in bf16 at ZeRO-1 with its state on the device"
    )
    return 385, named, why, f"Use 'precision=bf16 zero=z1', {_OFF}"


def _axes(cfg: Config) -> _Row:
    """No collectives (386)."""
    degrees = {"pp": cfg.parallel.pp, "tp": cfg.parallel.tp, "context": cfg.parallel.context}
    named = {f"parallel.{axis}={degree}": degree > 1 for axis, degree in degrees.items()}
    wrong = " ".join(f"parallel.{axis}=1" for axis, degree in degrees.items() if degree > 1)
    return 386, named, "a recorded pass has no messages between ranks", f"Use {wrong}, {_OFF}"


def _reduction(cfg: Config, dp: int) -> _Row:
    """Nor those of the last pass of a step (387)."""
    named = {f"zero.overlap_comm=true with dp({dp})": cfg.zero.overlap_comm and dp > 1}
    why = "a recorded pass has no messages between ranks, so that gradients are reduced after it"
    return 387, named, why, f"Use zero.overlap_comm=false, {_OFF}"


def _passes(cfg: Config) -> _Row:
    """One forward and one backward pass on one stream (388)."""
    tiles = cfg.train.tiles
    named = {
        f"train.tiles={tiles}": tiles is not Tiles.none,
        "train.recompute_offload=true": cfg.train.recompute_offload,
    }
    why = "a recorded pass is one forward and one backward pass, on one stream and in the device's memory"
    return 388, named, why, f"Use train.tiles=none train.recompute_offload=false, {_OFF}"


def _numbers(cfg: Config) -> _Row:
    """Nothing that the host knows may change from one micro-batch to the next (389)."""
    named = {
        f"model.attention_dropout={cfg.model.attention_dropout}": cfg.model.attention_dropout > 0,
        "data.document_mask=true": cfg.data.document_mask,
        "data.variable_length=true": cfg.data.variable_length,
    }
    why = "seeds, lengths and sizes that the host gives to kernels stay those of the pass that was recorded"
    way_out = f"Use model.attention_dropout=0 data.document_mask=false data.variable_length=false, {_OFF}"
    return 389, named, why, way_out
