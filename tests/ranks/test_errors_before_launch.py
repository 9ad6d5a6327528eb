"""What one process can see is refused before eight are started: one message, exit code 2, earlier results kept."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.command import Done, clean_env, run_command

pytestmark = pytest.mark.ranks

RUN = (
    "python -m engine.train parallel=octant train.device=cpu train.steps=2 train.eval_batches=0 "
    "data.seq_len=16 data.vocab_size=300 data.valid_fraction=0 run.name=kept"
)
OVERWRITE = "run.overwrite=true"
TEXT = "the quick brown fox jumps over the lazy dog\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with a corpus, an empty corpus, a short corpus, weights and the results of an earlier run."""
    for name, text in (("texts/a.txt", TEXT * 50), ("blank/a.txt", ""), ("short/a.txt", "ab"), ("none/a.bin", "x")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    other = {"weight": {"conv.weight": torch.zeros(2)}}
    write_checkpoint(tmp_path / "other" / "weights", other)
    write_checkpoint(tmp_path / "other" / "checkpoints" / "step-00000001", {**other, "exp_avg": other["weight"]})
    run = tmp_path / "runs" / "kept"
    (run / "weights").mkdir(parents=True)
    for name in ("metrics.jsonl", "summary.json", "weights/manifest.json"):
        (run / name).write_text("{}\n")
    return tmp_path


@pytest.fixture
def refuse(folder: Path) -> Callable[[str], Done]:
    """Runs the job with more overrides and checks what every refusal has in common."""

    def run(overrides: str) -> Done:
        before = _content(folder / "runs")
        env = clean_env({"XDG_CACHE_HOME": str(folder / "cache")})
        done = run_command(f"{RUN} {overrides}", folder, 120, env=env)
        assert done.exit_code == 2, done
        assert _content(folder / "runs") == before
        assert "Traceback" not in done.stdout + done.stderr
        # Building the corpus is told as it happens; nothing of a run may be.
        assert [line for line in done.stdout.splitlines() if not line.startswith("data: ")] == []
        return done

    return run


def _content(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def require_one_message(done: Done, kind: str, code: int, *words: str) -> None:
    """stderr is the error's name and one numbered message that holds `words`."""
    name, message = done.stderr.splitlines()
    assert name == f"{kind}:"
    assert re.match(rf"1\. \[OCT{code}\] ", message), message
    assert [word for word in words if word not in message] == []


def test_missing_corpus_folder(refuse: Callable[[str], Done]) -> None:
    done = refuse(f"data.source=nowhere {OVERWRITE}")
    require_one_message(done, "DataError", 401, "data.source=nowhere", "no folder has this path", "data.source=python")
    assert done.stdout == ""


def test_corpus_without_text_files(refuse: Callable[[str], Done]) -> None:
    done = refuse(f"data.source=none {OVERWRITE}")
    require_one_message(done, "DataError", 402, "data.source=none", "holds 0 files", "Give a folder with such files")
    assert done.stdout == ""


def test_empty_corpus(refuse: Callable[[str], Done]) -> None:
    done = refuse(f"data.source=blank {OVERWRITE}")
    require_one_message(done, "DataError", 403, "data.source=blank", "a.txt: is empty", "Give text files in UTF-8")


def test_data_shorter_than_one_sample(refuse: Callable[[str], Done]) -> None:
    done = refuse(f"data.source=short {OVERWRITE}")
    require_one_message(done, "DataError", 411, "data.seq_len=16", "needs data.seq_len + 1 = 17", "Nearest legal")


def test_weights_of_another_model(refuse: Callable[[str], Done]) -> None:
    done = refuse(f"data.source=texts checkpoint.initial_weights=other/weights {OVERWRITE}")
    words = ("checkpoint.initial_weights=other/weights", "belongs to another model", "conv.weight", "Use the model")
    require_one_message(done, "CheckpointError", 638, *words)
    assert done.stdout == ""


def test_folder_that_holds_no_weights(refuse: Callable[[str], Done]) -> None:
    done = refuse(f"data.source=texts checkpoint.initial_weights=texts {OVERWRITE}")
    words = ("checkpoint.initial_weights=texts", "neither weights of Octant nor of transformers", "Name a run such as")
    require_one_message(done, "CheckpointError", 611, *words)


def test_state_of_another_model(refuse: Callable[[str], Done]) -> None:
    done = refuse(f"data.source=texts checkpoint.load=other {OVERWRITE}")
    words = ("checkpoint.load=other/checkpoints/step-00000001", "belongs to another model", "conv.weight")
    require_one_message(done, "CheckpointError", 638, *words)


def test_state_that_is_not_there(refuse: Callable[[str], Done]) -> None:
    done = refuse(f"data.source=texts checkpoint.load=nowhere {OVERWRITE}")
    words = ("checkpoint.load=nowhere", "it holds no finished checkpoint", "Name the folder of a run")
    require_one_message(done, "CheckpointError", 631, *words)


def test_kernel_that_cannot_run_here(refuse: Callable[[str], Done]) -> None:
    done = refuse(f"data.source=texts kernels.attention=sdpa_cudnn {OVERWRITE}")
    words = ("kernels.attention=sdpa_cudnn", "needs a CUDA device", "Use kernels.attention=auto")
    require_one_message(done, "ConfigError", 330, *words)


def test_results_of_an_earlier_run(refuse: Callable[[str], Done]) -> None:
    done = refuse("data.source=texts")
    require_one_message(
        done, "CheckpointError", 601, "run.name=kept", "already holds", "run.name=kept-2", "run.resume=true", OVERWRITE
    )


def test_streamed_state_that_no_host_has_room_for(tmp_path: Path) -> None:
    """What a device leaves to its host is known where the device is: after the start, before anything is built."""
    command = "python -m engine.train model=gpt_13b model.num_layers=2000 data=random precision=bf16 zero=z1_offload"
    command += " checkpoint.save_final=false run.name=large"
    done = run_command(command.split(), tmp_path, 120, env=clean_env({"CUDA_VISIBLE_DEVICES": ""}))
    assert done.exit_code == 2, done
    assert "[OCT345] zero.offload_optimizer=cpu: 1 ranks of this host would keep" in done.stderr
    assert "Use zero.offload_optimizer=none, or spread the replicas over at least" in done.stderr
    assert not (tmp_path / "runs" / "large" / "config.yaml").exists()
