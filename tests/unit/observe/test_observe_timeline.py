from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.config.enums import PipelineSchedule
from engine.errors import DataError
from engine.observe.timeline import draw_timeline
from engine.topology.schedule import simulate
from engine.topology.timeline import Timeline

PLAIN = simulate(PipelineSchedule.one_f_one_b, 2, 4)


def svg(tmp_path: Path, *rows: tuple[str, Timeline]) -> str:
    path = tmp_path / "timeline.svg"
    draw_timeline(path, rows, "1F1B against DualPipeV")
    return path.read_text(encoding="utf-8")


def texts(picture: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture)


def fills(picture: str) -> set[str]:
    """Colours of the blocks: collections, not the legend's or the background's patches."""
    blocks = re.findall(r'<g id="PolyCollection_\d+">(.*?)</g>', picture, flags=re.DOTALL)
    return set(re.findall(r"fill: (#\w+)", "".join(blocks)))


def test_panels_state_their_name_length_and_idle_share(tmp_path: Path) -> None:
    longer = simulate(PipelineSchedule.one_f_one_b, 2, 4, backward_s=3.0)
    seen = texts(svg(tmp_path, ("predicted", PLAIN), ("measured", longer)))
    assert {"1F1B against DualPipeV", "predicted: 15 s, idle 20.0%", "measured: 20 s, idle 20.0%", "seconds"} <= set(
        seen
    )
    assert seen.count("stage 0") == seen.count("stage 1") == 2
    assert "stage 2" not in seen


def test_micro_batches_are_numbered_where_they_fit(tmp_path: Path) -> None:
    few = texts(svg(tmp_path, ("few", PLAIN)))
    # Forward and backward on both stages; the axis of seconds shows no 3.
    assert few.count("3") == 4
    many = texts(svg(tmp_path, ("many", simulate(PipelineSchedule.one_f_one_b, 2, 300))))
    assert "299" not in many


def test_forward_backward_and_chunks_differ_in_colour(tmp_path: Path) -> None:
    assert len(fills(svg(tmp_path, ("plain", PLAIN)))) == 2
    dual = svg(tmp_path, ("dualpipev", simulate(PipelineSchedule.dualpipev, 2, 4)))
    assert len(fills(dual)) == 4
    assert {"forward, chunk 1", "forward, chunk 2", "backward, chunk 1", "backward, chunk 2", "idle"} <= set(
        texts(dual)
    )
    assert {"forward", "backward", "idle"} <= set(texts(svg(tmp_path, ("plain", PLAIN))))


def test_the_same_timeline_gives_the_same_file(tmp_path: Path) -> None:
    assert svg(tmp_path, ("plain", PLAIN)) == svg(tmp_path, ("plain", PLAIN))


def test_png(tmp_path: Path) -> None:
    path = tmp_path / "timeline.png"
    draw_timeline(path, [("plain", PLAIN)], "two stages")
    small = path.read_bytes()
    assert small.startswith(b"\x89PNG")
    draw_timeline(path, [("plain", PLAIN)] * 3, "two stages")
    height = slice(20, 24)
    assert int.from_bytes(path.read_bytes()[height]) > int.from_bytes(small[height])


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("a.pdf", [("plain", PLAIN)], "the suffix '.pdf' is neither .png nor .svg. Use a.svg"),
        ("a.svg", [], "timeline=a.svg: 0 timelines, a picture needs at least 1. Give one timeline"),
    ],
)
def test_refused(name: str, rows: list[tuple[str, Timeline]], message: str) -> None:
    with pytest.raises(DataError) as caught:
        draw_timeline(Path(name), rows, "nothing")
    assert "OCT492" in str(caught.value)
    assert message in str(caught.value)
