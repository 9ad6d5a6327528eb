"""`python -m engine.data inspect`: numbers, samples as training reads them, plots, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config.enums import SampleKind
from engine.data import open_data, prepare
from engine.data.build.cache import TOKENIZER
from engine.data.commands import main
from engine.data.report.inspect import _unknown, read_samples
from engine.data.report.plots import length_bins, row_picture
from engine.data.report.sample_view import Decoder, Sample, describe, printable, shortened, wrapped
from engine.data.report.statistics import length_statistics, parts_of, position_shares, token_counts
from engine.data.tokenizer.folder import encode_parts, load_tokenizer, make_tokenizer
from engine.data.tokenizer.vocabulary import vocabulary_of
from engine.model.batch import IGNORE
from tests.unit.data.data_options import GPT, config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    texts = [f"text {number} is {number * number} words\nlong, " * (1 + number % 4) for number in range(40)]
    (root / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    asked = [{"prompt": f"What is {n} and {n}?", "completion": f" It is {n + n}."} for n in range(30)]
    (root / "completion.jsonl").write_text("\n".join(map(json.dumps, asked)))
    rows = [{"text": f"one {n} text", "pair": f"other {n}", "label": n % 2} for n in range(30)]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def call(root: Path, kind: str, *more: str) -> list[str]:
    named = [f"data={kind}", f"source={root}/{kind}.jsonl", f"cache_dir={root}/cache", "vocab_size=300"]
    return ["inspect", "model=gpt_tiny", *named, "seq_len=32", "valid_fraction=0.2", *more]


def report(root: Path, *words: str) -> dict[str, Any]:
    assert main([*words, f"--json={root}/report.json"]) == 0
    found: dict[str, Any] = json.loads((root / "report.json").read_text())
    return found


def test_the_numbers_are_those_of_the_corpus(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(root, *call(root, "text"))
    cfg = config(root, source=f"{root}/text.jsonl", seq_len=32, valid_fraction=0.2)
    (part, *_) = parts_of(cfg)
    documents = [part.document(number) for number in range(part.stream.num_documents)]
    assert found["sources"][0]["documents"] == len(documents)
    assert found["sources"][0]["tokens"] == sum(map(len, documents))
    assert found["document_tokens"]["max"] == max(map(len, documents))
    assert found["document_tokens"]["longer"] == np.mean([len(document) > 32 for document in documents])
    counts = np.bincount(np.concatenate(documents))
    assert found["token_use"]["used"] == np.count_nonzero(counts)
    assert found["token_use"]["by_rank"] == sorted(counts[counts > 0].tolist(), reverse=True)
    text = [document[document != part_end(part.folder)] for document in documents]
    size = sum(len(Decoder(part.folder / TOKENIZER).text(document).encode()) for document in text)
    assert found["bytes_per_token"]["value"] == pytest.approx(size / sum(map(len, text)))
    assert found["vocabulary"]["end"] == part_end(part.folder)
    assert found["unknown"] is None
    said = [line for line in capsys.readouterr().out.splitlines() if "pytest-of" not in line]
    assert max(map(len, said)) <= 120


def part_end(folder: Path) -> int:
    return vocabulary_of(folder / TOKENIZER).end


def test_samples_are_those_that_training_reads(root: Path) -> None:
    found = report(root, *call(root, "text", "--samples=2", "--first=5"))
    cfg = config(root, source=f"{root}/text.jsonl", seq_len=32, valid_fraction=0.2)
    data = open_data(cfg, GPT)
    (batch,) = data.train.micro_batches(5, dp_rank=0, dp=1, micro_batch=2, accum_steps=1)
    decoder = Decoder(data.folder / TOKENIZER)
    for row, sample in enumerate(found["samples"]):
        assert sample["sample"] == 5 + row
        whole = [*batch.tokens_BS[row].tolist(), int(batch.labels_BS[row, -1])]
        assert "".join(run["text"] for run in sample["runs"]) == decoder.text(whole)
        ends = sum(token == data.vocabulary.end for token in whole[:-2])
        assert sample["documents"] == 1 + ends
        assert [run["role"] for run in sample["runs"]][:2] == ["context", "predicted"]


@pytest.mark.parametrize("masked", ["true", "false"])
def test_of_completions_the_completion_and_the_end_are_predicted(root: Path, masked: str) -> None:
    found = report(root, *call(root, "completion", f"document_mask={masked}", "--samples=3"))
    for sample in found["samples"]:
        runs = [run for run in sample["runs"] if run["role"] != "padding"]
        assert len(runs) == 2 * sample["documents"]
        for prompt, completion in zip(runs[::2], runs[1::2], strict=True):
            assert (prompt["role"], completion["role"]) == ("context", "predicted")
            assert prompt["document"] == completion["document"]
            assert prompt["text"].startswith("What is ")
            assert prompt["text"].endswith("?")
            assert completion["text"].startswith(" It is ")
            assert completion["text"].endswith(".<|endoftext|>")
            assert completion["after"] == 1
        assert runs[-1]["stop"] == 32 - sample["padding"]
    assert found["batch"]["padding"] > 0
    assert sum(found["batch"][name] for name in ("context", "predicted", "padding")) == pytest.approx(1)


def test_of_a_masked_sample_each_predicted_token_is_shown_as_it_was(root: Path) -> None:
    more = ["model=bert_tiny", "model.sentence_head=next_sentence", "model.token_types=2", "tokenizer=wordpiece"]
    found = report(root, *call(root, "text", *more, "--samples=4"))
    assert {sample["class"] for sample in found["samples"]} <= {0, 1}
    for sample in found["samples"]:
        assert [run["segment"] for run in sample["runs"]][:2] == [0, 1]
        text = " ".join(run["text"] for run in sample["runs"])
        assert text.count(" -> ") == sample["predicted"] > 0
        assert text.startswith("[CLS]")


def test_rows_show_their_class_and_segments(root: Path) -> None:
    more = ["model=bert_tiny", "model.sentence_head=sentence_order", "model.token_types=2", "pair_field=pair"]
    (sample,) = report(root, *call(root, "rows", *more, "--samples=1"))["samples"]
    first, second, padding = sample["runs"]
    assert first["text"].startswith("[CLS]one ")
    assert second["text"].startswith("other ")
    number = int(second["text"].removeprefix("other ").removesuffix("[SEP]"))
    assert sample["class"] == number % 2
    assert (padding["role"], padding["stop"]) == ("padding", 32)


def test_a_list_of_tokens_shows_labels(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(call(root, "completion", "--samples=1", "--tokens", "document_mask=false"))
    table = capsys.readouterr().out.split("text of the label\n")[1].splitlines()
    assert len(table) == 32
    assert table[0].split()[0] == "0"
    assert "'What'" in table[0]
    asked = next(place for place, line in enumerate(table) if "'?'" in line)
    assert [bool(line[60:].strip()) for line in table[: asked + 2]] == [False] * asked + [True, True]
    assert sum("'<|endoftext|>'" in line for line in table) == 1
    assert table[-1].endswith("(padding)")


def test_borders_and_roles_of_documents_that_see_only_themselves() -> None:
    labels = np.array([11, IGNORE, 13, 0, 15, IGNORE])
    borders = np.array([True, False, True, False, True, False])
    tokens, segments = np.array([10, 11, 12, 13, 14, 9]), np.zeros(6, dtype=np.int64)
    sample = Sample(7, tokens, labels, segments, borders, length=5, causal=True, apart=True)
    runs = describe(sample, Decoder(None))["runs"]
    assert [(run["role"], run["text"], run["document"], run["after"]) for run in runs] == [
        ("context", "10", 0, 0),
        ("predicted", "11", 0, 0),
        ("context", "12", 1, 0),
        ("predicted", "13 0", 1, 1),
        ("context", "14", 2, 0),
        ("predicted", "15", 2, 1),
        ("padding", "9 x 1", 2, 0),
    ]
    assert row_picture(sample)[0, :6].tolist()[:5] == [0, 0, 1, 1, 2]
    assert np.isnan(row_picture(sample)[0, 5:]).all()


@pytest.mark.parametrize("kind", ["text", "completion"])
def test_the_page_of_plots_is_a_png(root: Path, kind: str) -> None:
    assert main(call(root, kind, f"--png={root}/plots/{kind}.png", "--samples=0")) == 0
    assert (root / "plots" / f"{kind}.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_random_tokens_have_samples_and_plots_too(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inspect", "model=gpt_tiny", "data=random", "seq_len=16", "--samples=1", f"--png={root}/random.png"]
    assert main(words) == 0
    assert "sample 0: 16 positions, 16 predicted, 0 padding" in capsys.readouterr().out
    assert (root / "random.png").is_file()


def test_length_statistics() -> None:
    found = length_statistics(np.arange(1, 101), seq_len=90)
    assert (found["min"], found["max"], found["mean"], found["longer"]) == (1, 100, 50.5, 0.1)
    assert (found["p50"], found["p90"], found["p99"]) == (51, 91, 100)


def test_position_shares() -> None:
    predicted = np.array([[True, True, False, False], [False, True, False, True]])
    found = position_shares(predicted, np.array([3, 2]))
    assert (found.predicted, found.text, found.padding) == (3 / 8, 2 / 8, 3 / 8)


def test_counting_some_of_the_tokens_reads_all_sources(root: Path) -> None:
    blend = {f"{root}/text.jsonl": 0.5, f"{root}/more.jsonl": 0.5}
    (root / "more.jsonl").write_text("\n".join(json.dumps({"text": f"zzz {n} zzz " * 9}) for n in range(40)))
    cfg = config(root, source="", blend=blend, seq_len=16, vocab_size=400)
    prepare(cfg, lambda line: None)
    parts = [part for part in parts_of(cfg) if part.split == "train"]
    every = token_counts(parts, 400, 1 << 40)
    assert every.sum() == sum(part.stream.num_tokens for part in parts)
    some = token_counts(parts, 400, int(every.sum()) // 2)
    assert abs(some.sum() - every.sum() // 2) <= 2
    assert (some <= every).all()
    for part in parts:
        assert token_counts([part], 400, 50).sum() == 50


def test_unknown_tokens_are_counted(tmp_path: Path) -> None:
    make_tokenizer("wordpiece", 200, lambda: iter(["plain words of plain letters"]), tmp_path / "t")
    vocabulary = vocabulary_of(tmp_path / "t")
    (ids,) = encode_parts(load_tokenizer(tmp_path / "t"), ["plain words 東 and plain"])
    found = _unknown(tmp_path / "t", vocabulary, np.bincount(ids, minlength=vocabulary.size))
    assert found is not None
    assert found["token"] == "[UNK]"
    assert found["share"] == pytest.approx(sum(token == found["id"] for token in ids) / len(ids))
    assert found["share"] > 0


def test_bins_hold_every_length() -> None:
    for lengths in (np.array([0]), np.array([1]), np.array([1, 2]), np.array([7, 10**6])):
        bins = length_bins(lengths)
        assert np.histogram(np.maximum(lengths, 1), bins)[0].sum() == len(lengths)


def test_text_for_a_terminal() -> None:
    assert printable("a\nb\té\u200b東\x1b") == "a\\nb\\té\\u200b東\\x1b"
    assert wrapped("abcdef", 4) == ["abcd", "ef"]
    assert wrapped("東京東京", 5) == ["東京", "東京"]
    assert shortened("abcdefghij", 4) == "ab ... 6 more ... ij"
    assert shortened("abcd", 4) == "abcd"


def test_lengths_of_variable_samples_are_known(root: Path) -> None:
    cfg = config(root, source=f"{root}/completion.jsonl", kind=SampleKind.completion, variable_length=True, seq_len=64)
    prepare(cfg, lambda line: None)
    data = open_data(cfg, GPT)
    rows = read_samples(data.train, 0, 8, data.vocabulary)
    assert max(row.length for row in rows) == len(rows[0].tokens)
    for row in rows:
        assert (row.labels[row.length :] == IGNORE).all()
        assert row.labels[row.length - 1] == data.vocabulary.end


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples=-1"], "[OCT471] --samples=-1: it must be from 0"),
        (["--batch=0"], "[OCT471] --batch=0: it must be from 1 to 65,536. Nearest legal: --batch 1"),
        (["--count=0"], "[OCT471] --count=0"),
        (["--chars=1"], "[OCT471] --chars=1"),
        (["--first=-1"], "[OCT471] --first=-1"),
        (["--split=test"], "[OCT472] --split=test: no documents are in it, as data.test_fraction is 0.0"),
        (["--split=other"], "invalid choice: 'other'"),
        (["--samples=many"], "invalid int value: 'many'"),
        (["--sample=3"], "[OCT106] --sample=3: no such flag"),
        (["data.sead=3"], "[OCT101] data.sead"),
        (["data.seq_len=0"], "data.seq_len=0"),
    ],
)
def test_bad_words_are_refused(root: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(call(root, "text", *words)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--png", "--json"])
def test_a_file_that_cannot_be_written_is_refused(root: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert main(call(root, "text", "--samples=0", f"{option}={root}/text.jsonl/out")) == 2
    assert f"[OCT474] {option}={root}/text.jsonl/out: it cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "split", "verify"])
def test_help_names_options_and_defaults(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    options = {"inspect": ["--samples", "(default: 3)"], "split": ["--threshold", "(default: 0.8)"]}
    assert all(text in shown for text in [*options.get(command, ["--vocab-size"]), "--json", "engine.train --help"])
