"""What is known of the entries: text, words, special tokens, marks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.tokenizer.folder import encode_parts, load_tokenizer, make_tokenizer
from engine.data.tokenizer.vocabulary import Vocabulary, vocabulary_of

TEXT = "The quick_brown fox's 12 jumps:\n\tnaïve 你好 (x)\n" * 3


def made(root: Path, spec: str, size: int = 300) -> tuple[Vocabulary, dict[str, int]]:
    make_tokenizer(spec, size, lambda: iter([TEXT]), root / "made")
    return vocabulary_of(root / "made"), load_tokenizer(root / "made").get_vocab()


def test_trained_bpe(tmp_path: Path) -> None:
    vocabulary, entries = made(tmp_path, "bpe")
    assert vocabulary.size == len(entries) > 257 and vocabulary.end == 0
    assert (vocabulary.cls, vocabulary.sep, vocabulary.mask) == tuple(entries[f"[{n}]"] for n in ("CLS", "SEP", "MASK"))
    assert vocabulary.fim == tuple(entries[f"<|fim_{n}|>"] for n in ("prefix", "middle", "suffix"))
    # The end, six marks, and the other seven bytes that UTF-8 never has.
    assert vocabulary.size - vocabulary.text.sum() == 14
    assert vocabulary.text.dtype == vocabulary.word_start.dtype == np.bool_
    (ids,) = encode_parts(load_tokenizer(tmp_path / "made"), [TEXT])
    assert vocabulary.text[ids].all()


@pytest.mark.parametrize(
    ("names", "begins"),
    [(["Ġ", "Ċ", "ĉ", "ġ", "(", ":", "'", "č"], True), (["T", "e", "1", "_", "Ã", "ł", "Ń", "¯", "Ģ"], False)],
)
def test_words_of_bytes_begin_at_space_and_punctuation(tmp_path: Path, names: list[str], begins: bool) -> None:
    vocabulary, entries = made(tmp_path, "bpe")
    assert {name: bool(vocabulary.word_start[entries[name]]) for name in names} == dict.fromkeys(names, begins)
    assert vocabulary.word_start[~vocabulary.text].all()


def test_words_of_bytes_are_those_of_the_text(tmp_path: Path) -> None:
    vocabulary, _ = made(tmp_path, "bpe")
    tokenizer = load_tokenizer(tmp_path / "made")
    (ids,) = encode_parts(tokenizer, ["quick_brown fox's (naïve"])
    groups = np.split(np.array(ids), np.flatnonzero(vocabulary.word_start[ids][1:]) + 1)
    words = [tokenizer.decode(group.tolist()) for group in groups]
    assert "".join(words) == "quick_brown fox's (naïve"
    assert words[:3] == ["quick_brown", " fox", "'s"] and words[-1].endswith("naïve")


def test_trained_wordpiece(tmp_path: Path) -> None:
    vocabulary, entries = made(tmp_path, "wordpiece")
    assert (vocabulary.end, vocabulary.cls, vocabulary.sep, vocabulary.mask, vocabulary.fim) == (3, 2, 3, 4, None)
    assert vocabulary.text.tolist() == [False] * 5 + [True] * (vocabulary.size - 5)
    for name, entry in entries.items():
        assert vocabulary.word_start[entry] == (not name.startswith("##")), name


def given(root: Path, model: dict[str, Any], added: list[tuple[str, bool]], config: dict[str, Any]) -> Path:
    """A tokenizer.json of `model`, whose vocabulary is followed by `added` tokens (content, special)."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = [
        {"id": len(model["vocab"]) + i, "content": content, "special": special, **flags}
        for i, (content, special) in enumerate(added)
    ]
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    spelling = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content = {"version": "1.0", **parts, "pre_tokenizer": spelling, "decoder": spelling, "model": model}
    root.mkdir()
    (root / "tokenizer.json").write_text(json.dumps({**content, "added_tokens": tokens}))
    (root / "tokenizer_config.json").write_text(json.dumps(config))
    return root


@pytest.mark.parametrize(
    "marks",
    [
        ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
        ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
        ("<PRE>", "<MID>", "<SUF>"),
    ],
)
def test_given_marks_and_roles(tmp_path: Path, marks: tuple[str, str, str]) -> None:
    from tokenizers import pre_tokenizers

    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    # Qwen's files do not call their marks special.
    added = [("<|stop|>", True), *((mark, False) for mark in marks), ("<mask>", True), ("tool", False)]
    config = {"eos_token": {"content": "<|stop|>"}, "mask_token": "<mask>", "cls_token": None, "sep_token": "absent"}
    vocabulary, entries = made(tmp_path, str(given(tmp_path / "given", model, added, config)))
    assert vocabulary.end == 256 and vocabulary.mask == entries["<mask>"] == 260 and vocabulary.size == 262
    assert vocabulary.fim == (257, 258, 259)
    assert vocabulary.cls is None and vocabulary.sep is None
    assert not vocabulary.text[256:261].any() and vocabulary.text[261]
    (ids,) = encode_parts(load_tokenizer(tmp_path / "made"), ["".join(marks)])
    assert max(ids) < 256


def test_placeholders_and_unused_bytes_are_no_text(tmp_path: Path) -> None:
    words = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    vocabulary, _ = made(tmp_path, str(tmp_path / "vocab.txt"))
    assert vocabulary.text.tolist() == [False] * 6 + [True, True]
    assert vocabulary.word_start.tolist() == [True] * 7 + [False]
