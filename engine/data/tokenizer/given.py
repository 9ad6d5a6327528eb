"""Tokenizers that are given: read from the files of Hugging Face, GPT-2 and BERT, and made fit for training.

Pickles and code that comes with a tokenizer are never loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.data.tokenizer.train import BERT_CONFIG, TRAINERS, add_bert_template, bert_tokenizer
from engine.data.tokenizer.vocabulary import (
    FIM,
    ROLES,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    entries_of,
    given_path,
    roles_in,
)
from engine.errors import DataError

_USUAL = {
    "eos_token": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]"),
    "cls_token": ("[CLS]", "<cls>"),
    "sep_token": ("[SEP]", "<sep>"),
    "mask_token": ("[MASK]", "<mask>"),
    "pad_token": ("[PAD]", "<pad>", "<|padding|>"),
    "unk_token": ("[UNK]", "<unk>"),
}
"""Names by which a role is found when no file tells."""
_KEPT = ("chat_template", "clean_up_tokenization_spaces", "model_input_names", "model_max_length", "padding_side")
_UNLIKELY = -1000.0
"""Log-probability of a special token as a piece of text."""
_CONVERTED = frozenset({".model", ".json", ".txt", ".tiktoken"})
"""Files that transformers makes a tokenizer of."""


def given_tokenizer(spec: str, vocab_size: int) -> tuple[Tokenizer, dict[str, object]]:
    """The tokenizer at the path `spec`, which keeps its ids, and its tokenizer_config.json.

    Raises DataError 441, 446 to 449, as `make_tokenizer`.
    """
    path = given_path(spec)
    if not os.path.exists(path):
        way_out = f"Give a tokenizer folder, a tokenizer.json, or one of {', '.join(TRAINERS)}, which are trained"
        raise _refuse(446, spec, f"no folder or file has this path, seen from {Path.cwd()}", way_out)
    folder = path if path.is_dir() else path.parent
    try:
        config = _config(folder)
        read = _reader(path)
        content = json.loads(read(path, config).to_str())
        entries = entries_of(content)
        if not entries:
            raise ValueError("its vocabulary is empty")
    except Exception as error:  # both libraries raise whatever a malformed file leads to
        reason = str(error).strip().split("\n")[0]
        way_out = "Give a folder with tokenizer.json, with vocab.json and merges.txt, or with vocab.txt"
        rule = f"it cannot be read as a tokenizer ({type(error).__name__}: {reason})"
        raise _refuse(447, spec, rule, way_out) from error
    size = max(entries.values()) + 1
    if size > vocab_size:
        rule = f"it has {size} entries, more than data.vocab_size={vocab_size}"
        raise _refuse(441, spec, rule, f"Nearest legal: data.vocab_size={size}, and model.vocab_size at least that")
    roles = _roles(spec, config, entries)
    tokenizer = _guarded(content, roles)
    _check_text(spec, tokenizer, content)
    return tokenizer, {**{key: config[key] for key in _KEPT if key in config}, **roles}


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", TOKENIZER_CONFIG):
        if (folder / name).is_file():
            config |= json.loads((folder / name).read_text(encoding="utf-8"))
    return config


def _reader(path: Path) -> Callable[[Path, dict[str, Any]], Tokenizer]:
    if path.is_file():
        return _read_bert if path.suffix == ".txt" else _read_json
    if (path / TOKENIZER_JSON).is_file():
        return lambda folder, config: _read_json(folder / TOKENIZER_JSON, config)
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return _read_gpt2
    if (path / "vocab.txt").is_file() and not any(path.glob("*.model")):
        return lambda folder, config: _read_bert(folder / "vocab.txt", config)
    return _read_converted


def _read_json(path: Path, config: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(path.read_text(encoding="utf-8"))


def _read_gpt2(folder: Path, config: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _read_bert(path: Path, config: dict[str, Any]) -> Tokenizer:
    model = models.WordPiece.from_file(str(path), unk_token="[UNK]")
    lowercase, accents = config.get("do_lower_case", True), config.get("strip_accents")
    tokenizer = bert_tokenizer(model, lowercase=lowercase, strip_accents=accents)
    if tokenizer.token_to_id("[UNK]") is None:
        raise ValueError("a WordPiece vocabulary has an entry [UNK]")
    if tokenizer.token_to_id("[CLS]") is not None and tokenizer.token_to_id("[SEP]") is not None:
        add_bert_template(tokenizer)
    config.setdefault("model_input_names", BERT_CONFIG["model_input_names"])
    return tokenizer


def _read_converted(folder: Path, config: dict[str, Any]) -> Tokenizer:
    """A slow tokenizer, as transformers converts it."""
    names = sorted(file.name for file in folder.iterdir())
    if not any(Path(name).suffix in _CONVERTED and not name.endswith("config.json") for name in names):
        raise ValueError(f"of its files ({', '.join(names) or 'none'}) none is a vocabulary; pickles are never loaded")
    from transformers import AutoTokenizer

    slow = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    if not hasattr(slow, "backend_tokenizer"):
        raise ValueError(f"transformers cannot convert {type(slow).__name__} to a fast tokenizer")
    config.update({key: getattr(slow, key) for key in ROLES if getattr(slow, key, None)})
    return slow.backend_tokenizer


def _roles(spec: str, config: dict[str, Any], entries: dict[str, int]) -> dict[str, object]:
    roles: dict[str, object] = {key: name for key, name in roles_in(config).items() if name in entries}
    for key, names in _USUAL.items():
        known = [name for name in names if name in entries]
        if key not in roles and known:
            roles[key] = known[0]
    if "eos_token" not in roles:
        rule = f"it has no token that ends a document: no eos_token, and none of {', '.join(_USUAL['eos_token'])}"
        raise _refuse(448, spec, rule, f"Name one of its tokens as eos_token in {TOKENIZER_CONFIG} beside it")
    return {"pad_token": roles["eos_token"], **roles}


def _guarded(content: dict[str, Any], roles: dict[str, object]) -> Tokenizer:
    """The tokenizer whose tokens with a role are special, so that no text can spell them."""
    content = {**content, "truncation": None, "padding": None}
    entries = entries_of(content)
    marks = {name for names in FIM if all(name in entries for name in names) for name in names}
    special = sorted({str(name) for name in roles.values()} | marks)
    for token in content.get("added_tokens", ()):
        token["special"] = token["special"] or token["content"] in special
    if content["model"].get("type") == "Unigram":
        names = {*special, *(token["content"] for token in content["added_tokens"] if token["special"])}
        pieces = content["model"]["vocab"]
        content["model"]["vocab"] = [[p, min(score, _UNLIKELY) if p in names else score] for p, score in pieces]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    added = {token["content"] for token in content.get("added_tokens", ())}
    tokenizer.add_special_tokens([name for name in special if name not in added])
    return tokenizer


def _check_text(spec: str, tokenizer: Tokenizer, content: dict[str, Any]) -> None:
    """Raise DataError 449 when a text that spells a special token is encoded as that token."""
    model = content["model"]
    number = model.get("unk_id")
    unknown = model.get("unk_token") if number is None else model["vocab"][number][0]
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.encode_special_tokens = True
    for entry, token in sorted(tokenizer.get_added_tokens_decoder().items()):
        name = token.content
        if not token.special or name == unknown:
            continue
        texts = [name, f"a {name} b", f"a{name}b"]
        if any(entry in encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)):
            rule = f"a text that holds {name!r} would be encoded as the special token {entry}"
            raise _refuse(449, spec, rule, "Give a tokenizer whose model does not make its special tokens of text")


def _refuse(code: int, spec: str, rule: str, way_out: str) -> Exception:
    return DataError.of(code, "data.tokenizer", spec, rule, way_out)
