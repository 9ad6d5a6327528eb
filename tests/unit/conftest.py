"""Every unit test begins as a process nobody launched, and leaves no rank and no variable to the next one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from engine.observe import log


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(log, "_rank", None)
    environ, before = os.environ, dict(os.environ)
    yield
    for name in environ.keys() - before.keys():
        del environ[name]
    environ.update(before)
