"""The same samples in every layout, after a stop, and on stages that read no text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.data import Split, open_data, prepare
from engine.errors import DataError
from engine.model.batch import IGNORE
from tests.unit.data.data_options import BERTS, GPT, config, make_corpus, sequence_hash

KINDS = {"gpt": GPT} | BERTS
CASES: dict[str, tuple[str, dict[str, object], str]] = {
    "gpt": ("corpus", {}, "gpt"),
    "packed gpt": ("corpus", {"document_mask": True}, "gpt"),
    "masked language model": ("corpus", {"whole_words": True}, "next"),
    "infilled gpt": ("corpus", {"fim_rate": 0.5, "document_mask": True}, "gpt"),
    "random packed gpt": ("random", {"document_mask": True}, "gpt"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layouts")
    make_corpus(root / "corpus", lines=60)
    prepare(config(root), lambda line: None)
    return root


def opened(root: Path, kind: str, seed: int = 0) -> Split:
    source, options, model = CASES[kind]
    path = str(root / "corpus") if source == "corpus" else source
    return open_data(config(root, source=path, seq_len=16, seed=seed, **options), KINDS[model]).train


@pytest.mark.parametrize("kind", CASES)
def test_samples_are_the_same_in_layouts_and_after_a_stop(root: Path, kind: str) -> None:
    split = opened(root, kind)
    plans = [[(4, 1, 20, 8)], [(4, 8, 5, 4)], [(3, 2, 5, 16), (1, 4, 20, 2)]]
    hashes = {sequence_hash(split, plan) for plan in plans}
    assert len(hashes) == 1
    assert sequence_hash(opened(root, kind, seed=1), plans[-1]) not in hashes


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({}, "gpt"),
        ({"document_mask": True}, "gpt"),
        ({"variable_length": True}, "gpt"),
        ({"seq_len": 9}, "one"),
        ({"seq_len": 16}, "next"),
        ({"variable_length": True, "seq_len": 16}, "next"),
    ],
)
def test_a_stage_that_reads_no_text_has_the_same_samples_lengths_and_documents(
    root: Path, options: dict[str, object], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = open_data(config(root, **options), KINDS[model]).train
    place = {"dp_rank": 1, "dp": 2, "micro_batch": 3, "accum_steps": 2, "multiple": 4}
    whole = list(split.micro_batches(12, **place))
    if not ({"document_mask", "variable_length"} & set(options)):
        monkeypatch.setattr("engine.data.samples.stream.Stream.read", None)
    blank = list(split.micro_batches(12, read=False, **place))
    assert len(blank) == len(whole) == 2
    for found, expected in zip(blank, whole, strict=True):
        assert torch.equal(found.samples_B, expected.samples_B)
        assert found.tokens_BS.shape == found.labels_BS.shape == expected.tokens_BS.shape
        assert (found.labels_BS == IGNORE).all() and (found.tokens_BS == 0).all()
        assert (found.lengths_B is None) == (expected.lengths_B is None)
        assert found.lengths_B is None or torch.equal(found.lengths_B, expected.lengths_B)  # type: ignore[arg-type]
        assert (found.documents is None) == (expected.documents is None)
        if found.documents is not None and expected.documents is not None:
            assert torch.equal(found.documents.starts, expected.documents.starts)


def test_a_tokenizer_without_the_tokens_of_a_model_is_refused(root: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_data(config(root, source="random", fim_rate=0.25), GPT)
    message = str(caught.value)
    assert "[OCT460] data.fim_rate=0.25" in message
    assert "<|fim_prefix|> <|fim_middle|> <|fim_suffix|> nor <fim_prefix> <fim_middle> <fim_suffix>" in message
    assert "Use data.fim_rate=0" in message
