"""Rules between options. All broken rules are returned, so that a config is mended in one go.

Codes 2xx: degrees against the world and against the model. Codes 3xx: model, data, optimizer, training, bridge.
"""

from __future__ import annotations

import re

from engine.config.bounds import bound_violations
from engine.config.deepspeed_keys import KNOWN, OWNED
from engine.config.derived import ffn_size, head_dim, kv_heads, warmup_steps
from engine.config.enums import DType, Positions, Switch
from engine.config.layout import divisors, layout_violations, legal_pairs, legal_tp, nearest_pairs
from engine.config.schema import Config, ModelConfig
from engine.errors import ConfigError, Violation, nearest

_RANDOM = "random"


def require(cfg: Config, world_size: int) -> None:
    """Raise `ConfigError` with every violation of `check`, if there is any."""
    found = check(cfg, world_size)
    if found:
        raise ConfigError(found)


def check(cfg: Config, world_size: int) -> list[Violation]:
    """Every broken rule of `cfg` on `world_size` ranks; none when it can run.

    A rule that relates numbers is not tried on numbers that are themselves out of range.
    """
    bounds = bound_violations(cfg)
    bad = {violation.option for violation in bounds}
    sane_model = not any(option.startswith("model.") for option in bad)
    layout = layout_violations(cfg.parallel, world_size, cfg.model if sane_model else None)
    if sane_model:
        bounds += _model(cfg.model)
        if not any(violation.code == 201 for violation in layout):
            layout += _model_on_grid(cfg, world_size)
    if not any(violation.code == 201 for violation in layout) and "zero.stage" not in bad:
        layout += _zero(cfg, world_size)
    return [*layout, *bounds, *_data(cfg), *_optim(cfg), *_combinations(cfg), *_run(cfg), *_deepspeed_extra(cfg)]


def _model_on_grid(cfg: Config, world_size: int) -> list[Violation]:
    """Tensor parallelism cuts heads and feed-forward evenly (204..206); stages are no more than blocks (207)."""
    model, pp, tp = cfg.model, cfg.parallel.pp, cfg.parallel.tp
    cut = [
        (204, "num_heads", model.num_heads, "query heads"),
        (206, "ffn_size", ffn_size(model), "feed-forward columns"),
    ]
    if model.num_kv_heads is not None:
        cut.insert(1, (205, "num_kv_heads", model.num_kv_heads, "key/value heads"))
    found = [
        Violation(
            code=code,
            option="parallel.tp",
            value=tp,
            rule=f"tp({tp}) does not divide model.{name} {size}: every rank holds the same number of {what}",
            way_out=f"Use a legal tp: {', '.join(map(str, legal_tp(model)))}",
        )
        for code, name, size, what in cut
        if size % tp
    ]
    if model.num_layers < pp:
        found.append(
            Violation(
                code=207,
                option="parallel.pp",
                value=pp,
                rule=f"pp({pp}) stages are more than the {model.num_layers} blocks of the model",
                way_out=f"Nearest legal: {nearest_pairs(pp, tp, world_size, model)}, or model.num_layers={pp}",
            )
        )
    return found


def _zero(cfg: Config, world_size: int) -> list[Violation]:
    """ZeRO 2 and 3 do not work with a pipeline (208)."""
    stage, pp, tp = cfg.zero.stage, cfg.parallel.pp, cfg.parallel.tp
    if stage < 2 or pp == 1:
        return []
    tps = [t for p, t in legal_pairs(world_size, cfg.model) if p == 1]
    best = min(tps, key=lambda t: (abs(t - pp * tp), t), default=1)
    return [
        Violation(
            code=208,
            option="zero.stage",
            value=stage,
            rule=f"with pp({pp}) gradients add up over the micro-batches of a step, so DeepSpeed keeps them whole and "
            f"cannot shard {'them' if stage == 2 else 'them or the parameters'}",
            way_out=f"Use zero.stage=1, or 'parallel.pp=1 parallel.tp={best}'",
        )
    ]


def _model(model: ModelConfig) -> list[Violation]:
    """Widths and heads (302..304)."""
    found = []
    heads, kv, hidden = model.num_heads, kv_heads(model), model.hidden_size
    if heads % kv:
        legal = ", ".join(map(str, divisors(heads)))
        found.append(
            Violation(
                code=302,
                option="model.num_kv_heads",
                value=kv,
                rule=f"{kv} key/value heads do not divide num_heads {heads}: each serves equally many query heads",
                way_out=f"Legal model.num_kv_heads: {legal}",
            )
        )
    if model.head_dim is None and hidden % heads:
        near = sorted(divisors(hidden), key=lambda n: abs(n - heads))[:2]
        found.append(
            Violation(
                code=303,
                option="model.hidden_size",
                value=hidden,
                rule=f"not a multiple of num_heads {heads}, and head_dim is not set",
                way_out=f"Use model.hidden_size={heads * max(1, round(hidden / heads))}, "
                f"model.num_heads={' or '.join(map(str, sorted(near)))}, or set model.head_dim",
            )
        )
    elif model.positions is Positions.rotary and head_dim(model) % 2:
        width = head_dim(model)
        found.append(
            Violation(
                code=304,
                option="model.head_dim",
                value=width,
                rule="rotary positions turn pairs of channels, so head_dim is even",
                way_out=f"Use model.head_dim={width + 1}, or model.positions=learned",
            )
        )
    return found


def _data(cfg: Config) -> list[Violation]:
    """Samples fit the model (305, 306); validation has something to read (307)."""
    found = []
    for code, option, value, name, most in (
        (305, "data.seq_len", cfg.data.seq_len, "model.max_positions", cfg.model.max_positions),
        (306, "data.vocab_size", cfg.data.vocab_size, "model.vocab_size", cfg.model.vocab_size),
    ):
        if value > most:
            rule, way_out = f"more than {name} {most}", f"Use {option}={most}, or {name}={value}"
            found.append(Violation(code=code, option=option, value=value, rule=rule, way_out=way_out))
    if cfg.train.eval_batches > 0 and cfg.data.valid_fraction == 0 and cfg.data.source != _RANDOM:
        found.append(
            Violation(
                code=307,
                option="train.eval_batches",
                value=cfg.train.eval_batches,
                rule="nothing is held out to validate on: data.valid_fraction is 0",
                way_out="Use train.eval_batches=0, or data.valid_fraction=0.05",
            )
        )
    return found


def _optim(cfg: Config) -> list[Violation]:
    """Warm-up ends in time (308) and decay begins after it (309)."""
    found = []
    steps, decay = cfg.train.steps, cfg.optim.decay_steps
    warmup = warmup_steps(cfg.optim, max(steps, 0))
    if warmup > steps:
        found.append(
            Violation(
                code=308,
                option="optim.warmup_steps",
                value=warmup,
                rule=f"the warm-up is longer than the {steps} steps of train.steps",
                way_out=f"Use optim.warmup_steps={max(steps, 0) // 10}, or train.steps={warmup} or more",
            )
        )
    if decay is not None and decay <= warmup:
        found.append(
            Violation(
                code=309,
                option="optim.decay_steps",
                value=decay,
                rule=f"the decay would end before the warm-up does, at step {warmup} (optim.warmup_steps)",
                way_out=f"Use optim.decay_steps={max(steps, warmup + 1)}, or optim.decay_steps=null for train.steps",
            )
        )
    return found


def _combinations(cfg: Config) -> list[Violation]:
    """What DeepSpeed (314) and torch.compile (315) cannot do together with a ZeRO stage."""
    found = []
    stage = cfg.zero.stage
    if stage == 0 and cfg.precision.dtype is DType.bf16:
        found.append(
            Violation(
                code=314,
                option="zero.stage",
                value=stage,
                rule="for a bf16 model only DeepSpeed's ZeRO optimizers add up gradients in fp32 and count every "
                "parameter in the clip norm",
                way_out="Use zero.stage=1, which with dp=1 shards nothing, or precision.dtype=fp32",
            )
        )
    if stage == 3 and cfg.kernels.compile is Switch.on:
        found.append(
            Violation(
                code=315,
                option="kernels.compile",
                value=cfg.kernels.compile,
                rule="zero.stage=3 gathers parameters in hooks inside the blocks, which torch.compile would cut apart",
                way_out="Use kernels.compile=auto, or zero.stage=2",
            )
        )
    return found


def _run(cfg: Config) -> list[Violation]:
    """A run's name is one folder (310); the profile lies inside the run (311)."""
    found = []
    name, start, length, steps = cfg.run.name, cfg.profile.start, cfg.profile.steps, cfg.train.steps
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or set(name) == {"."}:
        clean = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"
        rule = "names one folder: letters, digits, '.', '_' and '-'"
        found.append(Violation(code=310, option="run.name", value=name, rule=rule, way_out=f"Use run.name={clean}"))
    if length > 0 and start + length > steps > 0:
        fits = max(0, steps - length)
        rule = f"profiled steps {start} to {start + length - 1} reach past train.steps {steps}"
        way_out = f"Use profile.start={fits} profile.steps={min(length, steps)}, or train.steps={start + length}"
        found.append(Violation(code=311, option="profile.start", value=start, rule=rule, way_out=way_out))
    return found


def _deepspeed_extra(cfg: Config) -> list[Violation]:
    """Keys that Octant sets (312), and keys that DeepSpeed would ignore (313)."""
    found = []
    for key, value in cfg.runtime.deepspeed_extra.items():
        option = f"runtime.deepspeed_extra.{key}"
        if key in OWNED:
            rule, way_out = "Octant sets this key of DeepSpeed itself", f"Use {OWNED[key]}"
            found.append(Violation(code=312, option=option, value=value, rule=rule, way_out=way_out))
        elif key not in KNOWN:
            rule = "DeepSpeed 0.19 has no such top-level key and would ignore it"
            way_out = nearest(str(key), KNOWN - OWNED.keys())
            found.append(Violation(code=313, option=option, value=value, rule=rule, way_out=way_out))
    return found
