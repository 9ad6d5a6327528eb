"""Pipelines on real ranks do what their programs say, in that order, and it can be drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.config import Config
from engine.config.load import load
from engine.observe.timeline import draw_timeline
from engine.study.__main__ import main
from engine.study.timeline import DEFAULTS, program_of, trace_rank
from engine.topology.grid import Grid
from engine.topology.program import OpKind, Program
from engine.topology.timeline import Event, Timeline
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.ranks

SMALL = ["model=gpt_tiny", "model.num_layers=6", "train.device=cpu", "data.seq_len=16", "train.micro_batch=1"]


LAYOUTS = {
    2: [
        ("parallel=pp2", "train.accum_steps=4"),
        ("parallel=interleaved", "train.accum_steps=4"),
        ("parallel=dualpipev", "train.accum_steps=5"),
    ],
    4: [
        ("parallel=dualpipev", "parallel.pp=4", "train.accum_steps=8"),
        ("parallel=pp2", "parallel.tp=2", "train.accum_steps=3", "model=bert_tiny"),
    ],
}


def traces(cfgs: list[Config]) -> list[list[Event]]:
    """What this rank's stage did in the last step of each configuration."""
    return [trace_rank(cfg)[-1] for cfg in cfgs]


@pytest.mark.parametrize("world", LAYOUTS)
def test_stages_run_their_programs_in_order(world: int, tmp_path: Path) -> None:
    cfgs = [load([*DEFAULTS, *SMALL, *layout, "train.steps=2"]) for layout in LAYOUTS[world]]
    ranks = run_ranks(traces, world, (cfgs,), timeout_s=150)
    for index, cfg in enumerate(cfgs):
        stages = Grid.from_config(cfg.parallel, world).groups("pp")[0]
        step = Timeline.from_events(event for rank in stages for event in ranks[rank][index])
        require_order(step, program_of(cfg))
        draw_timeline(tmp_path / "timeline.png", [("measured", step)], "measured")
        assert (tmp_path / "timeline.png").stat().st_size > 1000
        (tmp_path / "timeline.png").unlink()


def require_order(step: Timeline, program: Program) -> None:
    """Each stage did what its program says, and no message came before it was sent."""
    assert [[event.op for event in events] for events in step.events] == [list(ops) for ops in program.ops]
    ends = {(event.op.kind, event.op.chunk, event.op.micro_batch): event for row in step.events for event in row}
    for (kind, chunk, micro), event in ends.items():
        if kind is OpKind.recv_activation:
            # One clock for all ranks: a message arrives after its sending began.
            assert event.end >= ends[OpKind.send_activation, chunk - 1, micro].start
        if kind is OpKind.recv_grad:
            assert event.end >= ends[OpKind.send_grad, chunk + 1, micro].start


def test_the_study_draws_and_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["timeline", *SMALL, "train.steps=4", "run.name=drawn", "parallel=interleaved"]) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "runs" / "drawn"
    assert (folder / "timeline.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((folder / "timeline.json").read_text())
    for name in ("predicted", "measured"):
        timeline = Timeline.from_rows(rows[name])
        assert f"{name}: {timeline.makespan:.4g} s, bubble {timeline.bubble:.1%}" in said
        assert 0 < timeline.bubble < 1
    assert "median of 2 steps" in said
