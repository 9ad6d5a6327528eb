"""Rules between the layout, the model and the pipeline schedule (codes 204..207, 221..231)."""

from __future__ import annotations

from collections.abc import Iterable

from engine.config.derived import ffn_size, kv_heads, parts_per_rank, sequence_multiple
from engine.config.enums import Device, PipelineSchedule, TpOverlap, Transport
from engine.config.layout import Fits, legal_tp, nearest_layouts
from engine.config.schema import Config, ModelConfig, ParallelConfig
from engine.errors import Violation

RELATED = frozenset({"data.seq_len", "train.accum_steps", "parallel.virtual_stages", "zero.stage"})
"""Options besides the model's that decide which layouts are legal."""

PIPELINE_ZERO = 2
"""Highest ZeRO stage with pp > 1."""


def fits(cfg: Config) -> Fits:
    """Which (pp, context, tp) the rest of `cfg` can run with, whatever layout it asks for."""
    asked, model = cfg.parallel, cfg.model

    def suits(pp: int, cp: int, tp: int) -> bool:
        parallel = ParallelConfig(
            pp=pp,
            tp=tp,
            context=cp,
            sequence=asked.sequence,
            schedule=asked.schedule,
            virtual_stages=asked.virtual_stages,
        )
        cut = model.num_heads % (cp * tp) == kv_heads(model) % tp == ffn_size(model) % tp == 0
        return (
            cut
            and kv_heads_fit(model, cp, tp)
            and model.num_layers >= pp * parts_per_rank(parallel)
            and cfg.data.seq_len % sequence_multiple(parallel) == 0
            and (asked.schedule is PipelineSchedule.one_f_one_b or pp > 1)
            and accum_fits(asked.schedule, cfg.train.accum_steps, pp)
            and (pp == 1 or cfg.zero.stage <= PIPELINE_ZERO)
        )

    return suits


def kv_heads_fit(model: ModelConfig, cp: int, tp: int) -> bool:
    """Whether a tp rank's key/value heads are shared out over, or repeated for, `cp` ranks evenly."""
    heads = kv_heads(model) // tp
    return heads > 0 and (heads % cp == 0 or cp % heads == 0)


def accum_fits(schedule: PipelineSchedule, micro_batches: int, pp: int) -> bool:
    """Whether `schedule` on `pp` stages can run with this many micro-batches."""
    if schedule is PipelineSchedule.interleaved:
        return micro_batches % pp == 0
    return schedule is PipelineSchedule.one_f_one_b or micro_batches >= 2 * pp


_PLAIN = "parallel.schedule=one_f_one_b"
_Row = tuple[bool, int, str, object, str, str]
"""Whether the rule is broken; then code, option, value, rule and way out."""


def _broken(table: Iterable[_Row]) -> list[Violation]:
    return [
        Violation(code=code, option=option, value=value, rule=rule, way_out=way_out)
        for broken, code, option, value, rule, way_out in table
        if broken
    ]


def cut_violations(cfg: Config, world_size: int) -> list[Violation]:
    """Heads, feed-forward, blocks and positions are cut evenly (204..207, 221..222, 229); 230, 231: of GPUs only."""
    near = nearest_layouts(cfg.parallel, world_size, fits(cfg))
    return _broken([*_tensor_and_pipeline(cfg, near), *_sequence_and_context(cfg, near), *_copy_engines(cfg)])


def _tensor_and_pipeline(cfg: Config, near: str) -> list[_Row]:
    """Rules 204..207. `near`: the nearest legal layouts."""
    model, pp, tp = cfg.model, cfg.parallel.pp, cfg.parallel.tp
    cut = [(204, "num_heads", model.num_heads, "query heads")]
    if model.num_kv_heads is not None:
        cut.append((205, "num_kv_heads", model.num_kv_heads, "key/value heads"))
    cut.append((206, "ffn_size", ffn_size(model), "feed-forward columns"))
    rows: list[_Row] = [
        (
            size % tp > 0,
            code,
            "parallel.tp",
            tp,
            f"tp({tp}) does not divide model.{name} {size}: every rank holds the same number of {what}",
            f"Use a legal tp: {', '.join(map(str, legal_tp(model)))}",
        )
        for code, name, size, what in cut
    ]
    rows.append(
        (
            model.num_layers < pp,
            207,
            "parallel.pp",
            pp,
            f"pp({pp}) stages are more than the {model.num_layers} blocks of the model",
            f"Nearest legal: {near}, or model.num_layers={pp}",
        )
    )
    return rows


def _sequence_and_context(cfg: Config, near: str) -> list[_Row]:
    """Rules 221, 222 and 229."""
    model, parallel, length = cfg.model, cfg.parallel, cfg.data.seq_len
    cp, tp, heads, kv = parallel.context, parallel.tp, model.num_heads, kv_heads(model)
    multiple = sequence_multiple(parallel)
    legal = [n for n in (length - length % multiple, length - length % multiple + multiple) if n > 0]
    legal = [n for n in legal if n <= model.max_positions]
    use = f"data.seq_len={' or '.join(map(str, legal))}, or " if legal else ""
    why = f"context({cp}) * tp({tp})" if parallel.sequence else f"context({cp})"
    return [
        (
            length % multiple > 0,
            229,
            "data.seq_len",
            length,
            f"not a multiple of {why} = {multiple}: every rank holds the same number of positions",
            f"Use {use}the nearest legal: {near}",
        ),
        (
            heads % tp == 0 and heads % (cp * tp) > 0,
            221,
            "parallel.context",
            cp,
            f"context({cp}) * tp({tp}) = {cp * tp} does not divide model.num_heads {heads}: in attention every rank "
            "takes the same number of query heads",
            f"Nearest legal: {near}",
        ),
        (
            kv % tp == 0 and not kv_heads_fit(model, cp, tp),
            222,
            "parallel.context",
            cp,
            f"of context({cp}) and the {kv // tp} key/value heads of a tp rank neither divides the other: heads are "
            "shared out, or repeated, evenly",
            f"Nearest legal: {near}",
        ),
    ]


def _copy_engines(cfg: Config) -> list[_Row]:
    """Rules 230 and 231."""
    parallel, cpu, why = cfg.parallel, cfg.train.device is Device.cpu, "copy engines are GPUs', and train.device is cpu"
    copies = parallel.pipeline_transport is Transport.copy_engine
    return [
        (
            cpu and parallel.tp_overlap is TpOverlap.symmetric,
            230,
            "parallel.tp_overlap",
            "symmetric",
            why,
            "Use parallel.tp_overlap=auto",
        ),
        (
            cpu and copies,
            231,
            "parallel.pipeline_transport",
            "copy_engine",
            why,
            "Use parallel.pipeline_transport=auto",
        ),
    ]


def schedule_violations(cfg: Config, world_size: int) -> list[Violation]:
    """What the pipeline schedules ask for of the stages (223..225) and of micro-batches and parts (226..228)."""
    near = nearest_layouts(cfg.parallel, world_size, fits(cfg))
    return _broken([*_stages(cfg, near), *_micro_batches(cfg)])


def _stages(cfg: Config, near: str) -> list[_Row]:
    """Rules 223..225. `near`: the nearest legal layouts."""
    parallel, layers = cfg.parallel, cfg.model.num_layers
    pp, schedule, virtual = parallel.pp, parallel.schedule, parallel.virtual_stages
    parts = parts_per_rank(parallel)
    interleaved = schedule is PipelineSchedule.interleaved
    fewer = f"parallel.virtual_stages={layers // pp}" if interleaved and layers // pp > 1 else _PLAIN
    return [
        (
            pp == 1 and schedule is not PipelineSchedule.one_f_one_b,
            223,
            "parallel.schedule",
            schedule,
            "a schedule of several stages, but pp is 1",
            f"Use {_PLAIN}, or the nearest legal: {near}",
        ),
        (
            interleaved and virtual == 1,
            224,
            "parallel.virtual_stages",
            virtual,
            "with interleaved stages each rank holds at least 2 parts of the model",
            f"Use parallel.virtual_stages=2, or {_PLAIN}",
        ),
        (
            pp <= layers < pp * parts,
            225,
            "parallel.virtual_stages" if interleaved else "parallel.schedule",
            virtual if interleaved else schedule,
            f"pp({pp}) * {parts} parts = {pp * parts} are more than the {layers} blocks of the model",
            f"Use {fewer}, or the nearest legal: {near}",
        ),
    ]


def _micro_batches(cfg: Config) -> list[_Row]:
    """Rules 226..228."""
    parallel, accum = cfg.parallel, cfg.train.accum_steps
    pp, schedule = parallel.pp, parallel.schedule
    interleaved = schedule is PipelineSchedule.interleaved
    groups = accum - accum % pp
    counts = " or ".join(str(n) for n in (groups, groups + pp) if n)
    return [
        (
            interleaved and accum % pp > 0,
            226,
            "train.accum_steps",
            accum,
            f"interleaved stages take micro-batches in groups of pp({pp})",
            f"Use train.accum_steps={counts}, or {_PLAIN}",
        ),
        (
            not interleaved and parallel.virtual_stages > 1,
            227,
            "parallel.virtual_stages",
            parallel.virtual_stages,
            "only the interleaved schedule has a number of parts to choose",
            "Use parallel.virtual_stages=1, or parallel.schedule=interleaved",
        ),
        (
            schedule is PipelineSchedule.dualpipev and pp > 1 and accum < 2 * pp,
            228,
            "train.accum_steps",
            accum,
            f"dualpipev sends micro-batches from both ends: at least 2 * pp({pp}) = {2 * pp}",
            f"Use train.accum_steps={2 * pp}, or {_PLAIN}",
        ),
    ]
