"""`python -m engine.data build`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.data import commands
from engine.data.commands import data_config, main

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    for i in range(12):
        (tmp_path / "corpus" / f"{i:02}.txt").write_text(f"document {i} has number {i * i}\n" * 3)
    return tmp_path


def words(root: Path, *more: str) -> list[str]:
    options = {"source": root / "corpus", "cache_dir": root / "cache", "vocab_size": 300, "data.valid_fraction": 0.3}
    return ["build", *(f"{option}={value}" for option, value in options.items()), *more]


def test_build_tells_where_and_how_much(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(root)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("building" in line for line in lines)
    *_, folder, train, valid, total = lines
    assert Path(folder, "meta.json").is_file()
    documents = [int(re.search(rf"  {name} +([\d,]+) documents +[\d,]+ tokens", line).group(1))  # type: ignore[union-attr]
                 for name, line in (("train", train), ("valid", valid))]  # fmt: skip
    assert sum(documents) == 12
    size = sum(path.stat().st_size for path in (root / "corpus").iterdir())
    assert re.fullmatch(rf"{size:,} bytes of input in [\d.]+ s, [\d.]+ MB/s", total)


def test_options_are_those_of_training(root: Path) -> None:
    cfg = data_config(["data=python", "model=gpt_tiny", "source=", "data.vocab_size=300", "blend.a=2", "kind=rows"])
    assert (cfg.source, cfg.vocab_size, cfg.blend, str(cfg.kind)) == ("", 300, {"a": 2.0}, "rows")


def test_refusals_name_option_and_rule(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(root, "data.valid_fraction=1e-9")) == 2
    assert "DataError:\n1. [OCT415] data.valid_fraction=1e-09" in capsys.readouterr().err
    assert main(words(root, "workers=0", "tokeniser=bpe")) == 2
    assert "tokeniser" in capsys.readouterr().err
    assert main(words(root, "workers=0")) == 2
    assert "ConfigError:\n1. [OCT301] data.workers=0" in capsys.readouterr().err
    assert main(words(root, "blend={a:1}")) == 2
    assert "ConfigError:\n1. [OCT368] data.blend={'a': 1.0}: data.source=" in capsys.readouterr().err
    assert main(words(root, "source=", "blend={a:1,b:0}")) == 2
    assert "[OCT369] data.blend={'a': 1.0, 'b': 0.0}" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["bild"], 2), (["--help"], 0), (["build", "-h"], 0)])
def test_usage(argv: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == code
    said = capsys.readouterr()
    assert "usage: python -m engine.data COMMAND" in (said.err if code else said.out)


def test_interruption_says_that_nothing_is_lost(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "prepare", interrupted)
    assert main(words(root)) == 130
    assert "goes on with the finished shards" in capsys.readouterr().err


def test_neither_builder_nor_worker_waits_for_torch() -> None:
    names = "engine.data.__main__, engine.data.build.worker"
    check = f"import sys, {names}; print(*{{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr
