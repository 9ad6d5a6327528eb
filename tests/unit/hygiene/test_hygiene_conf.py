"""Every file under conf/ says how it is used and is checked against its schema."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.helpers.repo import ROOT

CONF = ROOT / "conf"
GROUP_FILES = sorted(CONF.glob("*/*.yaml"))
GLOBAL_GROUPS = {"experiment", "debug"}


def first_comment(text: str) -> str:
    """The first comment line that is not one of Hydra's `# @` headers; empty when something else comes first."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("# @")]
    return lines[0].removeprefix("#").strip() if lines and lines[0].startswith("#") else ""


def _id(path: Path) -> str:
    return path.relative_to(CONF).as_posix()


def test_there_are_files() -> None:
    assert len(GROUP_FILES) > 40
    assert [path for path in CONF.rglob("*") if path.is_file() and path.suffix != ".yaml"] == []


def test_first_comment_skips_only_headers() -> None:
    assert first_comment("# @package _global_\n# python -m x\na: 1") == "python -m x"
    assert first_comment("a: 1\n# python -m x") == ""


@pytest.mark.parametrize("path", [*sorted(CONF.glob("*.yaml")), *GROUP_FILES], ids=_id)
def test_first_comment_is_the_command_that_uses_the_file(path: Path) -> None:
    command = first_comment(path.read_text())
    assert re.match(r"python (-m engine\.\w+|launch/submit\.py) ", command)
    if path.parent != CONF:
        assert f"{path.parent.name}={path.stem}" in command.split()


@pytest.mark.parametrize("path", GROUP_FILES, ids=_id)
def test_misspelt_keys_would_be_refused(path: Path) -> None:
    """A group file names its schema first; a global file stays inside groups that have one."""
    text = path.read_text()
    values = yaml.safe_load(text)
    if path.parent.name in GLOBAL_GROUPS:
        assert text.startswith("# @package _global_\n")
        assert set(values) - {"defaults"} <= {folder.name for folder in CONF.iterdir()}
    else:
        assert values["defaults"] == [f"{path.parent.name}_schema", "_self_"]
