"""Rules between options. All broken rules are returned, so that a config is mended in one go.

Codes 2xx: degrees against the world and against the model. Codes 3xx: model, data, optimizer, training, bridge.
"""

from __future__ import annotations

from engine.config.batch import batch_violations, settle
from engine.config.bounds import bound_violations
from engine.config.layout import layout_violations
from engine.config.rules_data import sample_violations
from engine.config.rules_kernels import graph_violations
from engine.config.rules_memory import memory_violations, zero_violations
from engine.config.rules_model import data_violations, loss_violations, model_violations
from engine.config.rules_parallel import RELATED, cut_violations, fits, schedule_violations
from engine.config.rules_precision import fp8_violations
from engine.config.rules_run import extra_violations, optim_violations, run_violations, state_violations
from engine.config.schema import Config
from engine.errors import ConfigError, Violation


def require(cfg: Config, world_size: int) -> None:
    """Raise `ConfigError` with every violation of `check`, if there is any."""
    found = check(cfg, world_size)
    if found:
        raise ConfigError(found)


def check(cfg: Config, world_size: int) -> list[Violation]:
    """Every broken rule of `cfg` on `world_size` ranks; none when it can run.

    The batch is settled first: see `batch.settle`. A rule that relates numbers is not tried on numbers that are
    themselves out of range.
    """
    settle(cfg, world_size)
    bounds = bound_violations(cfg)
    bad = {violation.option for violation in bounds}
    sane_model = not any(option.startswith("model.") for option in bad)
    related = sane_model and bad.isdisjoint(RELATED)
    layout = layout_violations(cfg.parallel, world_size, fits(cfg) if related else None)
    degrees = not any(violation.code == 201 for violation in layout)
    if degrees and related:
        layout += [*cut_violations(cfg, world_size), *schedule_violations(cfg, world_size)]
    if degrees and "zero.stage" not in bad:
        layout += zero_violations(cfg, world_size, fits(cfg) if related else None)
    model = model_violations(cfg.model) if sane_model else []
    return [
        *layout,
        *bounds,
        *model,
        *data_violations(cfg),
        *sample_violations(cfg),
        *optim_violations(cfg),
        *memory_violations(cfg),
        *fp8_violations(cfg, sized=degrees and related),
        *loss_violations(cfg),
        *(batch_violations(cfg, world_size) if degrees else []),
        *(graph_violations(cfg, world_size) if degrees else []),
        *run_violations(cfg),
        *state_violations(cfg),
        *extra_violations(cfg),
    ]
