"""Rules about samples and sources: code, option, value, rule and way out are read."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config.enums import Family, SampleKind, SentenceHead
from engine.config.rules import check
from tests.helpers.configs import make

BERT = {"model__family": Family.bert, "model__token_types": 2, "model__sentence_head": SentenceHead.next_sentence}
HEADLESS = {"model__family": Family.bert}
COMPLETION, ROWS = {"data__kind": SampleKind.completion}, {"data__kind": SampleKind.rows}
BLEND = {"data__source": "", "data__blend": {"a": 0.7, "b": 0.3}}

# changes, code, option=value, words of the rule, words of the way out
CASES: list[tuple[dict[str, Any], int, str, str, str]] = [
    (BERT | {"data__document_mask": True}, 360, "data.document_mask=True", "inside documents", "document_mask=false"),
    (BERT | {"data__overlap": 4}, 361, "data.overlap=4", "predicts masked tokens", "Use data.overlap=0"),
    (BERT | {"data__fim_rate": 0.5}, 362, "data.fim_rate=0.5", "predicts masked tokens", "Use data.fim_rate=0"),
    (BERT | COMPLETION, 363, "data.kind=completion", "not the next one", "data.kind=text or rows"),
    ({"data__whole_words": True}, 364, "data.whole_words=True", "the next token", "or model.family=bert"),
    (ROWS, 365, "data.kind=rows", "bert's sentence head", "data.kind=text or completion"),
    (
        {"data__overlap": 32},
        366,
        "data.overlap=32",
        "data.seq_len 32 tokens, and none would be new",
        "Use data.overlap=16, or data.seq_len=64",
    ),
    (
        {"data__valid_fraction": 0.5, "data__test_fraction": 0.5},
        367,
        "data.test_fraction=0.5",
        "with data.valid_fraction 0.5 it holds out 1, and training has none",
        "data.valid_fraction=0.05 data.test_fraction=0.05",
    ),
    (BLEND | {"data__source": "c"}, 368, "data.blend={'a': 0.7, 'b': 0.3}", "data.source=c is set", "Use data=blend"),
    ({"data__source": ""}, 368, "data.source=''", "neither data.source nor data.blend", "Use data.source=FOLDER"),
    (BLEND | {"data__blend": {"a": 1.0, "b": 0.0}}, 369, "data.blend=", "at least 0.0000010 of their sum 1", "larger"),
    (BLEND | {"data__blend": {"a": 1.0, "b": -1.0}}, 369, "data.blend=", "of their sum 0", "larger weights"),
    (BLEND | {"data__blend": {"a": float("inf")}}, 369, "data.blend=", "a finite number", "leave the source out"),
    (HEADLESS | ROWS, 370, "data.kind=rows", "model.sentence_head is none", "model.sentence_head=next_sentence"),
    (COMPLETION | {"data__source": "random"}, 371, "data.kind=completion", "gives text only", "another data.source"),
    ({"data__source": "random", "data__fim_rate": 0.5}, 375, "data.fim_rate=0.5", "no tokens that mark", "fim_rate=0"),
    ({"data__overlap": 4, "data__fim_rate": 0.5}, 372, "data.overlap=4", "do not continue each other", "fim_rate=0"),
    (COMPLETION | {"data__overlap": 4}, 372, "data.overlap=4", "data.kind=completion", "Use data.overlap=0"),
    (COMPLETION | {"data__fim_rate": 0.5}, 373, "data.fim_rate=0.5", "follows its prompt", "or data.kind=text"),
    (BLEND | {"data__blend": {"random": 1, "a": 1}}, 374, "data.blend=", "cannot be blended", "Leave random out"),
]


@pytest.mark.parametrize(("changes", "code", "head", "rule", "way_out"), CASES, ids=[str(c[1]) for c in CASES])
def test_one_broken_rule(changes: dict[str, Any], code: int, head: str, rule: str, way_out: str) -> None:
    (violation,) = check(make(**changes), 1)
    assert str(violation).startswith(f"[OCT{code}] {head}")
    assert rule in violation.rule
    assert way_out in violation.way_out


@pytest.mark.parametrize(
    "changes",
    [
        {"data__document_mask": True, "data__overlap": 31},
        {"data__fim_rate": 1.0, "data__document_mask": True, "data__variable_length": True},
        COMPLETION | {"data__document_mask": True},
        BERT | {"data__whole_words": True},
        BERT | ROWS,
        BLEND,
        BLEND | {"data__blend": {"a": 1.0, "b": 2e-6}},
        {"data__valid_fraction": 0.5, "data__test_fraction": 0.4},
    ],
    ids=str,
)
def test_just_inside_a_rule_is_legal(changes: dict[str, Any]) -> None:
    assert check(make(**changes), 1) == []
