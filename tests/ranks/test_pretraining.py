"""Loss curves of real training, next to those of plain transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from benchmarks.pretraining import plain
from benchmarks.pretraining.plain import Curves
from benchmarks.pretraining.run import LIMIT, beyond_transformers, differences, require_equal_rates
from engine.config.load import load
from engine.data import prepare
from tests.helpers.command import clean_env, run_command

pytestmark = pytest.mark.ranks

STEPS = 20
SMALL = (
    "model.num_layers=2 model.hidden_size=64 model.num_heads=4 model.vocab_size=300 data.source=texts data.seq_len=32 "
    "data.valid_fraction=0"
)
FAMILIES = {
    # Most of the time is the start of the ranks: one family is enough for tp and dp.
    "gpt": "parallel=pp2 parallel.dp=1 train.micro_batch=4",
    "bert": "parallel=octant",
}
# A fifteenth of the benchmark's 300 steps has room for a tenth of its limit; rounding makes 2e-6.
SHORT_LIMIT = LIMIT / 10
# Adam hides the scale of gradients, their norm does not. Rounding: about 5e-7.
NORM_LIMIT = 1e-4
EXACT = ("octant vs transformers in fp64", "transformers vs itself in fp64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a small corpus."""
    root = tmp_path_factory.mktemp("pretraining")
    (root / "texts").mkdir()
    for i in range(16):
        words = " ".join(f"word{(i * j * j) % 97}" for j in range(1200))
        (root / "texts" / f"{i}.txt").write_text(f"text {i}: {words}\n")
    return root


def rows_of(folder: Path, family: str) -> list[dict[str, Any]]:
    """What the benchmark writes when it is run as its documentation says."""
    words = f"--steps {STEPS} --family {family} --out {family} --commit none {SMALL} {FAMILIES[family]}"
    command = f"{sys.executable} -m benchmarks.pretraining.run {words}"
    done = run_command(command, folder, 200, env=clean_env({"XDG_CACHE_HOME": str(folder / "cache")}))
    assert done.exit_code == 0, done
    return [json.loads(line) for line in (folder / family / "rows.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_transformers(folder: Path, family: str) -> None:
    ours, ours_exact, theirs_exact = rows_of(folder, family)
    assert (ours["system"], ours["n"]) == ("octant vs transformers", STEPS)
    # Before the first update only the order of sums differs.
    assert ours["first"] <= 1e-5
    assert ours["worst"] <= SHORT_LIMIT
    assert (ours_exact["system"], theirs_exact["system"]) == EXACT
    assert max(ours_exact["worst"], theirs_exact["worst"]) <= SHORT_LIMIT
    assert ours["worst_norm"] <= NORM_LIMIT
    first, last = ours["losses"]
    assert last < first - 0.2, "too little was learnt for the curves to say anything"
    assert (folder / family / f"{family}.png").read_bytes().startswith(b"\x89PNG")


def plain_losses(*words: str) -> list[float]:
    cfg = load(["experiment=gpt_tiny_lm", *SMALL.split(), f"train.steps={STEPS}", *words])
    prepare(cfg.data, print)
    return plain.train(plain.build(cfg), cfg).losses


def test_the_limit_sees_small_faults(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    right = plain_losses()
    faults = ("optim.lr=1.01e-3", "optim.beta2=0.96", "optim.clip_norm=0", "model.init_std=0.0201")
    worst = {fault: max(differences(plain_losses(fault), right)) for fault in faults}
    assert {fault: value for fault, value in worst.items() if value <= LIMIT} == {}


def test_options_that_the_plain_loop_lacks_are_named() -> None:
    lines = beyond_transformers(load(["experiment=gpt_tiny_lm", "model.dropout=0.1", "train.z_loss=0.001"]))
    assert lines == [
        "model.dropout: 0.1, and the comparison needs 0.0",
        "train.z_loss: 0.001, and the comparison needs 0.0",
    ]
    for name in ("gpt_tiny_lm", "bert_tiny_mlm"):
        assert beyond_transformers(load([f"experiment={name}"])) == []


def test_other_learning_rates_stop_the_comparison() -> None:
    theirs = Curves([1.0, 1.0], [1.0, 1.0], [1e-3, 2e-3])
    require_equal_rates(theirs, theirs)
    with pytest.raises(SystemExit, match="learning rates differ, step 2: 0.0021 and 0.002"):
        require_equal_rates(Curves([1.0, 1.0], [1.0, 1.0], [1e-3, 2.1e-3]), theirs)
