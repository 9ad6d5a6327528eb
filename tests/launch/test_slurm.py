"""The batch scripts on a real Slurm of two nodes: same bits, stops that save, requeue, lost nodes, chains, arrays."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator

import pytest

from tests.helpers.command import Done, run_command
from tests.helpers.repo import ROOT
from tests.helpers.slurm import Slurm, cluster, missing

REASON = missing()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.ranks,
    pytest.mark.timeout(600),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]

STEPS = 40
JOB = (
    "model=gpt_tiny model.num_layers=2 model.hidden_size=32 model.num_heads=4 model.vocab_size=263 data=random "
    "data.seq_len=16 data.vocab_size=263 optim.warmup_steps=3 optim.lr=1e-3 train.device=cpu train.cpu_threads=1 "
    "train.eval_batches=0 train.micro_batch=2 train.accum_steps=2 logging.plot=false "
    "checkpoint.save_final=false"
)
MODEL = JOB.split()
FOUR = [*MODEL, "parallel.pp=2", "parallel.dp=2", "zero=z1"]
LENGTH = [f"train.steps={STEPS}", f"checkpoint.every={STEPS}"]
TWO_NODES = ["launch=slurm", "launch.nodes=2"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture(scope="module")
def expected(slurm: Slurm) -> list[tuple[int, str]]:
    """The curve of the job without a launcher."""
    words = [sys.executable, "-m", "engine.train", *FOUR, *LENGTH, "run.name=alone"]
    done = run_command(words, slurm.root, 200, env=slurm.env)
    assert done.exit_code == 0, done
    return curve(slurm, "alone")


def curve(slurm: Slurm, name: str) -> list[tuple[int, str]]:
    """Step and loss, as an exact hexadecimal number."""
    rows = [json.loads(line) for line in (slurm.root / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], float(row["loss"]).hex()) for row in rows if "loss" in row]


def submit(slurm: Slurm, *words: str) -> Done:
    return run_command([sys.executable, str(ROOT / "launch/submit.py"), *words], slurm.root, 60, env=slurm.env)


def submitted(slurm: Slurm, *words: str) -> str:
    """The number of the job."""
    done = submit(slurm, *words)
    assert done.exit_code == 0, done
    return re.findall(r"^(\d+)$", done.stdout, re.MULTILINE)[-1]


def said(slurm: Slurm, name: str) -> str:
    """What the job itself and its first rank wrote."""
    folder = slurm.root / "runs" / name / "launch"
    return "".join(path.read_text() for path in [*folder.glob("slurm-*.out"), *folder.glob("logs/*-rank0.log")])


def reached(slurm: Slurm, name: str, step: int) -> None:
    metrics = slurm.root / "runs" / name / "metrics.jsonl"
    slurm.until(f"step {step} of {name}", lambda: metrics.exists() and metrics.read_text().count("\n") > step)


def saved(slurm: Slurm, name: str) -> list[int]:
    return [int(path.parent.name[5:]) for path in slurm.root.glob(f"runs/{name}/checkpoints/step-*/COMPLETE")]


def test_two_nodes_give_the_same_bits(slurm: Slurm, expected: list[tuple[int, str]]) -> None:
    words = [*TWO_NODES, *FOUR, *LENGTH, "run.name=bits", "launch.slurm.partition=main"]
    job = submitted(slurm, *words)
    facts = slurm.ended(job)
    assert facts["JobState"] == "COMPLETED", said(slurm, "bits")
    assert facts["NodeList"] == "n[1-2]"
    assert len(expected) == STEPS
    assert curve(slurm, "bits") == expected
    logs = sorted(path.name for path in (slurm.root / "runs/bits/launch/logs").iterdir())
    assert logs == [f"{job}-rank{rank}.log" for rank in range(4)]


def test_scancel_with_sigterm_saves_and_stays_stopped(slurm: Slurm) -> None:
    job = submitted(slurm, *TWO_NODES, *FOUR, "train.steps=100000", "run.name=stopped")
    reached(slurm, "stopped", 3)
    slurm.run("scancel", "--signal=TERM", job)
    facts = slurm.ended(job)
    assert (facts["ExitCode"], facts["Restarts"]) == ("75:0", "0"), said(slurm, "stopped")
    assert saved(slurm, "stopped") == [len(curve(slurm, "stopped"))]


def test_plain_scancel_saves_too(slurm: Slurm) -> None:
    job = submitted(slurm, "launch=slurm", *MODEL, "parallel.pp=2", "train.steps=100000", "run.name=cancelled")
    reached(slurm, "cancelled", 3)
    slurm.run("scancel", job)
    assert slurm.ended(job)["JobState"] == "CANCELLED"
    slurm.until("a whole checkpoint", lambda: saved(slurm, "cancelled") != [], 30)
    assert saved(slurm, "cancelled") == [len(curve(slurm, "cancelled"))]


def test_a_warned_job_is_put_back_and_ends_with_the_same_losses(slurm: Slurm, expected: list[tuple[int, str]]) -> None:
    job = submitted(slurm, *TWO_NODES, *FOUR, *LENGTH, "run.name=warned")
    reached(slurm, "warned", 3)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.until("its way back into the queue", lambda: slurm.state(job) == "PENDING", 60)
    # Slurm waits two minutes before it starts a job again; in the same second nodes still end what ran there.
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")
    slurm.until("a second start", lambda: slurm.state(job) == "RUNNING", 60)
    (stopped_at,) = saved(slurm, "warned")
    assert 3 <= stopped_at < STEPS
    facts = slurm.ended(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), said(slurm, "warned")
    assert f"step {stopped_at}, sample" in said(slurm, "warned")
    assert curve(slurm, "warned") == expected


def test_a_lost_node_ends_the_job_and_says_so(slurm: Slurm) -> None:
    more = ["train.steps=100000", "run.name=lost", "launch.slurm.extra=['--no-requeue']"]
    job = submitted(slurm, *TWO_NODES, *FOUR, *more)
    reached(slurm, "lost", 2)
    slurm.daemons["n2"].kill()
    slurm.daemons["n2"].wait()
    try:
        facts = slurm.ended(job, 90)
        assert facts["JobState"] == "NODE_FAIL", said(slurm, "lost")
        slurm.until("a reason in the log", lambda: "DUE TO NODE FAILURE" in said(slurm, "lost"), 30)
    finally:
        slurm.start("n2")
        slurm.until("n2 back", lambda: slurm.run("sinfo", "-h", "-o", "%T").stdout.split() == ["idle"], 90)


def test_a_failed_rank_shows_its_reason_and_is_not_put_back(slurm: Slurm) -> None:
    words = [*FOUR, "train.steps=5", "run.name=refused", "checkpoint.initial_weights=/no/such/weights"]
    job = submitted(slurm, *TWO_NODES, *words)
    facts = slurm.ended(job)
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0")
    (log,) = (slurm.root / "runs/refused/launch").glob("slurm-*.out")
    assert "training ended with exit code" in log.read_text()
    assert "checkpoint.initial_weights=/no/such/weights" in log.read_text()


def test_the_time_limit_saves_and_the_chain_goes_on(slurm: Slurm) -> None:
    limit = ["launch.slurm.time=01:00:00", "launch.slurm.warn_s=60", "launch.slurm.jobs=2"]
    job = submitted(slurm, *TWO_NODES, *FOUR, "train.steps=1000000", "run.name=chain", *limit)
    reached(slurm, "chain", 3)
    # The limit is cut to one or two minutes from now, so that the warning is due within one.
    hours, minutes, _ = slurm.facts(f"{job}_1")["RunTime"].split(":")
    slurm.run("scontrol", "update", f"JobId={job}_1", f"TimeLimit={int(hours) * 60 + int(minutes) + 2}")
    folder = slurm.root / "runs/chain/launch"
    first = folder / f"slurm-{job}_1.out"
    slurm.until("the warning", lambda: "the next job of the chain goes on" in first.read_text(), 150)
    stopped_at = max(saved(slurm, "chain"))
    slurm.until("the second job", lambda: f"step {stopped_at}, sample" in said(slurm, "chain"), 180)
    assert slurm.facts(f"{job}_1")["JobState"] == "COMPLETED"
    slurm.run("scancel", job)
    slurm.until("an empty queue", lambda: not slurm.run("squeue", "-h").stdout.strip(), 60)


def test_an_array_runs_each_trial(slurm: Slurm) -> None:
    trials = slurm.root / "trials.txt"
    trials.write_text("# two rates\noptim.lr=1e-3 run.name=low\n'optim.lr=2e-3'\n")
    more = ["parallel.pp=2", "train.steps=6", "run.name=search", f"launch.slurm.trials={trials}"]
    job = submitted(slurm, "launch=slurm", *MODEL, *more)
    slurm.until("an empty queue", lambda: not slurm.run("squeue", "-h", "--job", job).stdout.strip())
    low, high = curve(slurm, "low"), curve(slurm, "search-2")
    assert len(low) == len(high) == 6
    assert low[0] == high[0]
    assert low[-1] != high[-1]


def test_an_array_runs_a_search(slurm: Slurm) -> None:
    start = [sys.executable, "-m", "engine.train", "-m", "launch=slurm", *MODEL, "parallel.pp=2", "train.steps=6"]
    words = [*start, "train.eval_batches=1", "optim.lr=1e-3,2e-3", "search.study=rates"]
    done = run_command(words, slurm.root, 120, env=slurm.env)
    assert done.exit_code == 0, done
    assert "python -m engine.tune report" in done.stdout
    slurm.until("an empty queue", lambda: not slurm.run("squeue", "-h").stdout.strip())
    report = run_command([sys.executable, "-m", "engine.tune", "report", "runs/rates"], slurm.root, 60, env=slurm.env)
    assert report.exit_code == 0, report
    assert report.stdout.count(" done ") == 2
    assert (slurm.root / "runs/rates/best.yaml").is_file()


def test_unknown_partitions_are_refused_before_anything_is_written(slurm: Slurm) -> None:
    done = submit(slurm, *TWO_NODES, *FOUR, "train.steps=5", "run.name=part", "launch.slurm.partition=mian")
    assert done.exit_code == 2
    assert "[OCT538] launch.slurm.partition=mian: sinfo knows no partition mian. Nearest: main" in done.stderr
    assert not (slurm.root / "runs/part").exists()


def test_what_sbatch_refuses_is_passed_on(slurm: Slurm) -> None:
    more = ["train.steps=5", "run.name=sbatch", "launch.slurm.extra=['--nodelist=n9']"]
    done = submit(slurm, *TWO_NODES, *FOUR, *more)
    assert done.exit_code == 2
    assert "[OCT541]" in done.stderr
    assert "Invalid node name specified" in done.stderr
