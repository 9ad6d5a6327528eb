"""Rules for samples: what a family learns from, and where it comes from (360..375)."""

from __future__ import annotations

import math

from engine.config.enums import Family, SampleKind, SentenceHead
from engine.config.schema import Config
from engine.errors import Violation

_RANDOM = "random"
_SMALLEST_SHARE = 2**-20
"""Proportions repeat after at most so many samples, and each source has one."""


def sample_violations(cfg: Config) -> list[Violation]:
    """Every broken rule about samples and their sources."""
    return [*_family_violations(cfg), *_kind_violations(cfg), *_number_violations(cfg), *source_violations(cfg)]


def _table(rows: list[tuple[bool, int, str, object, str, str]]) -> list[Violation]:
    return [
        Violation(code=code, option=option, value=value, rule=rule, way_out=way_out)
        for broken, code, option, value, rule, way_out in rows
        if broken
    ]


def _family_violations(cfg: Config) -> list[Violation]:
    """Options that only one family has (360..365)."""
    data, bert = cfg.data, cfg.model.family is Family.bert
    no_next = "a bert model predicts masked tokens, not the next one"
    no_mask = "a gpt model predicts the next token, not masked ones"
    return _table(
        [
            (
                bert and data.document_mask,
                360,
                "data.document_mask",
                data.document_mask,
                "the bert family has no attention inside documents",
                "Use data.document_mask=false; data.variable_length=true gives each sample one document",
            ),
            (bert and data.overlap > 0, 361, "data.overlap", data.overlap, no_next, "Use data.overlap=0"),
            (bert and data.fim_rate > 0, 362, "data.fim_rate", data.fim_rate, no_next, "Use data.fim_rate=0"),
            (
                bert and data.kind is SampleKind.completion,
                363,
                "data.kind",
                data.kind,
                no_next,
                "Use data.kind=text or rows, or model.family=gpt",
            ),
            (
                not bert and data.whole_words,
                364,
                "data.whole_words",
                data.whole_words,
                no_mask,
                "Use data.whole_words=false, or model.family=bert",
            ),
            (
                not bert and data.kind is SampleKind.rows,
                365,
                "data.kind",
                data.kind,
                "classes of texts are learnt by bert's sentence head",
                "Use data.kind=text or completion, or model.family=bert",
            ),
        ]
    )


def _kind_violations(cfg: Config) -> list[Violation]:
    """What a kind of samples needs, and what it leaves no room for (370..373)."""
    data, model = cfg.data, cfg.model
    plain, rows = data.kind is SampleKind.text, data.kind is SampleKind.rows
    random = _RANDOM in (data.source, *data.blend)
    return _table(
        [
            (
                rows and model.family is Family.bert and model.sentence_head is SentenceHead.none,
                370,
                "data.kind",
                data.kind,
                "the classes are learnt by a sentence head, and model.sentence_head is none",
                "Use model.sentence_head=next_sentence model.token_types=2, or data.kind=text",
            ),
            (
                random and not plain,
                371,
                "data.kind",
                data.kind,
                "the source random gives text only",
                "Use data.kind=text, or another data.source",
            ),
            (
                random and data.fim_rate > 0,
                375,
                "data.fim_rate",
                data.fim_rate,
                "the source random has no tokens that mark prefix, middle and suffix",
                "Use data.fim_rate=0, or another data.source",
            ),
            (
                data.overlap > 0 and (data.fim_rate > 0 or not plain),
                372,
                "data.overlap",
                data.overlap,
                f"the samples of data.kind={data.kind} data.fim_rate={data.fim_rate} do not continue each other",
                "Use data.overlap=0, or data.kind=text data.fim_rate=0",
            ),
            (
                data.fim_rate > 0 and data.kind is SampleKind.completion,
                373,
                "data.fim_rate",
                data.fim_rate,
                "a completion follows its prompt, so records are not rearranged",
                "Use data.fim_rate=0, or data.kind=text",
            ),
        ]
    )


def _number_violations(cfg: Config) -> list[Violation]:
    """A sample has tokens of its own (366), training has documents (367)."""
    data = cfg.data
    held_out = data.valid_fraction + data.test_fraction
    return _table(
        [
            (
                0 < data.seq_len <= data.overlap,
                366,
                "data.overlap",
                data.overlap,
                f"a sample has data.seq_len {data.seq_len} tokens, and none would be new",
                f"Use data.overlap={max(data.seq_len // 2, 0)}, or data.seq_len={2 * data.overlap}",
            ),
            (
                max(data.valid_fraction, data.test_fraction) < 1 <= held_out,
                367,
                "data.test_fraction",
                data.test_fraction,
                f"with data.valid_fraction {data.valid_fraction} it holds out {held_out:g}, and training has none",
                "Use data.valid_fraction=0.05 data.test_fraction=0.05",
            ),
        ]
    )


def source_violations(cfg: Config) -> list[Violation]:
    """One source or a blend of several (368), each of which is drawn from (369) and has text (374)."""
    source, blend = cfg.data.source, cfg.data.blend
    total = math.fsum(blend.values())
    small = [weight for weight in blend.values() if not weight / (total or 1.0) >= _SMALLEST_SHARE]
    return _table(
        [
            (
                bool(source) and bool(blend),
                368,
                "data.blend",
                blend,
                f"data.source={source} is set too",
                "Use data=blend, which has no data.source, or data.blend={}",
            ),
            (
                not source and not blend,
                368,
                "data.source",
                "''",
                "neither data.source nor data.blend says what to read",
                "Use data.source=FOLDER, or data.blend={FOLDER:0.7,OTHER:0.3}",
            ),
            (
                bool(small) or not math.isfinite(total),
                369,
                "data.blend",
                blend,
                f"a weight is a finite number, at least {_SMALLEST_SHARE:.7f} of their sum {total:g}",
                "Use larger weights, or leave the source out",
            ),
            (
                _RANDOM in blend,
                374,
                "data.blend",
                blend,
                "random tokens cannot be blended with text",
                "Leave random out, or use data.source=random without data.blend",
            ),
        ]
    )
