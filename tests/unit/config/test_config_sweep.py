"""The words of a search: values of options, what all runs share, and the experiment that a run is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engine.config.load import conf_dir, config_hash, load
from engine.config.sweep import Axis, differences, quoted, read
from engine.errors import ConfigError


def choices(*words: str) -> dict[str, tuple[str, ...]]:
    return {axis.option: axis.choices for axis in read(words).axes}


def test_lists_ranges_and_globs_of_hydras_grammar() -> None:
    found = choices("optim.lr=1e-4,3e-4", "model.num_layers=range(1,4)", "parallel=glob(*p2)", "zero=choice(z0,z1)")
    assert found == {
        "optim.lr": ("0.0001", "0.0003"),
        "model.num_layers": ("1", "2", "3"),
        "parallel": ("pp2", "tp2"),
        "zero": ("z0", "z1"),
    }


def test_ranges_know_their_scale_and_their_options_type() -> None:
    lr, decay, layers = read(
        ["optim.lr=log(1e-5,1e-2)", "optim.weight_decay=interval(0,1)", "model.num_layers=interval(1,3)"]
    ).axes
    assert lr == read(["optim.lr=tag(log,interval(1e-5,1e-2))"]).axes[0]
    assert (lr.low, lr.high, lr.log, lr.integer) == (1e-5, 1e-2, True, False)
    assert (decay.low, decay.high, decay.log, decay.integer) == (0.0, 1.0, False, False)
    assert layers.integer


def test_the_first_run_is_composed_and_what_runs_share_is_kept() -> None:
    found = read(["optim=sgd", "optim.lr=1e-4,3e-4", "search.jobs=2", "run.name=a", "launch.nodes=2", "train.steps=7"])
    assert found.words == ("optim=sgd", "train.steps=7")
    assert (found.cfg.optim.lr, found.cfg.search.jobs, found.cfg.run.name) == (1e-4, 2, "a")


def test_the_space_gives_values_that_the_command_line_may_replace() -> None:
    space = "search.space={optim.lr:'log(1e-4,1e-2)',optim.beta2:'0.9,0.95'}"
    assert choices(space, "optim.lr=1,2") == {"optim.lr": ("1", "2"), "optim.beta2": ("0.9", "0.95")}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("run.name=a,b", "[OCT571] run.name=a,b: a search sets it for each of its runs. Give run.name one value"),
        ("search.jobs=1,2", "[OCT571] search.jobs=1,2: all runs of a search share it. Give search.jobs one value"),
        (
            "search.space={optim.lr:'1'}",
            "[OCT581] search.space.optim.lr=1: these are not several values. Write log(1e-5,1e-2), interval(0,0.2)",
        ),
        ("parallel=glob(z*)", "[OCT581] parallel=glob(z*): no choice has such a name. Known: context2, dp"),
        ("optim.lr=log(0,1)", "[OCT582] optim.lr=log(0,1): a logarithmic range begins above 0 and rises. "),
        ("optim.lr=interval(3,1)", "[OCT582] optim.lr=interval(3,1): a range rises. Use optim.lr=interval(1,3)"),
        ("optim.lx=1,2", "[OCT101] optim.lx=1: section optim has no option lx"),
        ("optim.lr=choice(1", "[OCT105] optim.lr=choice(1: cannot be read"),
    ],
)
def test_what_cannot_be_searched_is_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read([word])
    assert message in str(caught.value)


def test_a_float_becomes_an_override_that_reads_back_exactly() -> None:
    value = 1.2345678901234567e-05
    assert load([Axis(option="optim.lr").word(value)]).optim.lr == value


@pytest.mark.parametrize("folder", ["a b", "it's,here", "x=[1]{2}", "back\\slash"])
def test_a_folder_of_any_name_can_be_an_override(folder: str) -> None:
    assert load([quoted("run.dir", folder)]).run.dir == folder


def test_differences_are_an_experiment_of_the_same_run(tmp_path: Path) -> None:
    words = ["experiment=gpt_tiny_lm", "parallel=tp2", "optim=sgd", "optim.lr=0.5", "kernels.compile=off"]
    shutil.copytree(conf_dir(), tmp_path / "conf")
    (tmp_path / "conf/experiment/best.yaml").write_text(f"# @package _global_\n{differences(words)}")
    again = load(["experiment=best"], folder=tmp_path / "conf")
    assert config_hash(again) == config_hash(load(words))
    assert config_hash(again) != config_hash(load([]))
