"""Rules for ZeRO, number formats and offload (codes 208, 314, 316..320, 340..344, 346..349, 357..359, 379)."""

from __future__ import annotations

from engine.config.derived import can_stream, streams
from engine.config.enums import Device, DType, Offload, OffloadStrategy, OptimizerName, Transport
from engine.config.layout import Fits, legal_layouts, typed
from engine.config.rules_parallel import PIPELINE_ZERO
from engine.config.schema import Config
from engine.errors import Violation

OFFLOADABLE = (OptimizerName.adamw, OptimizerName.lion, OptimizerName.sgd)
"""Update rules that look at one element at a time, so that a host can run them on any slice."""

_Row = tuple[bool, int, str, object, str, str]


def zero_violations(cfg: Config, world_size: int, fits: Fits | None) -> list[Violation]:
    """The highest ZeRO stage of a pipeline (208). With `fits`, the layout offered suits the rest of the config."""
    stage, pp, cp, tp = cfg.zero.stage, cfg.parallel.pp, cfg.parallel.context, cfg.parallel.tp
    if pp == 1 or stage <= PIPELINE_ZERO:
        return []
    flat = [layout for layout in legal_layouts(world_size, fits, context=cp > 1) if layout[0] == 1]
    best = min(flat, key=lambda layout: (layout[1] != cp, abs(layout[2] - pp * tp), layout), default=(1, 1, 1))
    return [
        Violation(
            code=208,
            option="zero.stage",
            value=stage,
            rule=f"with pp({pp}) the passes of several micro-batches interleave, and what stage {stage} would shard "
            f"between two passes is in use by others: at most stage {PIPELINE_ZERO}",
            way_out=f"Use zero.stage={PIPELINE_ZERO}, or '{typed(*best, context=cp > 1)}'",
        )
    ]


def memory_violations(cfg: Config) -> list[Violation]:
    """Number formats (314, 316, 359, 379), how parameters are gathered (320), what is offloaded (317, 340..344) and how
    (318, 319, 346..349).
    """
    return [
        Violation(code=code, option=option, value=value, rule=rule, way_out=way_out)
        for broken, code, option, value, rule, way_out in (
            *_formats(cfg),
            _gather(cfg),
            *_offload(cfg),
            *_strategy(cfg),
        )
        if broken
    ]


def _formats(cfg: Config) -> list[_Row]:
    stage, dtype, scale = cfg.zero.stage, cfg.precision.dtype, cfg.precision.loss_scale
    sums = cfg.precision.grad_accum
    return [
        (
            stage == 0 and dtype is not DType.fp32,
            314,
            "zero.stage",
            stage,
            f"for a {dtype} model only DeepSpeed's ZeRO optimizers add up gradients in fp32 and count every "
            "parameter in the clip norm",
            "Use zero.stage=1, which with dp=1 shards nothing, or precision.dtype=fp32",
        ),
        (
            scale is not None and dtype is not DType.fp16,
            316,
            "precision.loss_scale",
            scale,
            f"only fp16 gradients are so small that the loss is scaled, and precision.dtype is {dtype}",
            "Use precision.loss_scale=null, or precision.dtype=fp16",
        ),
        (
            sums is DType.fp16 or (sums is DType.bf16 and dtype is not DType.bf16),
            359,
            "precision.grad_accum",
            sums,
            f"gradients of a {dtype} model are added up in {'bf16 or ' if dtype is DType.bf16 else ''}fp32",
            "Use precision.grad_accum=fp32",
        ),
        *_states(cfg),
    ]


def _states(cfg: Config) -> list[_Row]:
    """bf16 weights that are their own masters (379)."""
    states, dtype = cfg.precision.states, cfg.precision.dtype
    strategy, here = cfg.zero.offload_strategy, cfg.zero.offload_optimizer is Offload.none
    needs = {
        f"precision.dtype={dtype}": dtype is DType.bf16,
        f"zero.stage={cfg.zero.stage}": cfg.zero.stage == 1,
        f"optim.name={cfg.optim.name}": cfg.optim.name is OptimizerName.adamw,
        f"zero.offload_optimizer={cfg.zero.offload_optimizer}": here or can_stream(cfg),
        f"zero.offload_strategy={strategy}": here or streams(cfg) or not can_stream(cfg),
    }
    wrong = [name for name, fits in needs.items() if not fits]
    rule = f"bf16 states are AdamW's at ZeRO-1 of a bf16 model, offloaded or not, and here is {', '.join(wrong)}"
    if states is DType.fp16:
        rule = "master weights and moments are fp32 or bf16; fp16 would lose small moments"
    broken = states is DType.fp16 or (states is DType.bf16 and bool(wrong))
    return [(broken, 379, "precision.states", states, rule, "Use precision.states=fp32")]


def _gather(cfg: Config) -> _Row:
    zero = cfg.zero
    wrong = {
        f"zero.stage={zero.stage}": zero.stage != 3,
        f"zero.offload_params={zero.offload_params}": zero.offload_params is not Offload.none,
        f"zero.offload_optimizer={zero.offload_optimizer}": zero.offload_optimizer is not Offload.none,
        f"train.device={cfg.train.device}": cfg.train.device is Device.cpu,
    }
    here = ", ".join(name for name, is_wrong in wrong.items() if is_wrong)
    rule = f"copy engines read the parts that stage 3 keeps on other GPUs, without offload, and here is {here}"
    broken = zero.gather is Transport.copy_engine and bool(here)
    return broken, 320, "zero.gather", zero.gather, rule, "Use zero.gather=auto"


def _offload(cfg: Config) -> list[_Row]:
    zero, name = cfg.zero, cfg.optim.name
    stage, optimizer, params = zero.stage, zero.offload_optimizer, zero.offload_params
    on_disk = [f"zero.{key}" for key in ("offload_optimizer", "offload_params") if getattr(zero, key) is Offload.nvme]
    names = ", ".join(OFFLOADABLE)
    partial = zero.offload_ratio is not None and 0 < zero.offload_ratio < 1
    at_stage_3 = stage == 3 and optimizer is Offload.cpu and name is OptimizerName.adamw
    return [
        (
            optimizer is not Offload.none and name not in OFFLOADABLE,
            317,
            "zero.offload_optimizer",
            optimizer,
            f"{name} looks at whole matrices through collectives between GPUs, which a step in host memory cannot",
            f"Use zero.offload_optimizer=none, or an optim.name of {names}",
        ),
        (
            params is not Offload.none and stage < 3,
            340,
            "zero.offload_params",
            params,
            f"parameters are fetched layer by layer at zero.stage=3 only, and zero.stage is {stage}",
            "Use zero.stage=3, or zero.offload_params=none",
        ),
        (
            optimizer is Offload.nvme and stage < 3,
            341,
            "zero.offload_optimizer",
            optimizer,
            f"NVMe holds state at zero.stage=3 only, and zero.stage is {stage}",
            "Use zero.stage=3, or zero.offload_optimizer=cpu",
        ),
        (
            bool(on_disk) and zero.nvme_path is None,
            342,
            "zero.nvme_path",
            None,
            f"{' and '.join(on_disk)} need a folder on a local NVMe disk",
            "Use zero.nvme_path=FOLDER, or cpu instead of nvme",
        ),
        (
            optimizer is Offload.cpu and stage == 0,
            343,
            "zero.offload_optimizer",
            optimizer,
            "only ZeRO optimizers keep their state in host memory, and zero.stage is 0",
            "Use zero.stage=1, or zero.offload_optimizer=none",
        ),
        (
            partial and not (at_stage_3 or streams(cfg)),
            344,
            "zero.offload_ratio",
            zero.offload_ratio,
            "a part of the state is offloaded with adamw and zero.offload_optimizer=cpu only, at zero.stage=3 or "
            f"streamed (zero.stage=1 in bf16), and here is {name}, {optimizer}, zero.stage={stage} in "
            f"{cfg.precision.dtype} with zero.offload_strategy={zero.offload_strategy}",
            "Use zero.offload_ratio=1, or 'zero.stage=3 optim.name=adamw zero.offload_optimizer=cpu'",
        ),
    ]


def _streamed(cfg: Config) -> list[_Row]:
    zero, auto = cfg.zero, "zero.offload_strategy=auto"
    needs = {
        "optim.name": (cfg.optim.name, OptimizerName.adamw),
        "precision.dtype": (cfg.precision.dtype, DType.bf16),
        "zero.stage": (zero.stage, 1),
        "zero.offload_optimizer": (zero.offload_optimizer, Offload.cpu),
    }
    wrong = [f"{option}={is_}" for option, (is_, wanted) in needs.items() if is_ != wanted]
    right = " ".join(f"{option}={wanted}" for option, (_, wanted) in needs.items())
    return [
        (
            zero.offload_strategy is OffloadStrategy.streamed and bool(wrong),
            318,
            "zero.offload_strategy",
            zero.offload_strategy,
            f"it streams AdamW's state at ZeRO-1 of a bf16 model to the host and back, and here is {', '.join(wrong)}",
            f"Use {auto}, or '{right}'",
        ),
        (
            zero.offload_delay > 0 and not streams(cfg),
            319,
            "zero.offload_delay",
            zero.offload_delay,
            "only weights whose state is streamed lag behind, and here is "
            + ", ".join(wrong or [f"zero.offload_strategy={zero.offload_strategy}"]),
            f"Use zero.offload_delay=0, or '{right} {auto}'",
        ),
    ]


def _strategy(cfg: Config) -> list[_Row]:
    zero, strategy = cfg.zero, cfg.zero.offload_strategy
    special = strategy in (OffloadStrategy.zenflow, OffloadStrategy.superoffload)
    option, plain = "zero.offload_strategy", "zero.offload_strategy=plain"
    return [
        *_streamed(cfg),
        (
            special and zero.offload_optimizer is not Offload.cpu,
            346,
            option,
            strategy,
            f"it overlaps the step in host memory, and zero.offload_optimizer is {zero.offload_optimizer}",
            f"Use zero.offload_optimizer=cpu, or {plain}",
        ),
        (
            special and zero.stage < 3,
            347,
            option,
            strategy,
            f"it keeps to each parameter's weight decay at zero.stage=3 only, and zero.stage is {zero.stage}",
            f"Use zero.stage=3, or {plain}",
        ),
        (
            special and cfg.optim.name is not OptimizerName.adamw,
            348,
            option,
            strategy,
            f"DeepSpeed has it for adamw only, and optim.name is {cfg.optim.name}",
            f"Use optim.name=adamw, or {plain}",
        ),
        (
            special and cfg.train.device is Device.cpu,
            349,
            option,
            strategy,
            "it overlaps the host's step with a GPU's work, and train.device is cpu",
            f"Use train.device=cuda, or {plain}",
        ),
        (
            strategy is OffloadStrategy.zenflow and cfg.checkpoint.save_final,
            357,
            option,
            strategy,
            "its last steps are still under way when training ends, so the weights that are written would lack them",
            f"Use checkpoint.save_final=false, or {plain}",
        ),
        (
            strategy is OffloadStrategy.superoffload and cfg.precision.dtype is DType.fp16,
            358,
            option,
            strategy,
            "it steps before the loss scale is taken out of fp16 gradients",
            f"Use precision.dtype=bf16, or {plain}",
        ),
    ]
