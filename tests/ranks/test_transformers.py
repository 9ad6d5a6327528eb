"""Cut models against transformers: logits, losses and gradients of BERT, GPT-2 and Llama on four ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from engine import runtime
from engine.checkpoint.gather import gather_to_main
from engine.config import Config, ModelConfig, OptimizerName
from engine.dist.context import ParallelContext
from engine.model.batch import IGNORE, Batch
from engine.model.build import build_layers
from engine.model.layers import logical_tensors
from engine.model.loss import TokenLoss
from engine.plan.stages import stage_bounds
from engine.topology.grid import Coord, Grid
from engine_kernels.ops import Kernels, sdpa_attention
from tests.helpers.hf_models import comparable, inputs_of, relative_errors, with_weights
from tests.helpers.models import BERT, GPT2, LLAMA, batch_of, config_of, layers_of, noisy_weights
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.ranks

# Between the models only the order of sums differs.
TOLERANCE = 1e-5
WORLD, MICRO_BATCHES, ROWS, LENGTH = 4, 2, 2, 16
STAGES = {"parallel__pp": 2, "parallel__tp": 2}
CONTEXT = {"parallel__context": 2, "parallel__tp": 2, "parallel__sequence": True}
# A third block, so that stages differ.
MODELS = [replace(cfg, num_layers=3, norm_eps=1e-3) for cfg in (BERT, GPT2, LLAMA)]
CASES = [*((cfg, STAGES) for cfg in MODELS), (MODELS[0], CONTEXT), (MODELS[2], CONTEXT)]


@dataclass(frozen=True)
class Found:
    """What a rank saw of one case."""

    coord: Coord
    logits: list[Tensor]
    """This rank's part of the logits of each micro-batch; none before the last stage."""
    classes: list[Tensor]
    loss: float
    train_loss: float
    gradients: dict[str, Tensor]
    """On rank 0."""


def whole_batch(cfg: ModelConfig) -> Batch:
    """All samples of the step; the second micro-batch is shorter, which the whole shows as padding."""
    return comparable(cfg, batch_of(cfg, MICRO_BATCHES * ROWS, LENGTH, padded=True))


def micro_batches(cfg: ModelConfig) -> list[Batch]:
    """The rows of `whole_batch` two by two, each pair as long as it needs to be in a multiple of four."""
    whole, found = whole_batch(cfg), []
    for i in range(MICRO_BATCHES):
        rows = slice(ROWS * i, ROWS * (i + 1))
        fields = {name: getattr(whole, name) for name in Batch.__slots__}
        cut = {name: None if value is None else value[rows] for name, value in fields.items()}
        length = LENGTH - 4 * i
        found.append(Batch(**{n: v[:, :length] if v is not None and v.dim() == 2 else v for n, v in cut.items()}))
    assert all((batch.labels_BS != IGNORE).any() for batch in found)
    return found


def configure(cfg: ModelConfig, layout: dict[str, Any]) -> Config:
    config = config_of(cfg, train__micro_batch=ROWS, train__accum_steps=MICRO_BATCHES, **layout)
    config.optim.name, config.optim.clip_norm = OptimizerName.sgd, 0.0
    return config


def rank_of(cases: list[tuple[ModelConfig, dict[str, Any]]], weights: list[dict[str, Tensor]]) -> list[Found]:
    seen: list[Any] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, TokenLoss):
            seen.append(args[0])

    register_module_forward_pre_hook(note)
    found = []
    for (cfg, layout), values in zip(cases, weights, strict=True):
        config = configure(cfg, layout)
        ctx = ParallelContext.create(Grid.from_config(config.parallel, WORLD), torch.device("cpu"))
        layers = build_layers(config, ctx, Kernels(attention=sdpa_attention))
        engine = runtime.build(layers, stage_bounds(config), lambda t, v=values: v[t.name], config, ctx)
        seen.clear()
        loss = float(engine.eval_step(micro_batches(cfg)))
        outputs = [out if isinstance(out, tuple) else (out, None) for out in seen]
        gradients: dict[str, Tensor] = {}
        engine.on_gradients = lambda e=engine, c=ctx, g=gradients: g.update(gather_to_main(e.gradients(), c))
        result = engine.train_step(micro_batches(cfg), 0.1)
        found.append(
            Found(
                ctx.coord,
                [logits.clone() for logits, _ in outputs],
                [classes.clone() for _, classes in outputs if classes is not None],
                loss,
                float(result.loss),
                gradients,
            )
        )
    return found


def together(ranks: list[Found], micro: int) -> Tensor:
    """Logits of a micro-batch from the parts of the ranks: tp along the vocabulary, context along the sequence."""
    parts = {(r.coord.cp, r.coord.tp): r.logits[micro] for r in ranks if r.logits}
    runs = [torch.cat([parts[c, t] for t in range(2)], dim=-1) for c in range(len(parts) // 2)]
    return torch.cat(runs, dim=1)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(scope="module")
def ranks() -> list[list[Found]]:
    """Each case's findings on all ranks."""
    weights = [{n: noisy_weights()(t) for n, t in logical_tensors(layers_of(cfg)).items()} for cfg, _ in CASES]
    by_rank = run_ranks(rank_of, WORLD, (CASES, weights), timeout_s=150)
    return [list(case) for case in zip(*by_rank, strict=True)]


@pytest.mark.parametrize(
    "case", range(len(CASES)), ids=[f"{c.name}-{'pp2-tp2' if s is STAGES else 'context2-tp2'}" for c, s in CASES]
)
def test_four_ranks_compute_what_transformers_does(case: int, ranks: list[list[Found]]) -> None:
    cfg, layout = CASES[case]
    found, whole = ranks[case], whole_batch(cfg)
    theirs = with_weights(cfg, {n: noisy_weights()(t) for n, t in logical_tensors(layers_of(cfg)).items()})
    expected = theirs(**inputs_of(cfg, whole))
    expected.loss.backward()
    classes = getattr(expected, "seq_relationship_logits", None)
    logits = (expected.logits if classes is None else expected.prediction_logits).detach()
    assert sum(bool(rank.logits) for rank in found) == (2 if layout is STAGES else 4), "the last stage has logits"
    for micro, batch in enumerate(micro_batches(cfg)):
        rows = slice(ROWS * micro, ROWS * (micro + 1))
        mine = together(found, micro)[..., : cfg.vocab_size]
        lengths = batch.lengths_B if batch.lengths_B is not None else torch.full((ROWS,), batch.length)
        real_BS = torch.arange(batch.length) < lengths[:, None]
        assert error(mine[real_BS], logits[rows, : batch.length][real_BS]) <= TOLERANCE
        for rank in found:
            # The classes are of the sequence's first token, which only the first context rank has.
            if classes is not None and rank.classes and rank.coord.cp == 0:
                assert error(rank.classes[micro], classes[rows].detach()) <= TOLERANCE
    their_loss = float(expected.loss.detach())
    for rank in found:
        assert abs(rank.loss - their_loss) <= TOLERANCE * their_loss
        assert abs(rank.train_loss - their_loss) <= TOLERANCE * their_loss
    errors = relative_errors(cfg, found[0].gradients, theirs)
    assert {name: value for name, value in errors.items() if not value <= TOLERANCE} == {}
