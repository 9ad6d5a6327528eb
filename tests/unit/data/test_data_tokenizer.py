"""Trained and given tokenizers: the same ids with transformers, lossless and plain text, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from engine.data.tokenizer import folder as module
from engine.data.tokenizer.folder import encode_parts, load_tokenizer, make_tokenizer, pieces
from engine.data.tokenizer.vocabulary import vocabulary_of
from engine.errors import DataError

TEXTS = ["def add(a, b):\n    return a + b\n", "for word in words:\n    print(word)\n", "été, naïve, 你好 🙂\n"] * 3
UNSEEN = ["never seen\t\r\n  words", "ελληνικά 🙂 À", "", *TEXTS]


def corpus() -> Iterator[str]:
    return iter(TEXTS)


def made(folder: Path, spec: str, size: int = 300) -> Path:
    make_tokenizer(spec, size, corpus, folder)
    return folder


def gpt2(root: Path) -> Path:
    """GPT-2's two files, of a small vocabulary."""
    vocab = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"Ġa": 256, "dd": 257, "<|endoftext|>": 258}
    (root / "gpt2").mkdir()
    (root / "gpt2/vocab.json").write_text(json.dumps(vocab))
    (root / "gpt2/merges.txt").write_text("#version: 0.2\nĠ a\nd d\n")
    return root / "gpt2"


def bert(root: Path) -> Path:
    """A BERT vocab.txt."""
    words = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh[]", *(f"##{c}" for c in "abcdefgh")]
    (root / "bert").mkdir()
    (root / "bert/vocab.txt").write_text("\n".join([*words, "cls", "mask", "add"]) + "\n")
    return root / "bert"


def llama(root: Path) -> Path:
    """BPE on characters with a space before each text, byte fallback, and marks as in Code Llama."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghi</>s:()", "▁a", "dd"]
    marks = ["▁<PRE>", "▁<MID>", "▁<SUF>"]
    added = [
        {"id": i, "content": c, "special": i < 3, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False}
        for i, c in enumerate([*vocab[:3], *marks])
    ]
    ids = {piece: number for number, piece in enumerate(dict.fromkeys([*vocab, *marks]))}
    for token in added:
        token["id"] = ids[token["content"]]
    content = {
        "version": "1.0",
        "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": ids, "merges": [["▁", "a"], ["d", "d"]], "byte_fallback": True}
        | {"unk_token": "<unk>", "fuse_unk": True, "dropout": None, "ignore_merges": False},
    }
    (root / "llama").mkdir()
    (root / "llama/tokenizer.json").write_text(json.dumps(content))
    config = {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "unk_token": "<unk>"}
    (root / "llama/tokenizer_config.json").write_text(json.dumps(config))
    return root / "llama"


def unigram(root: Path) -> Path:
    """A Unigram model whose special tokens are pieces like others, as SentencePiece leaves them."""
    pieces_of = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in "▁abcdefghi<>/s"), ("▁a", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces_of, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    (root / "unigram").mkdir()
    tokenizer.save(str(root / "unigram/tokenizer.json"))
    return root / "unigram"


KINDS: dict[str, Callable[[Path], Any]] = {
    "bpe": lambda root: "bpe",
    "wordpiece": lambda root: "wordpiece",
    "gpt2": gpt2,
    "bert": bert,
    "llama": llama,
    "unigram": unigram,
}


@pytest.mark.parametrize("kind", KINDS)
def test_folder_gives_the_same_ids_with_transformers(tmp_path: Path, kind: str) -> None:
    folder = made(tmp_path / "made", str(KINDS[kind](tmp_path)))
    for name in ("gpt2", "bert", "llama", "unigram"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)  # the folder holds all it needs
    ours, theirs, vocabulary = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder), vocabulary_of(folder)
    assert encode_parts(ours, UNSEEN) == [theirs.encode(text, add_special_tokens=False) for text in UNSEEN]
    assert len(theirs) == ours.get_vocab_size() == vocabulary.size
    assert theirs.eos_token_id == vocabulary.end
    assert (theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id) == (
        vocabulary.cls,
        vocabulary.sep,
        vocabulary.mask,
    )
    assert theirs.pad_token_id is not None


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_a_text_are_ordinary_characters(tmp_path: Path, kind: str) -> None:
    folder = made(tmp_path / "made", str(KINDS[kind](tmp_path)))
    tokenizer, vocabulary = load_tokenizer(folder), vocabulary_of(folder)
    unknown = {tokenizer.token_to_id(name) for name in ("[UNK]", "<unk>")}
    names = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    assert names
    for ids in encode_parts(tokenizer, [t for name in names for t in (name, f"a {name} b", f"a{name}b")]):
        assert ids and vocabulary.text[[i for i in ids if i not in unknown]].all()


@pytest.mark.parametrize("spec", ["bpe", "wordpiece"])
def test_training_is_deterministic(tmp_path: Path, spec: str) -> None:
    # Rare characters that tie: more of them than the alphabet keeps.
    rare = ["".join(chr(0x3B1 + (7 * i) % 24 + 0x400 * (i % 3)) for i in range(200))]
    for name in ("one", "two"):
        make_tokenizer(spec, 300, lambda: iter(TEXTS + rare), tmp_path / name)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert set(one) == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert load_tokenizer(tmp_path / "one").get_vocab_size() <= 300


def test_trained_bpe_is_lossless_and_keeps_the_order_of_its_entries(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(made(tmp_path / "made", "bpe", 5000))
    assert 257 <= tokenizer.get_vocab_size() < 400
    for text, ids in zip(UNSEEN, encode_parts(tokenizer, UNSEEN), strict=True):
        assert tokenizer.decode(ids) == text
    names = ["[CLS]", "[SEP]", "[MASK]", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
    # Sorted spellings of the bytes; entry 0 comes before them.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = [chr(byte) for byte in (0xC0, 0xC1, 0xF5, 0xF6, 0xF7, 0xF8)]
    assert [tokenizer.token_to_id(name) for name in names] == [1 + alphabet.index(char) for char in spelled]
    assert tokenizer.token_to_id("<|endoftext|>") == 0


def test_trained_wordpiece_is_uncased_bert(tmp_path: Path) -> None:
    folder = made(tmp_path / "made", "wordpiece")
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.id_to_token(i) for i in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    upper, lower = encode_parts(tokenizer, ["RETURN Été", "return ete"])
    assert upper == lower and all(i > 4 for i in upper)
    pair = AutoTokenizer.from_pretrained(folder)("add", "b")
    assert pair["input_ids"][0] == 2 and pair["input_ids"][-1] == 3 and set(pair["token_type_ids"]) == {0, 1}


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "llama"])
def test_long_texts_give_the_ids_of_the_whole(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(made(tmp_path / "made", str(KINDS[kind](tmp_path))))
    texts = ["".join(TEXTS) * 20, "a\n\n  b\n\n\nadd (a)\n" * 50, "word  word\t" * 99, "end"]
    whole = encode_parts(tokenizer, texts)
    monkeypatch.setattr(module, "_PIECE_CHARS", 128)
    monkeypatch.setattr(module, "_BATCH_CHARS", 300)
    assert encode_parts(tokenizer, texts[:2]) == whole[:2]
    assert encode_parts(tokenizer, texts)[3] == whole[3]


def test_pieces_join_to_the_text_and_end_after_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE_CHARS", 64)
    cut = re.compile(r"\S\n(?=\S)")
    for text in ("", "short", "x" * 1000, "line of text\n" * 50, "x" * 70 + "\nx" + "y" * 70):
        parts = list(pieces(text, cut))
        assert "".join(parts) == text and max(map(len, parts)) <= 64
        assert list(pieces(text, None)) == [text]
    assert all(part.endswith("text\n") for part in pieces("line of text\n" * 50, cut))


def refusal(folder: Path, spec: Path | str, size: int = 300) -> str:
    with pytest.raises(DataError) as caught:
        make_tokenizer(str(spec), size, corpus, folder)
    assert not folder.exists()
    return str(caught.value)


def test_vocabulary_too_small_to_train_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path / "made", "bpe", 256)
    assert "[OCT405] data.vocab_size=256" in message
    assert "data.tokenizer=bpe needs 256 bytes + 1 end-of-text token, at least 257 entries" in message
    assert "Nearest legal: data.vocab_size=257" in message
    assert "Nearest legal: data.vocab_size=64" in refusal(tmp_path / "made", "wordpiece", 63)


def test_given_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path / "made", gpt2(tmp_path), 258)
    assert f"[OCT441] data.tokenizer={tmp_path}/gpt2" in message
    assert "it has 259 entries, more than data.vocab_size=258" in message
    assert "Nearest legal: data.vocab_size=259" in message


def test_absent_and_malformed_tokenizers_are_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path / "made", tmp_path / "nowhere")
    assert "[OCT446]" in message and "no folder or file has this path" in message and "bpe, wordpiece" in message
    (tmp_path / "given").mkdir()
    (tmp_path / "given/tokenizer.json").write_text("{")
    message = refusal(tmp_path / "made", tmp_path / "given")
    assert "[OCT447]" in message and "it cannot be read as a tokenizer" in message and "vocab.txt" in message


def test_pickles_and_code_are_never_loaded(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    trap = tmp_path / "trap"
    code = f"open({str(trap)!r}, 'w').close()"
    (given / "vocab.pkl").write_bytes(f"cbuiltins\nexec\n(S{code!r}\ntR.".encode())
    (given / "tokenizer_config.json").write_text("{}")
    message = refusal(tmp_path / "made", given)
    assert "[OCT447]" in message and "vocab.pkl) none is a vocabulary; pickles are never loaded" in message
    (given / "vocab.pkl").rename(given / "other.txt")
    (given / "own.py").write_text(code)
    auto = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    (given / "tokenizer_config.json").write_text(json.dumps(auto))
    assert "[OCT447]" in refusal(tmp_path / "made", given)
    assert not trap.exists()


def test_tokenizer_without_an_end_and_one_whose_text_spells_its_end_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "t.json"))
    message = refusal(tmp_path / "made", tmp_path / "t.json")
    assert "[OCT448]" in message and "no token that ends a document" in message and "as eos_token" in message
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "b"}')
    message = refusal(tmp_path / "made", tmp_path / "t.json")
    assert "[OCT449]" in message and "a text that holds 'b' would be encoded as the special token 1" in message


def test_missing_and_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder = made(tmp_path / "entry/tokenizer", "bpe")
    renamed = (folder / "tokenizer.json").read_text().replace("<|endoftext|>", "x")
    for content, words in (("{", "cannot be read"), (renamed, "has no entry for the eos_token")):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(DataError) as caught:
            load_tokenizer(folder)
        message = str(caught.value)
        assert f"[OCT406] data.cache_dir={tmp_path}/entry" in message
        assert str(folder / "tokenizer.json") in message and words in message
        assert f"Delete the folder {tmp_path}/entry" in message
    with pytest.raises(DataError) as caught:
        vocabulary_of(folder)
    assert "[OCT406]" in str(caught.value) and "cannot be read" in str(caught.value)
