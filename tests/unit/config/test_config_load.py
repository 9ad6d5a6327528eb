from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from engine.config import Config, ModelConfig, Norm, OptimizerName, Switch
from engine.config.load import HelpRequested, conf_dir, config_hash, load, resolved_yaml, to_dict
from engine.config.options import options
from engine.errors import ConfigError
from tests.helpers.repo import ROOT

REPO = Path(__file__).resolve().parents[3]


def test_defaults_are_plain_dataclasses_with_every_value_set() -> None:
    cfg = load([])
    assert type(cfg) is Config
    assert type(cfg.model) is ModelConfig
    assert type(cfg.runtime.deepspeed_extra) is dict
    assert "???" not in json.dumps(to_dict(cfg))


def test_conf_dir_is_the_checkouts() -> None:
    assert conf_dir() == REPO / "conf"


def test_overrides_reach_the_dataclasses_with_their_types() -> None:
    cfg = load(["model.num_layers=3", "optim.lr=1", "+model.norm=rmsnorm", "kernels.compile=off", "run.name=12"])
    assert cfg.model.num_layers == 3
    assert (cfg.optim.lr, type(cfg.optim.lr)) == (1.0, float)
    assert cfg.model.norm is Norm.rmsnorm
    assert cfg.kernels.compile is Switch.off
    assert cfg.run.name == "12"


def test_group_choice_then_option_of_that_group() -> None:
    cfg = load(["optim=sgd", "optim.lr=0.5"])
    assert (cfg.optim.name, cfg.optim.lr) == (OptimizerName.sgd, 0.5)


def test_experiment_overrides_groups_and_the_command_line_overrides_the_experiment() -> None:
    cfg = load(["experiment=first_light"])
    assert (cfg.parallel.pp, cfg.parallel.tp, cfg.run.name) == (2, 2, "first_light")
    assert load(["experiment=first_light", "run.name=mine"]).run.name == "mine"


@pytest.mark.parametrize("word", ["experiment=null", "~experiment", "+debug=tiny_steps", "debug=tiny_steps"])
def test_optional_groups(word: str) -> None:
    assert isinstance(load([word]), Config)


@pytest.mark.parametrize(
    "words", [["--local_rank=3"], ["--local-rank=3"], ["--local_rank", "3"], ["--local-rank", "3"]]
)
def test_the_launchers_local_rank_is_dropped(words: list[str]) -> None:
    assert load([*words, "model.num_layers=3"]) == load(["model.num_layers=3"])


def test_keys_below_a_mapping_need_no_plus() -> None:
    cfg = load(["runtime.deepspeed_extra.wall_clock_breakdown=true", "+runtime.deepspeed_extra.timers.throughput=1"])
    assert cfg.runtime.deepspeed_extra == {"wall_clock_breakdown": True, "timers": {"throughput": 1}}


def test_resolved_yaml_read_back_is_the_same_config() -> None:
    cfg = load(["model.norm=rmsnorm", "kernels.compile=on", "run.name='1e3'", "runtime.deepspeed_extra.log_level=off"])
    text = resolved_yaml(cfg)
    assert "${" not in text
    merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text))
    assert OmegaConf.to_object(merged) == cfg


def test_hash_ignores_where_and_how_results_are_written() -> None:
    base = config_hash(load([]))
    assert base == config_hash(load(["run.name=other", "run.dir=elsewhere", "logging.every=7"]))
    assert len(base) == 16
    assert set(base) <= set("0123456789abcdef")


@pytest.mark.parametrize("word", ["model.num_layers=3", "train.seed=1", "parallel.tp=2", "optim.lr=0.9"])
def test_hash_depends_on_what_is_trained(word: str) -> None:
    assert config_hash(load([])) != config_hash(load([word]))


def test_hash_does_not_depend_on_how_a_value_is_spelt() -> None:
    assert config_hash(load(["optim.lr=1e-3"])) == config_hash(load(["optim.lr=0.001"]))


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_every_group_and_option(flag: str) -> None:
    with pytest.raises(HelpRequested) as caught:
        load([flag, "model.nonsense=1"])
    text = caught.value.text
    assert "python -m engine.train" in text
    for path in options():
        assert f"  {path} (" in text
    assert "first_light" in text
    assert "model.norm (one of layernorm, rmsnorm; default layernorm)" in text
    assert "model.num_layers (an integer; must be set)\n      Transformer blocks." in text


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--cfg=job"]])
def test_cfg_job_prints_the_resolved_config(flags: list[str]) -> None:
    with pytest.raises(HelpRequested) as caught:
        load([*flags, "model.num_layers=3"])
    assert caught.value.text == resolved_yaml(load(["model.num_layers=3"]))


def test_every_field_of_the_schema_is_an_option() -> None:
    sections = {field.name for field in dataclasses.fields(Config)}
    assert {path.split(".")[0] for path in options()} == sections


def test_loading_takes_less_than_a_second_and_no_torch() -> None:
    code = (
        "import time, sys\n"
        "from engine.config.load import load\n"
        "load(['experiment=first_light'])\n"
        "print(time.process_time(), sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    seconds, rest = done.stdout.split(maxsplit=1)
    assert float(seconds) < 1.0
    assert rest.strip() == "[]"


@pytest.mark.parametrize(
    "module", ["engine.config", "engine.config.rules", "engine.topology.grid", "engine.plan.costs"]
)
def test_the_light_modules_do_not_import_hydra(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'hydra', 'torch'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_options_of_every_module_are_explained() -> None:
    sources = sorted((ROOT / "engine" / "config").glob("schema*.py"))
    explained = {option.path.split(".")[0] for option in options().values() if option.doc}
    assert len(sources) == 8
    assert {"checkpoint", "data", "launch", "search", "train"} <= explained


def test_a_choice_may_be_a_file_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best, mine = tmp_path / "best.yaml", tmp_path / "gpt_tiny.yaml"
    best.write_text("# @package _global_\noptim:\n  lr: 0.123\n")
    mine.write_text("defaults: [gpt_tiny, _self_]\nnum_layers: 3\n")
    cfg = load([f"+experiment={best}", f"model={mine}", "optim.beta1=0.8"])
    assert (cfg.optim.lr, cfg.optim.beta1, cfg.model.num_layers) == (0.123, 0.8, 3)
    assert cfg.model.vocab_size == load(["model=gpt_tiny"]).model.vocab_size
    (tmp_path / "a b").mkdir()
    spaced = best.rename(tmp_path / "a b/best.yaml")
    assert load([f"experiment='{spaced}'"]).optim.lr == 0.123
    monkeypatch.chdir(tmp_path / "a b")
    assert load(["experiment=best.yaml"]).optim.lr == 0.123
    mine.write_text("defaults: [gpt_tiny]\nnum_layer: 3\n")
    with pytest.raises(ConfigError, match="section model has no option num_layer. Nearest: num_layers"):
        load([f"model={mine}"])
    with pytest.raises(ConfigError, match=r"\[OCT103\] experiment=nowhere.yaml: there is no file nowhere.yaml"):
        load(["experiment=nowhere.yaml"])
