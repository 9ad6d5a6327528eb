"""The data section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from engine.config.enums import BadFiles, SampleKind


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """The corpus, its tokenizer and how samples are drawn."""

    source: str = MISSING
    """`python`: the standard library of the running interpreter. `python:NAME`: an installed package; `python:all`: the
    library and all packages. `random`: random tokens. Else a file, a folder or a glob of text, Markdown, code, JSONL,
    any of them compressed (.gz, .zst), Parquet, and tables (.csv, .tsv) unless `kind=text`; a folder saved by
    `datasets`, FOLDER or FOLDER#SPLIT; `hf:NAME[:CONFIG][#SPLIT]` of a dataset that `datasets` can load; or PREFIX of
    Megatron's PREFIX.bin and PREFIX.idx. Without #SPLIT it is the split `train`."""
    blend: dict[str, float] = field(default_factory=dict)
    """Sources and their weights, instead of `source` alone: samples are drawn in exactly these proportions."""
    kind: SampleKind = SampleKind.text
    text_field: str = "text"
    """Field (or column) with the text of `kind=text`, and the first text of `kind=rows`."""
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    pair_field: str | None = None
    """Field with the second text of `kind=rows`. None: rows have one text."""
    label_field: str = "label"
    """Field with the class (integer) or score (number) of `kind=rows`."""
    include: str = "*"
    """Only files whose path matches one of these patterns, separated by commas: the path inside a folder or package,
    as found by a glob. `*` matches / too. Of a folder, also files with a suffix that is named here."""
    exclude: str = ""
    """Files left out again, as `include`."""
    bad_files: BadFiles = BadFiles.skip
    tokenizer: str = "bpe"
    """`bpe` (byte level) or `wordpiece`: trained on the corpus. Else a Hugging Face tokenizer folder, a tokenizer.json,
    a folder with GPT-2's vocab.json and merges.txt, or BERT's vocab.txt (or its folder)."""
    seq_len: int = MISSING
    """Tokens in one sample."""
    vocab_size: int = MISSING
    """Entries of a tokenizer trained on the corpus, and the most that a given one may have. At most
    model.vocab_size."""
    valid_fraction: float = 0.05
    """Share of the documents held out, chosen by a hash of their content."""
    test_fraction: float = 0.0
    """Share of the documents that neither training nor validation sees, chosen likewise."""
    max_bytes: int | None = None
    """Read at most this many bytes of each source. None: all."""
    cache_dir: str | None = None
    """Where tokenizer and token files are kept. None: $XDG_CACHE_HOME/octant or ~/.cache/octant."""
    workers: int | None = None
    """Processes that build token files; the result does not depend on it. None: one for each core."""
    wait_s: float = 3600.0
    """Longest wait for another process that builds the same token files, seconds without progress."""
    seed: int = 0
    """Seed of the sample order, and of all that is random in a sample."""
    variable_length: bool = False
    """Samples end where their text ends instead of filling `seq_len`; a micro-batch is padded to its longest."""
    document_mask: bool = False
    """`gpt`: a token attends to its own document only, and positions start again with each document. Without it the
    documents of a sample see the ones before them, as in GPT-2 and Megatron's default."""
    overlap: int = 0
    """Tokens that a sample shares with the one before it as context, which it does not predict again. For long
    documents (`gpt`)."""
    fim_rate: float = 0.0
    """Share of the documents of a sample that are rearranged for fill-in-the-middle (arXiv 2207.14255), half of them
    prefix-suffix-middle, half suffix-prefix-middle (`gpt`)."""
    mask_rate: float = 0.15
    """Share of the tokens that a `bert` model predicts: 80 % of them replaced by [MASK], 10 % by a random token."""
    whole_words: bool = False
    """`bert`: mask whole words instead of single tokens."""
    prefetch: int = 2
    """Global batches read ahead by a thread. 0: read when they are needed."""
