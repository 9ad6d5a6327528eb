"""Rules for the model, its data and its loss (codes 302..307, 350..354)."""

from __future__ import annotations

from engine.config.derived import head_dim, kv_heads
from engine.config.enums import Family, Positions, Recompute, SentenceHead
from engine.config.layout import divisors
from engine.config.schema import Config, ModelConfig
from engine.errors import Violation

_RANDOM = "random"


def model_violations(model: ModelConfig) -> list[Violation]:
    """Widths, heads and what a family has (302..304, 351..354)."""
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
    return found + _family_violations(model)


def _family_violations(model: ModelConfig) -> list[Violation]:
    """Options that only one family has, and what its parts need of each other (351..354)."""
    bert, types, head = model.family is Family.bert, model.token_types, model.sentence_head
    table = [
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
    """Groups of recomputed blocks need whole blocks (350)."""
    interval, recompute = cfg.train.recompute_interval, cfg.train.recompute
    if interval <= 1 or recompute is Recompute.full:
        return []
    return [
        Violation(
            code=350,
            option="train.recompute_interval",
            value=interval,
            rule=f"only whole blocks are recomputed in groups, and train.recompute is {recompute}",
            way_out="Use train.recompute_interval=1, or train.recompute=full",
        )
    ]
