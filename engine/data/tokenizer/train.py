"""Tokenizers trained on the corpus itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from engine.data.tokenizer.vocabulary import FIM, UNUSED_BYTES
from engine.errors import DataError

END_OF_TEXT = "<|endoftext|>"
MIN_BPE = 257
"""256 bytes and the end-of-text token: any text can be encoded, so there is no unknown token."""
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MIN_WORDPIECE = 64
MAX_TRAINED = 1 << 24
"""The trainers reserve memory for all entries before they read a text."""
_MARKS = ("[CLS]", "[SEP]", "[MASK]", *FIM[0])
_MAX_ALPHABET = 1000
"""Characters of a WordPiece vocabulary, as in BERT's; words with others are [UNK]."""

Texts = Callable[[], Iterator[str]]
Trained = tuple[Tokenizer, dict[str, object]]
"""A tokenizer and its tokenizer_config.json."""


def train_bpe(vocab_size: int, texts: Texts) -> Trained:
    """Byte-level BPE (Sennrich et al., arXiv 1508.07909, on bytes as in GPT-2).

    `<|endoftext|>` is entry 0, the 256 bytes follow. The entries of six bytes that UTF-8 never uses are, in the order
    of the bytes, [CLS], [SEP], [MASK] and the marks of prefix, middle and suffix, so that all models share the ids.
    """
    _check("bpe", vocab_size, MIN_BPE, "256 bytes + 1 end-of-text token")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer=trainer)
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    for byte, mark in zip(UNUSED_BYTES, _MARKS, strict=False):
        vocab[mark] = vocab.pop(chr(byte))
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens(list(_MARKS))
    roles: dict[str, object] = dict(zip(("cls_token", "sep_token", "mask_token"), _MARKS, strict=False))
    return tokenizer, {**roles, **{f"{role}_token": END_OF_TEXT for role in ("bos", "eos", "pad")}}


def train_wordpiece(vocab_size: int, texts: Texts) -> Trained:
    """WordPiece with the normaliser and the words of uncased BERT (Devlin et al., arXiv 1810.04805).

    [PAD] [UNK] [CLS] [SEP] [MASK] are entries 0 to 4. [SEP] ends a document.
    """
    _check("wordpiece", vocab_size, MIN_WORDPIECE, f"{len(BERT_TOKENS)} special tokens, an alphabet, and words of it")
    trained = bert_tokenizer(models.WordPiece(unk_token="[UNK]"), lowercase=True, strip_accents=None)
    # The trainer breaks ties between rare characters, and numbers the characters inside words, at random. So it is
    # given both, as "special tokens", which it numbers first; the tokenizer is then made of the entries alone.
    limit = min(_MAX_ALPHABET, (vocab_size - len(BERT_TOKENS)) // 3)
    alphabet = _alphabet(texts(), trained.normalizer, limit)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*BERT_TOKENS, *alphabet, *(f"##{char}" for char in alphabet)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    trained.train_from_iterator(texts(), trainer=trainer)
    model = models.WordPiece(trained.get_vocab(), unk_token="[UNK]")
    tokenizer = bert_tokenizer(model, lowercase=True, strip_accents=None)
    tokenizer.add_special_tokens(list(BERT_TOKENS))
    add_bert_template(tokenizer)
    return tokenizer, dict(BERT_CONFIG)


def _alphabet(texts: Iterator[str], normalizer: normalizers.Normalizer, limit: int) -> list[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    found = ((-count, char) for char, count in counts.items() if not char.isspace())
    return [char for _, char in sorted(found)[:limit]]


BERT_CONFIG: dict[str, object] = {
    **{f"{token[1:-1].lower()}_token": token for token in BERT_TOKENS},
    "eos_token": "[SEP]",
    "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
}


def bert_tokenizer(model: models.WordPiece, *, lowercase: bool, strip_accents: bool | None) -> Tokenizer:
    """BERT's normaliser, words and decoder around `model`."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def add_bert_template(tokenizer: Tokenizer) -> None:
    """Whoever asks for special tokens gets [CLS] A [SEP] B [SEP]; the vocabulary must have them."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )


def _check(spec: str, vocab_size: int, least: int, what: str) -> None:
    if not least <= vocab_size <= MAX_TRAINED:
        rule = f"a tokenizer trained as data.tokenizer={spec} needs {what}, at least {least} entries"
        if vocab_size > MAX_TRAINED:
            rule = f"a tokenizer that is trained has at most {MAX_TRAINED} entries"
        way_out = f"Nearest legal: data.vocab_size={min(max(vocab_size, least), MAX_TRAINED)}"
        raise DataError.of(405, "data.vocab_size", vocab_size, rule, way_out)


TRAINERS: dict[str, Callable[[int, Texts], Trained]] = {"bpe": train_bpe, "wordpiece": train_wordpiece}
"""Choices of data.tokenizer that are trained."""
