from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

import pytest
from tqdm import tqdm

from engine.observe import log


@pytest.fixture(autouse=True)
def fresh_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in log.RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    loggers = [logging.getLogger(entry.name) for entry in log.QUIET_LOGGERS]
    before = [(logger, logger.level, list(logger.filters), list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, filters, handlers in before:
        logger.setLevel(level)
        logger.filters[:] = filters
        logger.handlers[:] = handlers


def test_rank_0_says_one_line_on_stdout_and_warns_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(0)
    log.say("hello")
    log.warn("careful")
    assert capsys.readouterr() == ("hello\n", "warning: careful\n")


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(3)
    log.say("hello")
    log.warn("careful")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("variable", log.RANK_VARIABLES)
def test_before_configure_the_launcher_decides(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log.say("alone")
    monkeypatch.setenv(variable, "1")
    log.say("hidden")
    monkeypatch.setenv(variable, "0")
    log.say("first")
    assert capsys.readouterr().out == "alone\nfirst\n"


def test_configure_wins_over_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    log.configure(0)
    log.say("shown")
    assert capsys.readouterr().out == "shown\n"


def test_a_line_does_not_tear_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    log.configure(0)
    with tqdm(total=3, file=screen, ncols=40):
        log.say("between")
    # The bar is wiped before the line and drawn again after it.
    assert "\rbetween\n\r" in screen.getvalue()


def test_quiet_survives_a_library_that_sets_its_level_on_import(capsys: pytest.CaptureFixture[str]) -> None:
    log.quiet_libraries(verbose=False)
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addHandler(logging.StreamHandler(sys.stdout))
    logger.warning("guessing the hardware")
    logger.error("it broke")
    assert capsys.readouterr().out == "it broke\n"


def test_quiet_twice_filters_once() -> None:
    log.quiet_libraries(verbose=False)
    filters = list(logging.getLogger("DeepSpeed").filters)
    log.quiet_libraries(verbose=False)
    assert logging.getLogger("DeepSpeed").filters == filters


def test_verbose_changes_nothing() -> None:
    levels = [logging.getLogger(entry.name).level for entry in log.QUIET_LOGGERS]
    filters = list(warnings.filters)
    log.quiet_libraries(verbose=True)
    assert [logging.getLogger(entry.name).level for entry in log.QUIET_LOGGERS] == levels
    assert list(warnings.filters) == filters


def test_only_the_listed_warnings_are_hidden() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        log.quiet_libraries(verbose=False)
        warnings.warn("The pynvml package is deprecated. Use nvidia-ml-py", FutureWarning, stacklevel=1)
        warnings.warn("`torch.jit.script` is deprecated", DeprecationWarning, stacklevel=1)
        warnings.warn("your gradients are wrong", FutureWarning, stacklevel=1)
    assert [str(entry.message) for entry in seen] == ["your gradients are wrong"]


def test_a_setting_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")
    log.quiet_libraries(verbose=False)
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "debug"


def test_every_silence_has_a_reason() -> None:
    reasons = [entry.reason for entry in (*log.QUIET_LOGGERS, *log.QUIET_WARNINGS)]
    reasons += [reason for _, _, reason in log.QUIET_VARIABLES]
    assert all(len(reason.split()) >= 4 for reason in reasons)


def test_output_of_a_library_call_is_swallowed(capsys: pytest.CaptureFixture[str]) -> None:
    with log.captured_output(keep=False):
        print("built successfully")
        print("odd", file=sys.stderr)
    print("after")
    assert capsys.readouterr() == ("after\n", "")


def test_output_of_a_failed_call_is_shown_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        print("first")
        print("second", file=sys.stderr)
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), log.captured_output(keep=False):
        fail()
    out, err = capsys.readouterr()
    assert out == ""
    assert "output of the call that failed" in err
    assert "first\nsecond\n" in err


def test_a_silent_failure_adds_no_heading(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), log.captured_output(keep=False):
        raise RuntimeError
    assert capsys.readouterr() == ("", "")


def test_keep_lets_output_through(capsys: pytest.CaptureFixture[str]) -> None:
    with log.captured_output(keep=True):
        print("visible")
    assert capsys.readouterr().out == "visible\n"


def test_a_handler_made_inside_still_works_outside(capsys: pytest.CaptureFixture[str]) -> None:
    with log.captured_output(keep=False):
        handler = logging.StreamHandler(sys.stdout)
        handler.emit(logging.makeLogRecord({"msg": "inside"}))
    handler.emit(logging.makeLogRecord({"msg": "outside"}))
    assert capsys.readouterr().out == "outside\n"
