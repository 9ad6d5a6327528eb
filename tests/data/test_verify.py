"""`python -m engine.data verify`: all damages of all files, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine.config.enums import SampleKind
from engine.data.build.cache import sealed
from engine.data.build.prepare import prepare
from engine.data.commands import main
from engine.data.report import checks
from engine.data.storage import indexed, sums
from engine.data.storage.indexed import IndexedFile, IndexedWriter
from tests.unit.data.data_options import config


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus of rows and its cache."""
    root = tmp_path_factory.mktemp("verify")
    rows = [json.dumps({"text": f"text {number} of {number * number}", "label": number % 2}) for number in range(60)]
    (root / "corpus.jsonl").write_text("\n".join(rows))
    prepare(config(root, source=str(root / "corpus.jsonl"), kind=SampleKind.rows), lambda line: None)
    return root


@pytest.fixture
def root(built: Path, tmp_path: Path) -> Path:
    """A copy to damage. The corpus stays in its place, as entries are named after it."""
    shutil.copytree(built / "cache", tmp_path / "cache")
    (tmp_path / "corpus").symlink_to(built / "corpus.jsonl")
    return tmp_path


def words(root: Path) -> list[str]:
    source = (root / "corpus").resolve()
    named = [f"source={source}", f"cache_dir={root}/cache", "vocab_size=300", "seq_len=8", "valid_fraction=0.3"]
    return ["verify", "data=rows", *named]


def entry(root: Path) -> Path:
    (meta,) = (root / "cache").glob("*/meta.json")
    return meta.parent


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def damaged(output: str) -> dict[str, str]:
    """Name of each damaged file, and what is said about it."""
    found, name = {}, ""
    for line in output.splitlines():
        if line.startswith("DAMAGED"):
            name = Path(line.split()[5]).name
            found[name] = ""
        elif line.startswith("  "):
            found[name] += line.strip()
    return found


def test_whole_files_are_ok_and_all_are_listed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(root)) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {Path(line.split()[-1]).name for line in lines[:-1]}
    files = {path.name for path in entry(root).iterdir()} - {"meta.json"}
    assert {"train.bin", "train.idx", "train.sums.json", "train.labels.npy", "valid.bin", "tokenizer"} <= files <= names
    assert all(line.startswith("ok ") and "GB/s" in line for line in lines[:-1])
    assert lines[-1].endswith("all ok")


def test_all_damages_are_found_at_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = entry(root)
    flip(folder / "train.bin")
    (folder / "valid.idx").write_bytes((folder / "valid.idx").read_bytes()[:-8])
    (folder / "valid.labels.npy").unlink()
    flip(folder / "train.labels.npy")
    flip(folder / "tokenizer" / "tokenizer_config.json", 3)
    assert main([*words(root), "--json", str(root / "checks.json")]) == 1
    output = capsys.readouterr().out
    found = damaged(output)
    assert set(found) == {"train.bin", "valid.idx", "valid.labels.npy", "train.labels.npy", "tokenizer"}
    assert "bytes 0 to" in found["train.bin"]
    assert "meta.json records" in found["train.labels.npy"]
    assert "No such file" in found["valid.labels.npy"]
    written = json.loads((root / "checks.json").read_text())
    assert not written["ok"]
    assert {Path(check["path"]).name for check in written["checks"] if check["damages"]} == set(found)


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "train.sums.json", "train.labels.npy", "valid.bin"])
def test_one_changed_bit_of_any_file_is_found_in_that_file(
    root: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    flip(entry(root) / name, (entry(root) / name).stat().st_size // 2)
    assert main(words(root)) == 1
    assert name in damaged(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["train.bin", "valid.idx", "train.sums.json", "tokenizer/tokenizer.json", "meta.json"])
def test_a_missing_file_is_found(root: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (entry(root) / name).unlink()
    code, printed = main(words(root)), capsys.readouterr()
    if name == "meta.json":  # an entry without it is not finished
        assert code == 2
        assert "[OCT412] data.cache_dir" in printed.err
    else:
        assert code == 1
        assert name.split("/")[0] in damaged(printed.out)


def test_the_tokenizer_of_the_cache_is_checked(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tokenizer,) = (path for path in (root / "cache").glob("tokenizer-*") if path.is_dir())
    flip(tokenizer / "tokenizer.json", 30)
    assert main(words(root)) == 1
    assert list(damaged(capsys.readouterr().out)) == [tokenizer.name]


def test_a_damaged_meta_file_is_a_damage(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (entry(root) / "meta.json").write_text('{"splits": ')
    assert main(words(root)) == 1
    assert "cannot be read" in damaged(capsys.readouterr().out)["meta.json"]


def test_counts_of_the_meta_file_are_compared(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = json.loads((entry(root) / "meta.json").read_text())
    meta["splits"]["train"]["tokens"] += 1
    meta["vocab_size"] -= 1
    del meta["digest"]
    (entry(root) / "meta.json").write_text(json.dumps(sealed(meta)))
    assert main(words(root)) == 1
    found = damaged(capsys.readouterr().out)
    assert f"meta.json records {meta['splits']['train']['tokens']}" in found["train.idx"]
    assert f"meta.json records {meta['vocab_size']}" in found["tokenizer"]


def test_every_damaged_block_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (sums, indexed, checks):
        monkeypatch.setattr(module, "BLOCK", 1 << 10)
    with IndexedWriter(tmp_path / "a", 1000) as writer:
        writer.add_document([np.arange(999)] * 4)
    flip(tmp_path / "a.bin", 1030)
    flip(tmp_path / "a.bin", 5000)
    assert main(["verify", str(tmp_path / "a")]) == 1
    printed = capsys.readouterr().out
    assert "bytes 1024 to 2048 have checksum" in printed
    assert "bytes 4096 to 5120 have checksum" in printed
    assert printed.splitlines()[-1].endswith("damages: 2")


def test_a_bare_prefix_is_checked_with_or_without_sums(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with IndexedWriter(tmp_path / "a", 1000) as writer:
        writer.add_document([np.arange(999)])
    assert main(["verify", str(tmp_path / "a.bin"), "--vocab-size", "999"]) == 0
    assert "no checksums" not in capsys.readouterr().out
    (tmp_path / "a.sums.json").unlink()
    assert main(["verify", str(tmp_path / "a")]) == 0
    assert "(no checksums; ids not compared with a vocabulary)" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "a"), "--vocab-size", "998"]) == 1
    assert "have the id 998; legal are 0 to 997" in damaged(capsys.readouterr().out)["a.bin"]
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-4])
    assert main(["verify", str(tmp_path / "a")]) == 1
    assert list(damaged(capsys.readouterr().out)) == ["a.idx"]


def test_the_files_of_a_prefix_and_its_document_numbers_are_checked(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = entry(built)
    file = IndexedFile.open(folder / "train")
    with IndexedWriter(tmp_path / "meg", 300) as writer:
        for number in range(file.num_documents):
            writer.add_document([file.document(number)])
    cfg = config(tmp_path, source=str(tmp_path / "meg"), tokenizer=str(folder / "tokenizer"))
    prepare(cfg, lambda line: None)
    named = [f"source={cfg.source}", f"tokenizer={cfg.tokenizer}", f"cache_dir={cfg.cache_dir}", "valid_fraction=0.3"]
    call = ["verify", "data=text", *named, "vocab_size=300"]
    assert main(call) == 0
    assert f"{tmp_path / 'meg.bin'}" in capsys.readouterr().out
    flip(entry(tmp_path) / "valid.documents.npy")
    assert main(call) == 1
    assert list(damaged(capsys.readouterr().out)) == ["valid.documents.npy"]


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["verify", *argv]) == 2
    return capsys.readouterr().err


def test_bad_words_are_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "neither nothing.bin nor nothing.idx" in refused(["nothing"], capsys)
    (tmp_path / "a.bin").touch()
    found = refused([str(tmp_path / "a"), "data=text"], capsys)
    assert "[OCT471] PREFIX=" in found
    assert "data=text is an option of training" in found
    assert "--vocab-size=0: it must be from 1" in refused([str(tmp_path / "a"), "--vocab-size=0"], capsys)
    found = refused([*words(root)[1:], "--vocab-size=9"], capsys)
    assert "[OCT471] --vocab-size=9" in found
    assert "their tokenizer" in found
    assert "have no files to verify" in refused(["data=random", "model=gpt_tiny"], capsys)


def test_what_was_never_built_is_refused_with_the_command_that_builds_it(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = refused([*words(root)[1:], f"cache_dir={tmp_path}/other"], capsys)
    assert "[OCT412] data.cache_dir" in found
    assert "python -m engine.data build" in found
