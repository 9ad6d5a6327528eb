"""Rules for the model, its data and its loss (codes 302..307, 321..323, 350..354)."""

from __future__ import annotations

import math

from engine.config.derived import head_dim, kv_heads, rotary_dim
from engine.config.enums import Family, Positions, Recompute, SentenceHead
from engine.config.layout import divisors
from engine.config.schema import Config, ModelConfig
from engine.errors import Violation

_RANDOM = "random"


def model_violations(model: ModelConfig) -> list[Violation]:
    """Widths, heads and what a family has (302..304, 321..323, 351..354)."""
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
    elif model.positions is Positions.rotary:
        found += _rotary_violations(model)
    return found + _family_violations(model)


def _rotary_violations(model: ModelConfig) -> list[Violation]:
    """Rotary angles turn pairs: of whole heads (304), or of their share `rotary_fraction` (322)."""
    width, turned = head_dim(model), rotary_dim(model)
    if turned >= 2 and turned % 2 == 0:
        return []
    if model.rotary_fraction == 1 or width < 2:
        return [
            Violation(
                code=304,
                option="model.head_dim",
                value=width,
                rule="rotary positions turn pairs of channels, so head_dim is even",
                way_out=f"Use model.head_dim={width + 1}, or model.positions=learned",
            )
        ]
    # Rounded up, because the product with head_dim is rounded down.
    near = f"Use model.rotary_fraction={math.ceil(max(2, turned - 1) / width * 10_000) / 10_000:g}"
    return [
        Violation(
            code=322,
            option="model.rotary_fraction",
            value=model.rotary_fraction,
            rule=f"rotary positions turn pairs of channels, and {turned} of head_dim {width} are no pairs",
            way_out=near if width % 2 else f"{near}, or 1.0",
        )
    ]


def _family_violations(model: ModelConfig) -> list[Violation]:
    """Options that only one family has, and what its parts need of each other (321, 323, 351..354)."""
    bert, types, head = model.family is Family.bert, model.token_types, model.sentence_head
    table = [
        (
            model.positions is Positions.learned and model.rotary_fraction != 1,
            321,
            "model.rotary_fraction",
            model.rotary_fraction,
            "a learned table of positions has no rotary angles",
            "Use model.rotary_fraction=1.0" if bert else "Use model.rotary_fraction=1.0, or model.positions=rotary",
        ),
        (
            bert and model.parallel_residual,
            323,
            "model.parallel_residual",
            model.parallel_residual,
            "the bert family normalises the sum after each sublayer, so that one follows the other",
            "Use model.parallel_residual=false, or model.family=gpt",
        ),
        (
            bert and model.positions is not Positions.learned,
            351,
            "model.positions",
            model.positions,
            "the bert family adds a learned table of positions to its embeddings",
            "Use model.positions=learned, or model.family=gpt",
        ),
        (
            bert and head is not SentenceHead.none and types < 2,
            352,
            "model.sentence_head",
            head,
            f"the two sentences are told apart by their segment embeddings, and token_types is {types}",
            "Use model.token_types=2, or model.sentence_head=none",
        ),
        (
            not bert and types > 0,
            353,
            "model.token_types",
            types,
            "the gpt family has no segment embeddings",
            "Use model.token_types=0, or model.family=bert",
        ),
        (
            not bert and head is not SentenceHead.none,
            354,
            "model.sentence_head",
            head,
            "the gpt family has no sentence head",
            "Use model.sentence_head=none, or model.family=bert",
        ),
    ]
    return [
        Violation(code=code, option=option, value=value, rule=rule, way_out=way_out)
        for broken, code, option, value, rule, way_out in table
        if broken
    ]


def data_violations(cfg: Config) -> list[Violation]:
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


def loss_violations(cfg: Config) -> list[Violation]:
    """Groups of recomputed blocks need whole blocks (350), nested ones several (394), and checkpoints groups (395)."""
    train = cfg.train
    interval, recompute = train.recompute_interval, train.recompute
    whole = recompute is Recompute.full
    table = [
        (
            interval > 1 and not whole,
            350,
            "train.recompute_interval",
            interval,
            f"only whole blocks are recomputed in groups, and train.recompute is {recompute}",
            "Use train.recompute_interval=1, or train.recompute=full",
        ),
        (
            train.recompute_nested and not (whole and interval > 1),
            394,
            "train.recompute_nested",
            True,
            f"it takes groups of at least 2 blocks apart, and train.recompute is {recompute} with groups of {interval}",
            "Use train.recompute_nested=false, or 'train.recompute=full train.recompute_interval=2'",
        ),
        (
            train.recompute_offload and not whole,
            395,
            "train.recompute_offload",
            True,
            f"the inputs of recomputed blocks go to host memory, and train.recompute is {recompute}",
            "Use train.recompute_offload=false, or train.recompute=full",
        ),
    ]
    return [
        Violation(code=code, option=option, value=value, rule=rule, way_out=way_out)
        for broken, code, option, value, rule, way_out in table
        if broken
    ]
