from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.config.enums import WandbMode
from engine.observe import log
from engine.observe.sinks import Fanout, JsonlSink, WandbSink


@pytest.fixture(autouse=True)
def main_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_rank", 0)


def refuse_constant(text: str) -> None:
    raise AssertionError(f"{text} is not JSON")


def test_lines_are_valid_json_with_all_digits(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(1, {"loss": 0.1 + 0.2, "tokens": 2**60, "lr": 3e-300})
    sink.write(2, {"loss": math.nan, "grad_norm": math.inf, "low": -math.inf})
    sink.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=refuse_constant) for line in lines)
    assert first == {"step": 1, "loss": 0.1 + 0.2, "tokens": 2**60, "lr": 3e-300}
    assert second == {"step": 2, "loss": "nan", "grad_norm": "inf", "low": "-inf"}
    assert [float(second[name]) for name in ("grad_norm", "low")] == [math.inf, -math.inf]


def test_a_killed_run_keeps_its_lines(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(1, {"loss": 2.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.0}
    sink.close()


def test_scalars_of_other_libraries_are_written_as_numbers(tmp_path: Path) -> None:
    import torch

    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(1, {"loss": torch.tensor(1.5)})  # type: ignore[dict-item]
    sink.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 1.5


def test_an_existing_file_is_continued(tmp_path: Path) -> None:
    for step in (1, 2):
        sink = JsonlSink(tmp_path / "metrics.jsonl")
        sink.write(step, {})
        sink.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


class FakeWandb(SimpleNamespace):
    """Stands in for the wandb package; `fail` names the call that raises."""

    def __init__(self, fail: str = "", url: str | None = None) -> None:
        super().__init__(fail=fail, url=url, calls=[], Settings=dict)

    def _call(self, call: str, /, *args: Any, **kwargs: Any) -> FakeWandb:
        if self.fail == call:
            raise ConnectionError("no route to host")
        self.calls.append((call, args, kwargs))
        return self

    def init(self, **kwargs: Any) -> FakeWandb:
        return self._call("init", **kwargs)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._call("log", metrics, step=step)

    def finish(self) -> None:
        self._call("finish")


def run_wandb(folder: Path, mode: WandbMode = WandbMode.online) -> None:
    sink = WandbSink("octant", "tiny", folder, mode, {"seed": 1})
    sink.write(1, {"loss": 2.0})
    sink.write(2, {"loss": 1.0})
    sink.close()


def test_wandb_gets_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeWandb(url="https://example.org/run")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_wandb(tmp_path)
    names = [name for name, _, _ in fake.calls]
    start = fake.calls[0][2]
    assert names == ["init", "log", "log", "finish"]
    assert (start["project"], start["name"], start["dir"]) == ("octant", "tiny", str(tmp_path))
    assert (start["mode"], start["config"]) == ("online", {"seed": 1})
    assert fake.calls[2][1:] == (({"loss": 1.0},), {"step": 2})
    assert capsys.readouterr() == ("W&B run: https://example.org/run\n", "")


def test_without_the_package_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run_wandb(tmp_path, WandbMode.offline)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: logging.wandb=offline: W&B could not start (")
    assert "Training goes on" in warning
    assert "logging.wandb=disabled" in warning


@pytest.mark.parametrize(
    ("fail", "what"), [("init", "could not start"), ("log", "stopped"), ("finish", "could not finish")]
)
def test_trouble_is_warned_about_once(
    fail: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fail=fail))
    run_wandb(tmp_path)
    warning = capsys.readouterr().err
    assert warning.count("warning:") == 1
    assert f"logging.wandb=online: W&B {what} (no route to host)" in warning


def test_disabled_does_not_even_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_wandb(tmp_path, WandbMode.disabled)
    assert fake.calls == []


class ListSink:
    def __init__(self, fails: bool = False) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.closed = False
        self.fails = fails

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.append((step, dict(metrics)))

    def close(self) -> None:
        self.closed = True
        if self.fails:
            raise OSError("disk full")


def test_fanout_writes_to_all_and_closes_all_even_if_one_fails() -> None:
    sinks = [ListSink(), ListSink(fails=True), ListSink()]
    fanout = Fanout(sinks)
    fanout.write(4, {"loss": 1.0})
    with pytest.raises(OSError, match="disk full"):
        fanout.close()
    assert [sink.rows for sink in sinks] == [[(4, {"loss": 1.0})]] * 3
    assert all(sink.closed for sink in sinks)
