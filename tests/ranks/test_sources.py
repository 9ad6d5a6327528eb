"""Every kind of data trains: the command, from raw records to a falling loss, on two ranks."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.command import clean_env, run_command

BASE = ["train.device=cpu", "train.steps=12", "optim.lr=3e-3", "optim.warmup_steps=2", "train.accum_steps=2"]
BASE += ["data.seq_len=32", "data.vocab_size=300", "model.vocab_size=300", "data.cache_dir=cache", "logging.every=1"]


def write(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("sources"), random.Random(0)
    numbers = [(draw.randint(0, 99), draw.randint(0, 99)) for _ in range(200)]
    write(folder / "sums.jsonl", [{"prompt": f"{a} + {b} =", "completion": f" {a + b}."} for a, b in numbers])
    write(
        folder / "views.jsonl",
        [{"text": "good " * (a % 9 + 1) if a % 2 else f"bad {a}", "label": a % 2} for a, _ in numbers],
    )
    write(folder / "tales.jsonl", [{"text": f"Once there were {a} geese and {b} ducks. " * 3} for a, b in numbers])
    write(folder / "notes.jsonl", [{"text": f"note {b}: buy {a} eggs"} for a, b in numbers])
    return folder


def train(folder: Path, name: str, *words: str) -> tuple[list[float], str]:
    """Losses of all steps, and what was printed."""
    done = run_command([sys.executable, "-m", "engine.train", *words, *BASE, f"run.name={name}"], folder, 200)
    assert done.exit_code == 0, str(done)
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row], done.stdout


def test_completions_are_learned(folder: Path) -> None:
    losses, _ = train(folder, "sums", "model=gpt_tiny", "data=completion", "data.source=sums.jsonl", "parallel.pp=2")
    assert losses[-1] < losses[0] - 1.0


def test_classes_are_learned(folder: Path) -> None:
    words = ["model=bert_tiny", "data=rows", "data.source=views.jsonl", "data.tokenizer=wordpiece", "parallel.dp=2"]
    losses, _ = train(folder, "views", *words, "train.micro_batch=8")
    assert losses[0] == pytest.approx(0.69, abs=0.2)
    assert losses[-1] < 0.4


def test_a_blend_of_packed_documents_is_learned_and_so_are_megatron_files(folder: Path) -> None:
    words = ["model=gpt_tiny", "data.document_mask=true", "parallel.tp=2"]
    blend = "data.blend={tales.jsonl:0.75,notes.jsonl:0.25}"
    losses, _ = train(folder, "blend", "data=blend", blend, *words)
    assert losses[-1] < losses[0] - 0.5

    whole, _ = train(
        folder, "whole", "data=text", "data.source=tales.jsonl", "data.valid_fraction=0", "train.eval_batches=0", *words
    )
    entry = next(
        path.parent
        for path in (folder / "cache").glob("tales-*/meta.json")
        if "train" in json.loads(path.read_text())["splits"] and len(json.loads(path.read_text())["splits"]) == 1
    )
    source = [f"data.source={entry / 'train'}", f"data.tokenizer={entry / 'tokenizer'}", "data.valid_fraction=0"]
    foreign, _ = train(folder, "foreign", "data=text", *source, "train.eval_batches=0", *words)
    assert foreign[0] == pytest.approx(whole[0], abs=0.5) and foreign[-1] < foreign[0] - 0.5


def test_rearranged_documents_of_a_megatron_prefix_without_their_tokenizer_are_refused(folder: Path) -> None:
    (folder / "made.bin").write_bytes(b"\0\0")
    (folder / "made.idx").write_bytes(b"MMIDIDX\0\0")
    words = ["model=gpt_tiny", "data=text", "data.source=made", "data.fim_rate=0.5"]
    done = run_command([sys.executable, "-m", "engine.train", *words, *BASE, "run.name=made"], folder, 100)
    assert done.exit_code == 2
    assert (
        "[OCT452] data.tokenizer=bpe" in done.stderr
        and "Set data.tokenizer to the tokenizer that made it" in done.stderr
    )


def test_ctrl_c_while_token_files_are_built_is_no_failure(folder: Path) -> None:
    text = folder / "long.txt"
    text.write_text("\n".join(f"line {n} of a long text, {n * n}" for n in range(400_000)))
    words = ["model=gpt_tiny", "data=text", "data.source=long.txt", "data.valid_fraction=0", "train.eval_batches=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "engine.train", *words, *BASE, "run.name=long"],
        cwd=folder,
        env=clean_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "building" in line:
            process.send_signal(signal.SIGINT)
            break
    stderr = process.communicate(timeout=60)[1]
    assert (process.returncode, stderr.splitlines()[-1]) == (130, "interrupted")
    assert "Traceback" not in stderr and not (folder / "runs" / "long").exists()
