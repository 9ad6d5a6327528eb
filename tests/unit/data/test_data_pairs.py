"""Records with parts: prompts with completions, and texts with classes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config.enums import SampleKind
from engine.data import open_data, prepare
from engine.data.samples.masked import Special
from engine.data.samples.packing import pack
from engine.data.samples.pairs import Classified, Completions, truncated
from engine.errors import DataError
from engine.model.batch import IGNORE
from tests.unit.data.data_options import GPT, NEXT_SENTENCE, config, read, stream

RECORDS = [[[1, 2, 3], [11, 12, 0]], [[4], [13, 0]], [[], [14, 15, 0]], [[5, 6], [0]]]
I = IGNORE  # noqa: E741 - as short as the numbers beside it
SPECIAL = Special(0, 101, 102, 103)


def rows(found: Completions | Classified) -> tuple[list[list[int]], list[list[int]]]:
    every = np.arange(found.num_samples)
    read_rows = found.read(every, every)
    return read_rows.tokens.tolist(), read_rows.labels.tolist()


def test_only_completions_are_predicted(tmp_path: Path) -> None:
    text = stream(tmp_path, RECORDS)
    found = Completions(text, 0, 6, masked=False, variable_length=False)
    tokens, labels = rows(found)
    assert tokens == [[1, 2, 3, 11, 12, 0], [4, 13, 0, 0, 0, 0], [14, 15, 0, 0, 0, 0], [5, 6, 0, 0, 0, 0]]
    assert labels == [[I, I, 11, 12, 0, I], [13, 0, I, I, I, I], [15, 0, I, I, I, I], [I, 0, I, I, I, I]]
    assert (found.cut_prompts, found.cut_completions, found.known_length) == (0, 0, 6)
    short = Completions(text, 0, 6, masked=False, variable_length=True).read(np.array([1, 2]), np.array([1, 2]))
    assert short.tokens.shape == (2, 2) and short.lengths.tolist() == [2, 2]


def test_records_share_rows_in_order_and_see_only_themselves(tmp_path: Path) -> None:
    found = Completions(stream(tmp_path, RECORDS), 0, 7, masked=True, variable_length=False)
    tokens, labels = rows(found)
    assert tokens == [[1, 2, 3, 11, 12, 4, 13], [14, 15, 5, 6, 0, 0, 0]]
    assert labels == [[I, I, 11, 12, 0, 13, 0], [15, 0, I, 0, I, I, I]]
    both = found.read(np.array([1, 0]), np.array([0, 1]))
    assert both.starts is not None and [np.flatnonzero(row).tolist() for row in both.starts] == [[2], [5]]
    assert both.lengths.tolist() == [4, 7]


def test_long_records_lose_the_prompts_beginning_then_the_completions_end(tmp_path: Path) -> None:
    long = [[[1, 2, 3, 4], [11, 12, 0]], [[1, 2, 3], [11, 12, 13, 14, 15, 0]], [[1], [11, 0]]]
    found = Completions(stream(tmp_path, long), 0, 4, masked=False, variable_length=False)
    tokens, labels = rows(found)
    assert tokens == [[3, 4, 11, 12], [3, 11, 12, 13], [1, 11, 0, 0]]
    assert labels == [[I, 11, 12, 0], [11, 12, 13, 14], [11, 0, I, I]]
    assert (found.cut_prompts, found.cut_completions) == (2, 1)


def test_records_without_a_target_are_left_out_and_refused_when_there_are_no_others(tmp_path: Path) -> None:
    text = stream(tmp_path, [[[], [0]], [[1], []]])
    with pytest.raises(DataError) as caught:
        Completions(text, 0, 8, masked=True, variable_length=False)
    assert f"[OCT463] data.kind=completion: no record of {text.path} has a completion to predict" in str(caught.value)
    (tmp_path / "b").mkdir()
    assert (
        Completions(
            stream(tmp_path / "b", [[[], [0]], [[1], [0]]]), 0, 8, masked=False, variable_length=False
        ).num_samples
        == 1
    )


def test_packing_fills_rows_in_order_and_wastes_less_than_a_record() -> None:
    assert pack(np.array([3, 3, 4, 1, 6, 6]), 7).tolist() == [0, 2, 4, 5, 6]
    sizes = np.random.default_rng(0).integers(1, 60, 5000)
    rows_ = pack(sizes, 512)
    filled = np.add.reduceat(sizes, rows_[:-1])
    assert rows_[0] == 0 and rows_[-1] == 5000 and filled.max() <= 512
    assert (filled[:-1] + sizes[rows_[1:-1]] > 512).all() and filled.sum() / filled.size > 0.93 * 512


def test_texts_and_pairs_are_framed_and_cut_longest_first(tmp_path: Path) -> None:
    text = stream(tmp_path, [[[1, 2], [3]], [[1, 2, 3, 4, 5, 6], [7, 8]], [[1, 2, 3], [4, 5, 6, 7]], [[9]]])
    labels = np.array([0.0, 1.0, 1.0, 0.0])
    found = Classified(text, labels, SPECIAL, 8, variable_length=False, label_field="label")
    tokens, targets = rows(found)
    assert tokens[0] == [101, 1, 2, 102, 3, 102, 0, 0] and tokens[1] == [101, 1, 2, 3, 102, 7, 8, 102]
    assert tokens[2] == [101, 1, 2, 3, 102, 4, 5, 102] and tokens[3] == [101, 9, 102, 0, 0, 0, 0, 0]
    assert {label for row in targets for label in row} == {IGNORE}
    every = found.read(np.arange(4), np.arange(4))
    assert every.types is not None and every.types.tolist()[0] == [0, 0, 0, 0, 1, 1, 0, 0]
    assert every.types[3].sum() == 0 and every.lengths.tolist() == [6, 8, 8, 3]
    assert every.sentences is not None and every.sentences.tolist() == [0, 1, 1, 0]


def test_truncation_is_hugging_faces_longest_first() -> None:
    """Token by token: the first text loses one when it is longer, else the second."""
    for first in range(9):
        for second in range(9):
            for room in range(1, 12):
                a, b = first, second
                while a + b > room:
                    a, b = (a - 1, b) if a > b else (a, b - 1)
                found = truncated(np.array([first]), np.array([second]), np.array([room]))
                assert (int(found[0][0]), int(found[1][0])) == (a, b)


@pytest.mark.parametrize(
    ("label", "code", "rule"),
    [
        (0.5, 461, "has the score 0.5, and the model's sentence head takes class labels"),
        (2.0, 462, "has the label 2, and the model's sentence head has the two classes 0 and 1"),
        (-1.0, 462, "has the label -1,"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, label: float, code: int, rule: str) -> None:
    text = stream(tmp_path, [[[1]], [[2]]])
    with pytest.raises(DataError) as caught:
        Classified(text, np.array([1.0, label]), SPECIAL, 8, variable_length=True, label_field="stars")
    message = str(caught.value)
    assert f"[OCT{code}] data.label_field=stars: record 1 of {text.path} {rule}" in message
    assert "Give a field with the classes 0 and 1" in message


def noise(number: int, length: int) -> str:
    """Letters that no tokenizer shortens much."""
    return hashlib.sha256(str(number).encode()).hexdigest()[:length]


def jsonl(path: Path, records: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_completions_of_a_file_are_packed_and_cuts_are_told(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"prompt": noise(i, i % 25), "completion": noise(i, i % 30)} for i in range(40)]
    source = jsonl(tmp_path / "pairs.jsonl", records)
    cfg = config(tmp_path, source=source, kind=SampleKind.completion, document_mask=True, seq_len=24)
    prepare(cfg, lambda line: None)
    data = open_data(cfg, GPT)
    batch = read(data.train, data.train.num_samples)
    assert batch.documents is not None and batch.length == 24
    assert data.train.num_samples < 40 and int((batch.labels_BS == 0).sum()) > 10
    assert any("data.seq_len=24 cuts the beginning of" in note for note in data.notes)


def test_classes_of_a_file_reach_the_sentence_head(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"text": f"t {i}", "other": noise(i, 1 + i), "label": i % 2} for i in range(40)]
    source = jsonl(tmp_path / "rows.jsonl", records)
    cfg = config(tmp_path, source=source, kind=SampleKind.rows, pair_field="other", seq_len=32)
    prepare(cfg, lambda line: None)
    data = open_data(cfg, NEXT_SENTENCE)
    batch = read(data.train, data.train.num_samples)
    assert batch.sentence_B is not None and set(batch.sentence_B.tolist()) == {0, 1}
    assert batch.lengths_B is not None and batch.tokens_BS.shape[1] == 32
    assert torch.equal((batch.tokens_BS == data.vocabulary.sep).sum(dim=1), torch.full((data.train.num_samples,), 2))
    lengths = (batch.token_types_BS == 1).sum(dim=1)  # type: ignore[union-attr]
    assert lengths.unique().numel() > 3
