"""Words with three meanings, paths of one machine and package hosts stay out of the repository."""

from __future__ import annotations

import ast
import re

import pytest

from tests.helpers.repo import ROOT, files, name, python_files

# CONTRIBUTING.md has to name what it bans.
MAY_NAME_BANNED_WORDS = {"CONTRIBUTING.md"}
PHRASE = re.compile(r"model[ _-]parallel", re.IGNORECASE)
# What DeepSpeed looks for, by name, on grids and parameters. Only its bridge, and the tests of it, may spell these.
DEEPSPEED_NAMES = {
    "get_model_parallel_group",
    "get_model_parallel_rank",
    "get_model_parallel_world_size",
    "get_pipeline_model_parallel_group",
    "get_pipeline_model_parallel_rank",
    "get_pipeline_model_parallel_world_size",
    "get_tensor_model_parallel_group",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "is_model_parallel_parameter",
    "model_parallel",
    "model_parallel_size",
    "num_mp",
    "tensor_model_parallel",
}
DEEPSPEED_PLACES = re.compile(r"engine/runtime/|tests/(unit|ranks|gpu)/runtime/")
TEXT = (".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".sbatch", ".txt", ".cfg")

# Each pattern is written so that it does not match itself. /home/someone is the path of nobody.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|Users|root|work)/(?!someone\b)[\w.]|[A-Z]:\\Users")
INDEX_HOST = re.compile(r"-index[-]url|--find[-]links|pypi\.org|pythonhosted\.|download\.pytorch\.")


def names_in_code(source: str) -> set[str]:
    """Every name that code defines, binds, imports or reads: variables, attributes, arguments, functions, classes."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        for field in ("id", "attr", "arg", "name", "asname"):
            if isinstance(value := getattr(node, field, None), str):
                found.update(value.split("."))
    return found


def banned_names(source: str) -> set[str]:
    """Names of which one word is the short form of the banned phrase."""
    return {n for n in names_in_code(source) if "mp" in n.lower().split("_")}


def without_deepspeed_names(text: str) -> str:
    """`text` less DeepSpeed's own identifiers."""
    return re.sub(r"\w+", lambda word: "" if word[0] in DEEPSPEED_NAMES else word[0], text)


def matches(pattern: re.Pattern[str], text: str) -> list[str]:
    """Lines of `text` in which `pattern` occurs."""
    return [line.strip() for line in text.splitlines() if pattern.search(line)]


def _texts(*suffixes: str) -> dict[str, str]:
    return {name(path): path.read_text(encoding="utf-8", errors="replace") for path in files(*suffixes)}


def test_banned_phrase_is_absent() -> None:
    found = {}
    for path, text in _texts(*TEXT).items():
        if path in MAY_NAME_BANNED_WORDS or path == name(ROOT / "tests/unit/hygiene/test_hygiene_words.py"):
            continue
        text = without_deepspeed_names(text) if DEEPSPEED_PLACES.match(path) else text
        if lines := matches(PHRASE, text):
            found[path] = lines
    assert found == {}


def test_banned_short_name_is_absent() -> None:
    found = {}
    for path in python_files():
        allowed = DEEPSPEED_NAMES if DEEPSPEED_PLACES.match(name(path)) else set()
        if names := banned_names(path.read_text(encoding="utf-8")) - allowed:
            found[name(path)] = names
    assert found == {}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import multiprocessing as mp", {"mp"}),
        ("def f(mp_size): return mp_size", {"mp_size"}),
        ("self.mp.rank = 3", {"mp"}),
        ("tmp = amp.mpu; example = 'mp'", set()),
    ],
)
def test_banned_names_are_seen(source: str, names: set[str]) -> None:
    assert banned_names(source) == names


def test_deepspeed_names_are_let_through_whole_only() -> None:
    assert not PHRASE.search(without_deepspeed_names("grid.get_model_parallel_rank()"))
    assert PHRASE.search(without_deepspeed_names("get_model_parallel_rank_of(x)"))


def test_no_paths_of_one_machine() -> None:
    found = {
        path: matches(MACHINE_PATH, text) + ([str(ROOT)] if str(ROOT) in text else [])
        for path, text in _texts().items()
    }
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_an_invented_home_is_no_path_of_a_machine() -> None:
    assert matches(MACHINE_PATH, "HOME=/home/someone") == []


def test_no_package_hosts() -> None:
    found = {path: matches(INDEX_HOST, text) for path, text in _texts().items()}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (MACHINE_PATH, "cd " + "/home" + "/alice/octant"),
        (MACHINE_PATH, "path: " + "/root" + "/x"),
        (INDEX_HOST, "pip install --extra" + "-index" + "-url x"),
        (INDEX_HOST, "https://" + "pypi" + ".org/simple"),
    ],
)
def test_patterns_can_match(pattern: re.Pattern[str], text: str) -> None:
    assert matches(pattern, text) == [text]
