"""Whatever has happened to the files of a checkpoint is found before anything changes, and nothing in them is run."""

from __future__ import annotations

import pickle
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.checkpoint import commands
from engine.checkpoint.manifest import COMPLETE, MANIFEST
from engine.checkpoint.reader import Reader
from engine.checkpoint.restore import load, open_verified
from engine.checkpoint.save import Saver
from engine.dist.context import ParallelContext
from engine.errors import CheckpointError
from engine.topology.grid import Grid
from tests.helpers.checkpoints import flip_byte, rewrite_manifest
from tests.helpers.command import clean_env, run_command
from tests.helpers.forked import train
from tests.helpers.ranks import run_ranks
from tests.helpers.slotted import Slotted, facts, require_draw

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]

DAMAGES = 250
HOW = ("flip", "flip", "flip", "truncate", "truncate", "grow", "zeros", "delete", "folder", "other")
Outcome = tuple[str, int, bool]
"""What was done, the code of the refusal (0: none), whether the engine's state had changed."""


def damage(folder: Path, draw: random.Random) -> str:
    """Do one thing to one file; says what."""
    path = draw.choice(sorted(folder.iterdir()))
    how, size = draw.choice(HOW), path.stat().st_size
    content, place = path.read_bytes(), draw.randrange(size)
    match how:
        case "flip":
            path.write_bytes(
                content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]
            )
        case "truncate":
            path.write_bytes(content[:place])
        case "grow":
            path.write_bytes(content + draw.randbytes(4))
        case "zeros":
            # The last bytes are of no tensor's padding, and no checksum ends in this many zeros.
            path.write_bytes(content[: size // 2] + bytes(size - size // 2))
        case "other":
            other = draw.choice([file for file in sorted(folder.iterdir()) if file != path])
            path.write_bytes(other.read_bytes())
        case _:
            path.unlink()
            if how == "folder":
                path.mkdir()
    return f"{how} {path.name} {place}"


def try_all(root: str, count: int) -> list[Outcome]:
    """Save, then damage and load again and again, on all ranks at once."""
    good, bad = Path(root, "good"), Path(root, "bad")
    world = dist.get_world_size()
    engine = Slotted(ParallelContext.create(Grid(dp=world), torch.device("cpu"))).fill(1)
    saver = Saver(engine.engine, asynchronous=False)
    saver.save(good, facts(1, 1))
    saver.close()
    engine.fill(2)
    before, draw, found = engine.digest(), random.Random(5), []
    for _ in range(count):
        said: list[str] = [""]
        if dist.get_rank() == 0:
            shutil.copytree(good, bad)
            said = [damage(bad, draw)]
        dist.broadcast_object_list(said, src=0)
        code = 0
        try:
            load(engine.engine, open_verified([bad], print))
        except CheckpointError as error:
            code = error.violations[0].code
        found.append((said[0], code, engine.digest() != before))
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(bad)
    load(engine.engine, open_verified([good], print))
    found.append(("none", 0, engine.digest() != before))
    return found


def test_every_damage_is_found_before_anything_changes(tmp_path: Path) -> None:
    everyone = run_ranks(try_all, 2, (str(tmp_path), DAMAGES))
    assert everyone[0] == everyone[1], "ranks agree"
    *found, whole = everyone[0]
    assert whole == ("none", 0, True), "what is whole is loaded"
    assert len(found) == DAMAGES
    missed = [outcome for outcome in found if outcome[1] not in (631, 632) or outcome[2]]
    assert missed == []
    # Without its marker a folder is no checkpoint; with it, it is a damaged one.
    gone = [how for how, code, _ in found if code == 631]
    assert gone
    assert {how.split()[1] for how in gone} == {COMPLETE}
    files = Counter(how.split()[1] for how, _, _ in found)
    assert files.keys() == {COMPLETE, MANIFEST, "rank-00000.safetensors", "rank-00001.safetensors"}
    assert min(files.values()) > 30
    assert require_draw(Reader(tmp_path / "good")) == 1


MODEL = ("model=gpt_tiny", "model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.vocab_size=203")
JOB = (*MODEL, "data=random", "data.seq_len=16", "train.micro_batch=2", "train.device=cpu", "train.cpu_threads=1")
JOB += ("train.eval_batches=0", "checkpoint.every=2", "logging.progress=false", "logging.plot=false")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: `done` has checkpoints after 2 and 4 steps, weights, and an export beside it."""
    root = tmp_path_factory.mktemp("runs")
    done = train([*JOB, "train.steps=4", f"run.dir={root}", "run.name=done"])
    assert done.exit_code == 0, done
    assert commands.main(["export", str(root / "done"), str(root / "export")]) == 0
    return root


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(trained, tmp_path / "runs")


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(runs: Path) -> None:
    steps = [runs / "done" / "checkpoints" / f"step-0000000{step}" for step in (2, 4)]
    shard = steps[1] / "rank-00000.safetensors"
    flip_byte(shard, shard.stat().st_size - 5)
    command = ["python", "-m", "engine.train", *JOB, "train.steps=6", f"run.dir={runs}"]
    refused = run_command([*command, "run.name=new", f"checkpoint.load={steps[1]}"], runs, 120, env=clean_env())
    assert refused.exit_code == 2, refused
    assert f"[OCT632] checkpoint.load={steps[1]}: it is damaged: rank-00000.safetensors has other" in refused.stderr
    assert "Name an earlier checkpoint, or copy this one again" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (runs / "new" / "metrics.jsonl").exists()
    done = run_command([*command, "run.name=done", "run.resume=true"], runs, 120, env=clean_env())
    assert done.exit_code == 0, done
    said = done.stdout + done.stderr
    assert f"[OCT632] run.resume={steps[1]}: it is damaged" in said
    assert f"going on with the one before, {steps[0]}" in said
    assert f"going on from {steps[0]}: step 2, sample 4" in said
    # What was damaged has been replaced on the way.
    Reader(steps[1]).verify()
    assert commands.main(["verify", str(runs / "done")]) == 0


class Bomb:
    """A pickle that makes a file when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


NAMES = (
    *("pytorch_model.bin", "model.pt", "optimizer.pt", "state.pkl", "latest", "scheduler.pt", "training_args.bin"),
    *("zero_pp_rank_0_optim_states.pt", ".metadata", "__0_0.distcp", "rank-00009.safetensors", "consolidated.00.pth"),
)


def plant(folder: Path, content: bytes) -> None:
    for name in NAMES:
        (folder / name).write_bytes(content)


def every_use(runs: Path) -> Iterator[int]:
    """Exit codes of all that reads a run, a checkpoint or a Hugging Face folder."""
    run, step, hf = runs / "done", runs / "done" / "checkpoints" / "step-00000004", runs / "export"
    for folder in (run, step, run / "weights"):
        yield commands.main(["inspect", str(folder), "--hashes"])
        yield commands.main(["verify", str(folder)])
        yield commands.main(["diff", str(folder), str(folder)])
        yield commands.main(["export", str(folder), str(runs / f"out-{folder.name}")])
    yield commands.main(["inspect", str(hf)])
    common = [*JOB, "train.steps=6", f"run.dir={runs}"]
    yield train([*common, "run.name=loaded", f"checkpoint.load={step}"]).exit_code
    yield train([*common, "run.name=begun", f"checkpoint.initial_weights={run}"]).exit_code
    yield train([*common, "run.name=theirs", f"checkpoint.initial_weights={hf}"]).exit_code
    yield train([*common, "run.name=done", "run.resume=true"]).exit_code


def test_pickles_beside_the_tensors_are_never_opened(runs: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(mark))
    for folder in (
        runs / "done",
        runs / "export",
        runs / "done" / "weights",
        *(runs / "done" / "checkpoints").iterdir(),
    ):
        if folder.is_dir():
            plant(folder, bomb)
    plant(runs / "done" / "checkpoints", bomb)
    codes = list(every_use(runs))
    assert not mark.exists()
    assert codes == [0] * len(codes)
    pickle.loads(bomb)
    assert mark.exists(), "the bomb works"


def test_pickles_in_the_place_of_the_tensors_are_never_opened(
    runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(mark))
    step = runs / "done" / "checkpoints" / "step-00000004"
    # The marker is one that belongs to the pickle: nothing but its content speaks against it.
    rewrite_manifest(step, bomb)
    for path in (runs / "export").glob("*.safetensors"):
        path.write_bytes(bomb)
    for path in [*(runs / "done").rglob("rank-*.safetensors")]:
        path.write_bytes(bomb + bytes(path.stat().st_size - len(bomb)))
    codes = list(every_use(runs))
    assert not mark.exists()
    assert 0 not in codes
    assert set(codes) == {2}
    said = capfd.readouterr().err
    assert "[OCT634]" in said
    assert "manifest.json cannot be read as a checkpoint's" in said
    assert "Traceback" not in said


def test_a_folder_of_pickles_alone_is_refused(runs: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    folder = tmp_path / "pickled"
    folder.mkdir()
    plant(folder, pickle.dumps(Bomb(mark)))
    common = [*JOB, "train.steps=6", f"run.dir={runs}", "run.name=new"]
    first = train([*common, f"checkpoint.initial_weights={folder}"])
    state = train([*common, f"checkpoint.load={folder}"])
    assert (first.exit_code, state.exit_code) == (2, 2), (first, state)
    assert "[OCT616]" in first.stderr
    assert "opening a pickle runs code of whoever made it" in first.stderr
    assert "[OCT631]" in state.stderr
    assert not mark.exists()
