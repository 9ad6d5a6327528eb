"""Corpora, tokenizer, token files and the order of samples.

`prepare` turns a corpus into a cache entry once; `open_data` memory-maps it; `Split.micro_batches` reads it. No process
group is needed: which replica reads which sample is arithmetic (`engine.data.sampler`). Errors have codes OCT401-420.
"""

from engine.data.batches import Split
from engine.data.build import RANDOM_SOURCE, prepare
from engine.data.corpus import Document, corpus_fingerprint, documents, is_validation
from engine.data.sampler import sample_numbers
from engine.data.source import Data, open_data
from engine.data.tokenizer import END_OF_TEXT, END_OF_TEXT_ID, load_tokenizer

__all__ = [
    "END_OF_TEXT",
    "END_OF_TEXT_ID",
    "RANDOM_SOURCE",
    "Data",
    "Document",
    "Split",
    "corpus_fingerprint",
    "documents",
    "is_validation",
    "load_tokenizer",
    "open_data",
    "prepare",
    "sample_numbers",
]
