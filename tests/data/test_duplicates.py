"""Exact and near copies of documents, and the report of the splits."""

from __future__ import annotations

import json
import re
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.data.build.prepare import prepare
from engine.data.commands import main
from engine.data.report.duplicates import (
    HIGHEST,
    LOWEST,
    PERMUTATIONS,
    Near,
    bands,
    exact_copies,
    jaccard,
    near_copies,
    shingles,
)
from engine.data.report.split import split_table
from engine.data.report.statistics import Part, parts_of
from engine.data.samples.stream import Stream
from engine.data.storage.indexed import IndexedFile, IndexedWriter
from engine.errors import DataError
from tests.unit.data.data_options import config

Tokens = NDArray[np.int64]


def part(root: Path, split: str, documents: list[Tokens]) -> Part:
    with IndexedWriter(root / split, 60_000) as writer:
        for document in documents:
            writer.add_document([document])
    return Part("corpus", 1.0, split, root, Stream(IndexedFile.open(root / split)))


def grams(tokens: Tokens) -> set[tuple[int, ...]]:
    return {tuple(tokens[i : i + 5].tolist()) for i in range(len(tokens) - 4)}


def similarity(a: Tokens, b: Tokens) -> float:
    return of_sets(grams(a), grams(b))


def of_sets(a: set[tuple[int, ...]], b: set[tuple[int, ...]]) -> float:
    return len(a & b) / len(a | b)


def random_text(rng: np.random.Generator, size: int = 200) -> Tokens:
    return rng.integers(0, 60_000, size)


def changed(text: Tokens, places: int) -> Tokens:
    """`text` with so many tokens replaced, evenly spread."""
    out = text.copy()
    out[np.linspace(10, len(text) - 10, places).astype(int)] = 59_999
    return out


def near(parts: list[Part], threshold: float = 0.8, most: int = 1000) -> Near:
    return near_copies(parts, exact_copies(parts).firsts, threshold, most, seed=0)


def test_shingles_are_the_set_of_5_grams() -> None:
    rng = np.random.default_rng(0)
    for a, b in ((rng.integers(0, 3, 300), rng.integers(0, 3, 300)), (rng.integers(0, 9, 50), rng.integers(0, 9, 70))):
        assert len(shingles(a)) == len(grams(a))
        assert jaccard(shingles(a), shingles(b)) == similarity(a, b)
    assert not len(shingles(np.arange(4)))
    assert len(shingles(np.arange(5))) == 1


def test_order_of_tokens_counts() -> None:
    assert jaccard(shingles(np.arange(5)), shingles(np.arange(5)[::-1])) == 0


def test_exact_copies_are_grouped_across_splits(tmp_path: Path) -> None:
    a, b, c = (random_text(np.random.default_rng(seed)) for seed in range(3))
    found = exact_copies([part(tmp_path, "train", [a, b, a]), part(tmp_path, "valid", [c, a])])
    assert found.groups == [[(0, 0), (0, 2), (1, 1)]]
    assert [firsts.tolist() for firsts in found.firsts] == [[0, 1], [0]]


def test_near_copies_are_those_that_a_full_comparison_finds(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    texts = [random_text(rng) for _ in range(60)]
    training = texts + [changed(text, 1) for text in texts[:20]] + [changed(text, 12) for text in texts[20:40]]
    held_out = [changed(text, 2) for text in texts[40:]] + [random_text(rng) for _ in range(20)]
    parts = [part(tmp_path, "train", training), part(tmp_path, "valid", held_out)]
    found = near(parts)
    every = [((place, i), grams(text)) for place in (0, 1) for i, text in enumerate((training, held_out)[place])]
    expected = {(x, y): of_sets(a, b) for (x, a), (y, b) in combinations(every, 2)}
    assert {(pair.a, pair.b): pair.similarity for pair in found.pairs} == {
        pair: value for pair, value in expected.items() if value >= 0.8
    }
    assert sum(pair.a[0] == 0 and pair.b[0] == 1 for pair in found.pairs) == 20
    assert [pair.similarity for pair in found.pairs] == sorted((p.similarity for p in found.pairs), reverse=True)


def test_a_lower_threshold_finds_more(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    texts = [random_text(rng) for _ in range(20)]
    parts = [part(tmp_path, "train", texts), part(tmp_path, "valid", [changed(text, 10) for text in texts])]
    assert not near(parts, 0.8).pairs
    assert len(near(parts, 0.5).pairs) == 20


@pytest.mark.parametrize("threshold", [LOWEST, 0.5, 0.8, 0.95, HIGHEST])
def test_bands_propose_nearly_all_pairs_at_the_threshold_and_few_far_below(threshold: float) -> None:
    number, size = bands(threshold)
    assert number >= 2
    assert number * size <= PERMUTATIONS
    assert 1 - (1 - threshold**size) ** number >= 0.95
    assert 1 - (1 - (threshold / 3) ** size) ** number < 0.5


def test_short_documents_and_exact_copies_are_not_compared(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    text = random_text(rng)
    found = near([part(tmp_path, "train", [text, text, text[:4], random_text(rng)])])
    assert (found.pairs, found.compared, found.short) == ([], [3], 1)


def test_of_many_documents_the_held_out_ones_are_taken_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    parts = [
        part(tmp_path, "train", [random_text(rng, 9) for _ in range(50)]),
        part(tmp_path, "valid", [random_text(rng, 9) for _ in range(8)]),
        part(tmp_path, "test", [random_text(rng, 9) for _ in range(4)]),
    ]
    assert near(parts, most=1000).compared == [50, 8, 4]
    assert near(parts, most=40).compared == [28, 8, 4]
    few = near(parts, most=10).compared
    assert (few[0], sum(few)) == (5, 10)


def test_hundreds_of_like_documents_are_capped(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    text = random_text(rng)
    alike = [np.concatenate([text, [number]]) for number in range(100)]
    found = near([part(tmp_path, "train", alike)])
    assert found.capped == 35
    assert len(found.pairs) == sum(min(number, 64) for number in range(100))


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(DataError, match=r"\[OCT470\].*package datasketch.*pip install datasketch.*--no-near"):
        near([part(tmp_path, "train", [np.arange(9)])])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents, 4 exact copies and 6 near ones."""
    root = tmp_path_factory.mktemp("split")
    rng = np.random.default_rng(6)
    words = np.array([f"word{number}" for number in range(200)])
    texts = [" ".join(rng.choice(words, 80)) for _ in range(40)]
    texts += texts[:4] + [f"{text} and so on" for text in texts[4:10]]
    (root / "corpus").mkdir()
    (root / "corpus" / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return root


def words(root: Path, *more: str) -> list[str]:
    named = [f"source={root}/corpus", f"cache_dir={root}/cache", "vocab_size=600", "seq_len=16"]
    return ["split", "data=text", *named, "valid_fraction=0.2", "test_fraction=0.2", *more]


def test_the_report_counts_splits_and_copies(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(root, "--json", str(root / "out" / "split.json"))) == 0
    report = json.loads((root / "out" / "split.json").read_text())
    rows = {row["split"]: row for row in report["splits"]}
    assert sum(row["documents"] for row in rows.values()) == 50
    assert sum(row["document_share"] for row in rows.values()) == pytest.approx(1)
    assert {name: round(row["asked"], 6) for name, row in rows.items()} == {"train": 0.6, "valid": 0.2, "test": 0.2}
    exact = report["exact"]["copies"]
    assert exact["train-valid"] == exact["train-test"] == exact["valid-test"] == 0
    assert exact["train-train"] + exact["valid-valid"] + exact["test-test"] == 4
    assert sum(report["near"]["pairs"].values()) == 6
    assert report["near"]["pairs"]["train-valid"] + report["near"]["pairs"]["train-test"] > 0
    within = [pair["a"]["split"] == pair["b"]["split"] for pair in report["near"]["worst"]]
    assert within == sorted(within)
    for pair in report["near"]["worst"]:
        assert pair["a"]["words"][:40] == pair["b"]["words"][:40] != ""
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 120
    assert any("valid with a copy in train" in line for line in printed)


def test_without_near_copies_the_library_is_not_needed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    assert main(words(root, "--no-near")) == 0
    assert main(words(root)) == 2


def test_foreign_files_are_reported_too(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(words(root, "--no-near"))
    (built,) = (root / "cache").glob("corpus-*/train.bin")
    capsys.readouterr()
    prefix = str(built.with_suffix(""))
    foreign = [f"source={prefix}", f"tokenizer={built.parent}/tokenizer", f"cache_dir={root}/foreign"]
    assert main(["split", "data=text", *foreign, "vocab_size=600", "valid_fraction=0.3"]) == 0
    printed = capsys.readouterr().out
    assert prefix in printed
    assert "valid that repeat another of valid" in printed


def test_each_source_of_a_blend_has_its_rows(root: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for number in range(20):
        (tmp_path / "other" / f"{number}.txt").write_text(f"text {number * number} of the other source " * 5)
    blend = {str(root / "corpus"): 0.75, str(tmp_path / "other"): 0.25}
    cfg = config(tmp_path, source="", blend=blend, vocab_size=600)
    prepare(cfg, lambda line: None)
    rows = split_table(cfg, parts_of(cfg))
    by_source = {source: sum(row["documents"] for row in rows if row["source"] == source) for source in blend}
    assert list(by_source.values()) == [50, 20]
    assert {row["asked"] for row in rows if row["split"] == "valid"} == {0.3}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--threshold", "1.5", r"--threshold=1\.5: it must be from 0\.3 to 0\.99\. Nearest legal: --threshold 0\.99"),
        ("--threshold", "nan", r"--threshold=nan: it must be from 0\.3"),
        ("--sample", "1", r"--sample=1: it must be from 2 to .*Nearest legal: --sample 2"),
        ("--seed", "-1", r"--seed=-1: it must be from 0"),
        ("--worst", "-3", r"--worst=-3: it must be from 0"),
    ],
)
def test_numbers_out_of_range_are_refused(
    root: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    assert main(words(root, f"{option}={value}")) == 2
    assert re.search(rf"\[OCT471\] {message}", capsys.readouterr().err)


def test_random_tokens_have_nothing_to_split(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split", "data=random", "model=gpt_tiny"]) == 2
    assert "[OCT473] data.source=random: random tokens are made when they are read" in capsys.readouterr().err
