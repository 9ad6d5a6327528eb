"""Every file under conf/ composes with the schema and gives a config that can run."""

from __future__ import annotations

import shlex
from functools import cache
from itertools import cycle, islice

import pytest

from engine.config import rules
from engine.config.layout import legal_tp
from engine.config.load import load
from engine.config.schema import Config, ModelConfig
from engine.errors import ConfigError
from engine.plan.costs import total_parameters
from tests.helpers.repo import ROOT

CONF = ROOT / "conf"
GLOBAL_GROUPS = ("experiment", "debug")
TINY = ["bert_tiny", "gpt_tiny", "llama_tiny"]
CHOICES = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in sorted(CONF.iterdir())
    if folder.is_dir()
}


def rows() -> list[tuple[str, ...]]:
    """Overrides that between them take every choice of every group that is not global.

    Composing takes a third of a second, so one row takes a choice from each group. Layouts that cut the model go with
    the tiny models and the ZeRO stages that pipelines allow, offload with the optimizers that a host can run, the
    others with every model. Number formats other than fp32 do not go with z0 (OCT314). Some samples are of one family.
    """
    of_family = {"completion": "gpt_tiny", "rows": "bert_tiny"}
    cut = [name for name in CHOICES["parallel"] if name not in ("single", "dp")]
    offload = [name for name in CHOICES["zero"] if "_" in name]
    whole = {group: names for group, names in CHOICES.items() if group not in GLOBAL_GROUPS}
    whole["data"] = [name for name in CHOICES["data"] if name not in of_family]
    return [
        *_zipped({"data": list(of_family), "model": list(of_family.values())}),
        *_zipped({**whole, "parallel": ["single", "dp"], "zero": ["z1", "z2", "z3"]}),
        *_zipped({"model": TINY, "zero": ["z0", "z1", "z2"], "parallel": cut}),
        *_zipped({"model": ["gpt_tiny"], "zero": offload, "optim": ["adamw", "lion", "sgd"]}),
    ]


def _zipped(groups: dict[str, list[str]]) -> list[tuple[str, ...]]:
    """As many rows as the longest group has choices; shorter groups start over."""
    count = max(map(len, groups.values()))
    columns = [islice(cycle([f"{group}={name}" for name in names]), count) for group, names in groups.items()]
    return list(zip(*columns, strict=True))


@cache
def config(*overrides: str) -> Config:
    """Composed with what the files' own commands set besides, such as data.source=FOLDER."""
    files = [CONF / f"{override.replace('=', '/')}.yaml" for override in overrides]
    commands = [shlex.split(path.read_text().splitlines()[0]) for path in files if path.is_file()]
    return load([*overrides, *(word for words in commands for word in words[4:] if "." in word.partition("=")[0])])


def world_size(cfg: Config) -> int:
    """The smallest world of the layout, with two replicas where the launcher decides their number."""
    return cfg.parallel.pp * cfg.parallel.context * cfg.parallel.tp * (cfg.parallel.dp or 2)


def can_run(cfg: Config) -> None:
    assert rules.check(cfg, world_size(cfg)) == []


def test_defaults_can_run() -> None:
    can_run(config())
    assert config().run.name == config().model.name


def test_rows_take_every_choice() -> None:
    taken = {choice for row in rows() for choice in row}
    wanted = {f"{group}={name}" for group, names in CHOICES.items() if group not in GLOBAL_GROUPS for name in names}
    assert taken == wanted


@pytest.mark.parametrize("row", rows(), ids="-".join)
def test_every_choice_composes_and_can_run(row: tuple[str, ...]) -> None:
    cfg = config(*row)
    can_run(cfg)
    assert f"model={cfg.model.name}" in row
    assert cfg.data.seq_len == cfg.model.max_positions
    assert cfg.data.vocab_size == cfg.model.vocab_size
    assert cfg.model.dropout == cfg.model.attention_dropout == 0.0


@pytest.mark.parametrize("experiment", CHOICES["experiment"])
def test_every_experiment_can_run(experiment: str) -> None:
    cfg = config(f"experiment={experiment}")
    can_run(cfg)
    assert cfg.run.name == experiment


@pytest.mark.parametrize("debug", CHOICES["debug"])
@pytest.mark.parametrize("experiment", ["null", "first_light"])
def test_every_debug_setting_can_run_alone_and_on_an_experiment(debug: str, experiment: str) -> None:
    cfg = config(f"experiment={experiment}", f"debug={debug}")
    can_run(cfg)
    assert cfg.train.eval_batches == 0, "a debug setting wins over the experiment"


def test_first_light_is_parallel_in_all_three_axes() -> None:
    cfg = config("experiment=first_light")
    assert (cfg.parallel.pp, cfg.parallel.tp, cfg.parallel.dp) == (2, 2, 2)
    assert cfg.train.device.name == "cpu"


def test_command_line_wins_over_an_experiment() -> None:
    cfg = config("experiment=first_light", "zero=z0", "train.steps=20", "optim.warmup_steps=1")
    assert (cfg.zero.stage, cfg.train.steps, cfg.optim.warmup_steps) == (0, 20, 1)


def test_text_does_not_fall_back_to_the_default_corpus() -> None:
    with pytest.raises(ConfigError, match=r"^1\. \[OCT104\] data\.source=\(not set\): .*Add data\.source=VALUE"):
        load(["data=text"])


def test_an_nvme_disk_is_never_guessed() -> None:
    (violation,) = rules.check(load(["zero=z3_infinity"]), 1)
    assert (violation.code, violation.option) == (342, "zero.nvme_path")


def test_profile_choices_are_not_read_as_booleans() -> None:
    assert config("profile=on").profile.steps > 0
    assert config("profile=off").profile.steps == 0


def model(name: str) -> ModelConfig:
    """The preset, from a row that is composed anyway."""
    return config(*next(row for row in rows() if f"model={name}" in row)).model


# Counted from the published weights, tied weights once.
PUBLISHED = {
    "bert_base": 110_106_428,
    "bert_large": 336_226_108,
    "gpt2_124m": 124_439_808,
    "gpt2_355m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1_5b": 1_557_611_200,
    "llama_160m": 162_417_408,
    "llama_1b": 1_235_814_400,
    "llama_8b": 8_030_261_248,
    "pythia_160m": 162_322_944,
    "qwen2_0_5b": 494_032_768,
}
# Named by size, after GPT-3.
NAMED = {"gpt_1_3b": 1.3e9, "gpt_2_7b": 2.7e9, "gpt_6_7b": 6.7e9, "gpt_13b": 13e9}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_presets_of_published_models_have_their_parameters(name: str, parameters: int) -> None:
    assert total_parameters(model(name)) == parameters


@pytest.mark.parametrize(("name", "parameters"), NAMED.items())
def test_presets_named_by_size_have_it(name: str, parameters: float) -> None:
    assert total_parameters(model(name)) == pytest.approx(parameters, rel=0.03)


def test_every_large_preset_has_its_size_checked() -> None:
    assert {*PUBLISHED, *NAMED, *TINY} == set(CHOICES["model"])


@pytest.mark.parametrize("name", TINY)
def test_tiny_presets_can_be_cut_in_four_both_ways(name: str) -> None:
    assert 4 in legal_tp(model(name))
    assert model(name).num_layers == 4
