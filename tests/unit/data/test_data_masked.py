"""BERT's samples: special tokens, masks, segments, classes. Each statistic is a fixed draw, bounded at five standard
deviations: a right implementation with another seed fails one of them with a probability of 6e-7.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config.schema import ModelConfig
from engine.data import Data, open_data, prepare
from engine.data.samples.draws import row_keys
from engine.data.samples.masked import Masking, Special
from engine.data.tokenizer.vocabulary import Vocabulary
from engine.errors import DataError
from engine.model.batch import IGNORE, Batch
from tests.unit.data.data_options import (
    BERTS,
    GPT,
    NEXT_SENTENCE,
    ONE_SEGMENT,
    SENTENCE_ORDER,
    TWO_SEGMENTS,
    config,
    read,
    tokens_of,
)

SEQ_LEN = 32


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("masked")
    (root / "corpus").mkdir()
    for i in range(40):
        text = " ".join(f"word{(i * 7 + k * k) % 91} number{k}" for k in range(1 + 3 * (i % 9)))
        (root / "corpus" / f"{i:02}.txt").write_text(text)
    prepare(config(root), lambda line: None)
    return root


def opened(root: Path, model: ModelConfig, **changes: object) -> Data:
    return open_data(config(root, **{"seq_len": SEQ_LEN, **changes}), model)


def original(batch: Batch) -> Tensor:
    """The tokens before masking."""
    return torch.where(batch.labels_BS != IGNORE, batch.labels_BS, batch.tokens_BS)


def near(count: int, total: int, share: float) -> bool:
    """Whether `count` of `total` is a share within five standard deviations."""
    return abs(count - total * share) < 5 * math.sqrt(total * share * (1 - share))


def test_both_families_share_tokenizer_and_tokens(root: Path) -> None:
    gpt, bert = opened(root, GPT), opened(root, NEXT_SENTENCE)
    assert gpt.folder == bert.folder and gpt.fingerprint == bert.fingerprint


@pytest.mark.parametrize("source", ["corpus", "random"])
@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("kind", BERTS)
def test_rows_have_the_form_of_the_paper(root: Path, kind: str, variable: bool, source: str) -> None:
    model, path = BERTS[kind], str(root / "corpus") if source == "corpus" else source
    data = opened(root, model, source=path, variable_length=variable)
    special = data.vocabulary
    batch = read(data.train, 60)
    lengths = [batch.length] * 60 if batch.lengths_B is None else batch.lengths_B.tolist()
    assert (batch.lengths_B is not None) == variable and (len(set(lengths)) > 3) == variable
    assert batch.length == max(lengths) <= SEQ_LEN and (variable or batch.length == SEQ_LEN)
    assert (batch.token_types_BS is None) == (kind == "one")
    assert (batch.sentence_B is None) == (kind in ("one", "two"))
    for r, (row, length) in enumerate(zip(original(batch).tolist(), lengths, strict=True)):
        assert row[0] == special.cls and row[length - 1] == special.sep
        separators = [i for i, token in enumerate(row) if token == special.sep]
        assert len(separators) == (1 if kind == "one" else 2)
        assert separators[0] >= 2 and (kind == "one" or separators[1] >= separators[0] + 2)
        assert row.count(special.cls) == 1 and special.mask not in row
        assert row[length:] == [0] * (batch.length - length)
        if batch.token_types_BS is not None:
            border = separators[0] + 1
            expected = [0] * border + [1] * (length - border) + [0] * (batch.length - length)
            assert batch.token_types_BS[r].tolist() == expected


@pytest.mark.parametrize("rate", [0.01, 0.15, 0.5])
def test_a_rounded_share_of_the_text_is_masked_and_nothing_else(root: Path, rate: float) -> None:
    data = opened(root, NEXT_SENTENCE, mask_rate=rate)
    special = data.vocabulary
    batch = read(data.train, 60)
    text = torch.from_numpy(special.text)[original(batch)]
    chosen = batch.labels_BS != IGNORE
    assert not (chosen & ~text).any()
    expected = [max(1, math.floor(rate * count + 0.5)) for count in text.sum(dim=1).tolist()]
    assert chosen.sum(dim=1).tolist() == expected
    assert (batch.tokens_BS[~chosen] != special.mask).all()


def test_masked_tokens_become_mask_random_or_stay(root: Path) -> None:
    data = opened(root, ONE_SEGMENT)
    special = data.vocabulary
    batch = read(data.train, 2000)
    chosen = batch.labels_BS != IGNORE
    seen, wanted = batch.tokens_BS[chosen], batch.labels_BS[chosen]
    total = len(seen)
    masked, kept = int((seen == special.mask).sum()), int((seen == wanted).sum())
    assert near(masked, total, 0.8)
    # A random token is by chance the right one in 1 / V of the cases.
    by_chance = 0.1 / special.text.sum()
    assert near(kept, total, 0.1 + by_chance) and near(total - masked - kept, total, 0.1 - by_chance)
    random = set(seen[(seen != special.mask) & (seen != wanted)].tolist())
    assert random <= set(np.flatnonzero(special.text).tolist()) and len(random) > 0.7 * special.text.sum()
    # Places: no position of the text is chosen more often than another.
    places = chosen.sum(dim=0).tolist()
    assert places[0] == places[-1] == 0
    assert all(near(count, 2000, sum(places) / (2000 * (SEQ_LEN - 2))) for count in places[1:-1])


@pytest.mark.parametrize("kind", ["next", "order"])
def test_classes_mean_what_they_say(root: Path, kind: str) -> None:
    stride = SEQ_LEN - 3
    file = tokens_of(opened(root, GPT).folder / "valid")
    windows = [file[i : i + stride] for i in range(0, len(file) - stride + 1, stride)]
    starts = set()
    for seed in range(12):
        split = opened(root, BERTS[kind], seed=seed).valid
        assert split is not None and split.num_samples == len(windows)
        batch = read(split, len(windows))
        assert batch.sentence_B is not None and batch.token_types_BS is not None
        assert set(batch.sentence_B.tolist()) == {0, 1}
        for i, row in enumerate(original(batch).tolist()):
            border = batch.token_types_BS[i].tolist().index(1)
            a, b = row[1 : border - 1], row[border:-1]
            if batch.sentence_B[i] == 0:
                assert a + b == windows[i]
            elif kind == "order":
                assert b + a == windows[i]
            else:
                assert a == windows[i][: len(a)] and len(a) + len(b) == stride
                others = [w for j, w in enumerate(windows) if j != i]
                places = [k for w in others for k in range(stride - len(b) + 1) if w[k : k + len(b)] == b]
                assert places
                starts.add(places[0])
    assert kind == "order" or len(starts) > stride / 2


@pytest.mark.parametrize("kind", ["next", "order"])
def test_half_of_the_pairs_are_of_each_class_and_borders_lie_anywhere(root: Path, kind: str) -> None:
    batch = read(opened(root, BERTS[kind], source="random", seq_len=9).train, 2000)
    assert batch.sentence_B is not None and batch.token_types_BS is not None
    assert near(int(batch.sentence_B.sum()), 2000, 0.5)
    for length_a in range(1, 6):
        count = int((batch.token_types_BS.sum(dim=1) == 9 - 2 - length_a).sum())
        assert near(count, 2000, 0.2)


def test_segments_without_a_sentence_head_follow_each_other(root: Path) -> None:
    split = opened(root, TWO_SEGMENTS).valid
    assert split is not None
    batch = read(split, split.num_samples)
    assert batch.token_types_BS is not None
    file = tokens_of(opened(root, GPT).folder / "valid")
    text: list[int] = []
    for row, types in zip(original(batch).tolist(), batch.token_types_BS.tolist(), strict=True):
        border = types.index(1)
        text += row[1 : border - 1] + row[border:-1]
    assert text == file[: len(text)]


def test_another_epoch_masks_the_same_text_elsewhere(root: Path) -> None:
    split = opened(root, ONE_SEGMENT).train
    n = split.num_samples
    first, second = read(split, n, 0), read(split, n, 1)
    by_text = [
        {tuple(text): labels for text, labels in zip(original(b).tolist(), b.labels_BS.tolist(), strict=True)}
        for b in (first, second)
    ]
    assert by_text[0].keys() == by_text[1].keys()
    again = sum(by_text[0][text] == by_text[1][text] for text in by_text[0])
    assert again < len(by_text[0]) / 10


def test_validation_is_masked_the_same_every_time_but_unlike_training(root: Path) -> None:
    data = opened(root, ONE_SEGMENT, source="random")
    assert data.valid is not None
    train, valid = read(data.train, 8), read(data.valid, 8)
    assert torch.equal(valid.labels_BS, read(data.valid, 8).labels_BS)
    assert not torch.equal(train.labels_BS != IGNORE, valid.labels_BS != IGNORE)


def test_each_row_draws_its_own_masks() -> None:
    """No two of 400 equal rows are masked alike, in whatever micro-batch they are."""
    tokens, numbers = np.tile(np.arange(20, 60), (400, 1)), np.arange(400)
    masking = Masking(WORDS, SPECIAL, 0.5, whole_words=False)
    whole = masking.apply(tokens.copy(), row_keys(np.uint64(1), numbers))
    assert len({row.tobytes() for row in whole}) == 400
    assert (masking.apply(tokens[:1].copy(), row_keys(np.uint64(1), numbers[7:8]))[0] == whole[7]).all()
    assert (masking.apply(tokens.copy(), row_keys(np.uint64(2), numbers)) != whole).any(axis=1).all()


IDS = np.arange(100)
# Words of two tokens begin at even ids.
WORDS = Vocabulary(100, 0, 1, 2, 3, None, IDS >= 10, (IDS < 10) | (IDS % 2 == 0))
SPECIAL = Special(0, 1, 2, 3)


@pytest.mark.parametrize("rate", [0.01, 0.15, 0.4, 0.95])
def test_whole_words_are_masked_until_the_rate_is_reached(rate: float) -> None:
    row = [1, 11, 20, 21, 30, 31, 33, 35, 40, 42, 43, 2, 45, 50, 51, 60, 2, 0, 0]
    words = [[1], [2, 3], [4, 5, 6, 7], [8], [9, 10], [12], [13, 14], [15]]
    tokens = np.tile(row, (2000, 1))
    labels = Masking(WORDS, SPECIAL, rate, whole_words=True).apply(tokens, row_keys(np.uint64(0), np.arange(2000)))
    wanted = max(1, math.floor(rate * 14 + 0.5))
    firsts = np.zeros(len(words))
    for label in labels:
        chosen = set(np.flatnonzero(label != IGNORE).tolist())
        masked = [set(word) for word in words if set(word) & chosen]
        assert set().union(*masked) == chosen and all(label[i] == row[i] for i in chosen)
        assert len(chosen) >= wanted and any(len(chosen) - len(word) < wanted for word in masked)
        if wanted == 1:
            assert len(masked) == 1
            firsts += [set(word) == masked[0] for word in words]
    if wanted == 1:
        assert all(near(int(count), 2000, 1 / len(words)) for count in firsts)
    seen = tokens[labels != IGNORE]
    assert near(int((seen == 3).sum()), len(seen), 0.8)


def test_a_row_without_text_has_no_target() -> None:
    tokens = np.array([[1, 2, 0, 0], [1, 20, 2, 0]])
    labels = Masking(WORDS, SPECIAL, 0.15, whole_words=True).apply(tokens, row_keys(np.uint64(0), np.arange(2)))
    assert (labels[0] == IGNORE).all() and labels[1].tolist() == [IGNORE, 20, IGNORE, IGNORE]


def test_a_tokenizer_without_bert_tokens_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = replace(opened(root, GPT).vocabulary, sep=None, mask=None)
    monkeypatch.setattr("engine.data.source.vocabulary_of", lambda folder: lacking)
    with pytest.raises(DataError) as caught:
        opened(root, ONE_SEGMENT)
    message = str(caught.value)
    assert "[OCT464] data.tokenizer=bpe" in message
    assert "needs [CLS], [SEP] and [MASK], and the tokenizer has no [SEP] and [MASK]" in message
    assert "Use data.tokenizer=wordpiece or bpe" in message


@pytest.mark.parametrize(
    ("kind", "legal", "form"), [("one", 3, "[CLS] A [SEP],"), ("next", 5, "[CLS] A [SEP] B [SEP],")]
)
def test_sample_length_without_room_for_text_is_refused(root: Path, kind: str, legal: int, form: str) -> None:
    for source in ("random", str(root / "corpus")):
        with pytest.raises(DataError) as caught:
            opened(root, BERTS[kind], source=source, seq_len=legal - 1)
        message = str(caught.value)
        assert f"[OCT417] data.seq_len={legal - 1}" in message
        assert f"{form} at least {legal} tokens" in message
        assert f"Nearest legal: data.seq_len={legal}" in message
        batch = read(opened(root, BERTS[kind], source=source, seq_len=legal).train, 4)
        assert batch.tokens_BS.shape == (4, legal)


def test_next_sentence_without_another_sample_is_refused(root: Path) -> None:
    count = len(tokens_of(opened(root, GPT).folder / "valid"))
    length = count + 3
    with pytest.raises(DataError) as caught:
        opened(root, NEXT_SENTENCE, seq_len=length)
    message = str(caught.value)
    assert "[OCT419] model.sentence_head=next_sentence" in message
    assert f"valid has one of data.seq_len {length}" in message
    legal = count // 2 + 3
    assert f"Nearest legal: data.seq_len={legal}, or model.sentence_head=sentence_order" in message
    for model, seq_len, samples in ((SENTENCE_ORDER, length, 1), (NEXT_SENTENCE, legal, 2)):
        valid = opened(root, model, seq_len=seq_len).valid
        assert valid is not None and valid.num_samples == samples


def test_random_vocabulary_without_text_is_refused(root: Path) -> None:
    with pytest.raises(DataError) as caught:
        opened(root, ONE_SEGMENT, source="random", vocab_size=4)
    message = str(caught.value)
    assert "[OCT420] data.vocab_size=4" in message
    assert "takes ids from 4 on: 0 is padding, then [CLS], [SEP] and [MASK]" in message
    assert "Nearest legal: data.vocab_size=5" in message
    batch = read(opened(root, ONE_SEGMENT, source="random", vocab_size=5).train, 2)
    assert original(batch)[:, 1:-1].unique().tolist() == [4]
