"""Fill-in-the-middle: the two forms, their shares, what is cut. Fixed draws, bounded at five standard deviations."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data import open_data, prepare
from engine.data.samples.infill import Infill
from engine.data.samples.windows import Text
from engine.model.batch import IGNORE
from tests.unit.data.data_options import GPT, config, make_corpus, read, same

PRE, MID, SUF, END = 91, 92, 93, 0


def rearranged(rate: float, rows: list[list[int]], starts: list[list[int]], seed: int = 0) -> Text:
    tokens = np.array(rows)
    borders = np.zeros(tokens.shape, dtype=np.bool_)
    for row, places in enumerate(starts):
        borders[row, places] = True
    text = Text(tokens, np.full(len(rows), tokens.shape[1]), np.zeros(len(rows), dtype=np.int64), borders)
    infill = Infill(rate, (PRE, MID, SUF), END, np.uint64(seed))
    return infill.rearranged(text, np.arange(len(rows)))


def restored(piece: list[int]) -> tuple[str, list[int], int, int]:
    """Form, the tokens in their old order, and where the middle began and ended."""
    assert piece.count(PRE) == piece.count(MID) == piece.count(SUF) == 1 and piece[0] == PRE
    suf, mid = piece.index(SUF), piece.index(MID)
    suffix = piece[suf + 1 : mid]
    if suf == 1:
        # Prefix and middle follow each other; only both together are known.
        return "SPM", piece[mid + 1 :] + suffix, -1, len(piece) - mid - 1
    prefix, middle = piece[1:suf], piece[mid + 1 :]
    return "PSM", prefix + middle + suffix, len(prefix), len(prefix) + len(middle)


def test_documents_are_rearranged_at_the_rate_half_in_each_form() -> None:
    body = [*range(1, 11)]
    found = rearranged(0.6, [[*body, END, *[80] * 9]] * 3000, [[11]] * 3000)
    forms, cuts = {"PSM": 0, "SPM": 0}, np.zeros((11, 11))
    for row, starts in zip(found.tokens.tolist(), found.starts, strict=True):  # type: ignore[arg-type]
        stop = int(np.flatnonzero(starts)[0])
        assert row[stop - 1] == END, "the end token stays last"
        if row[0] != PRE:
            assert row[: stop - 1] == body
            continue
        form, tokens, first, second = restored(row[: stop - 1])
        assert tokens == body
        forms[form] += 1
        if form == "PSM":
            cuts[first, second] += 1
    total = sum(forms.values())
    assert abs(total - 1800) < 5 * math.sqrt(3000 * 0.24)
    # Two of the 11 places at random: equal cuts have one chance in 121, others two. PSM with an empty prefix (21 of
    # 121) looks like SPM.
    psm = total * 0.5 * 100 / 121
    assert abs(forms["PSM"] - psm) < 5 * math.sqrt(psm * (1 - psm / total))
    legal = np.triu(np.ones((11, 11), dtype=np.bool_))
    legal[0] = False
    expected = forms["PSM"] * (2 - np.eye(11)) / 100
    statistic = float(((cuts - expected)[legal] ** 2 / expected[legal]).sum())
    assert (cuts[~legal] == 0).all() and abs(statistic - 54) < 5 * math.sqrt(108)


def test_rows_keep_their_length_and_lose_what_the_marks_push_out() -> None:
    found = rearranged(1.0, [[1, 2, 3, END, 4, 5, 6, END, 7, 8, 9, 10]], [[4, 8]])
    row = found.tokens[0].tolist()
    assert len(row) == 12 and found.lengths.tolist() == [12]
    assert found.starts is not None and np.flatnonzero(found.starts[0]).tolist() == [7]
    assert row[6] == END and sorted(set(row[:6])) == [1, 2, 3, PRE, MID, SUF] and row[7] == PRE


def test_rate_zero_and_one_and_purity() -> None:
    rows = [[*range(1, 20)]] * 50
    assert (rearranged(0.0, rows, [[]] * 50).tokens == np.array(rows)).all()
    assert (rearranged(1.0, rows, [[]] * 50).tokens[:, 0] == PRE).all()
    first, other = rearranged(0.5, rows, [[]] * 50), rearranged(0.5, rows, [[]] * 50, seed=1)
    assert (first.tokens == rearranged(0.5, rows, [[]] * 50).tokens).all()
    assert (first.tokens != other.tokens).any()


@pytest.mark.parametrize("options", [{}, {"document_mask": True}, {"variable_length": True}], ids=str)
def test_a_corpus_is_rearranged_with_the_tokenizers_marks(tmp_path: Path, options: dict[str, object]) -> None:
    make_corpus(tmp_path / "corpus")
    cfg = config(tmp_path, seq_len=30, fim_rate=1.0, **options)
    prepare(cfg, lambda line: None)
    data = open_data(cfg, GPT)
    assert data.vocabulary.fim is not None
    prefix, middle, suffix = data.vocabulary.fim
    batch = read(data.train, 20)
    assert batch.length <= 30 and (batch.tokens_BS[:, 0] == prefix).all()
    assert ((batch.labels_BS == middle) | (batch.labels_BS == suffix)).sum(dim=1).min() >= 1
    # The last label of a row that is padded may be a token that the row has not.
    kept = (batch.labels_BS[:, :-1] != IGNORE) & (batch.labels_BS[:, 1:] != IGNORE)
    assert kept.any() and torch.equal(batch.labels_BS[:, :-1][kept], batch.tokens_BS[:, 1:][kept])
    assert same(batch, read(data.train, 20)) and not same(batch, read(data.train, 20, batch=1))
