"""Files and functions stay short enough to be read in one sitting."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.helpers.repo import name, python_files

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
# Path -> why it may be longer.
LONG_FILES: dict[str, str] = {}
# "path::function" -> why it may be longer.
LONG_FUNCTIONS: dict[str, str] = {}


def function_lengths(source: str) -> dict[str, int]:
    """Lines of each function and method, decorators not counted. The longest of those that share a name."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            found[node.name] = max(found.get(node.name, 0), node.end_lineno - node.lineno + 1)
    return found


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_function_lengths_count_whole_bodies() -> None:
    assert function_lengths("@x\ndef f():\n    a = 1\n\n    return a\n\ndef g(): ...\n") == {"f": 4, "g": 1}


def test_files_are_short() -> None:
    lengths = {name(path): len(_text(path).splitlines()) for path in python_files()}
    assert {n: lines for n, lines in lengths.items() if lines > MAX_FILE_LINES and n not in LONG_FILES} == {}


def test_functions_are_short() -> None:
    lengths = {f"{name(p)}::{f}": lines for p in python_files() for f, lines in function_lengths(_text(p)).items()}
    assert {n: lines for n, lines in lengths.items() if lines > MAX_FUNCTION_LINES and n not in LONG_FUNCTIONS} == {}


def test_exceptions_are_still_needed() -> None:
    """An entry goes when its file or function is short again."""
    for path in python_files():
        assert name(path) not in LONG_FILES or len(_text(path).splitlines()) > MAX_FILE_LINES
        for function, lines in function_lengths(_text(path)).items():
            assert f"{name(path)}::{function}" not in LONG_FUNCTIONS or lines > MAX_FUNCTION_LINES
    assert all(LONG_FILES.values())
    assert all(LONG_FUNCTIONS.values())
