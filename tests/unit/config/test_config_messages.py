"""Every refusal while composing a config: code, option, value, rule and way out are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import load as load_module
from engine.config.load import conf_dir, load
from engine.errors import ConfigError

FILES = {
    "train.yaml": "defaults: [config_schema, {model: tiny}, {data: d}, {optim: o}, {train: t}, {run: r}, "
    "_self_, {experiment: null}]\n",
    "model/tiny.yaml": "defaults: [model_schema, _self_]\nname: tiny\nnum_layers: 2\nhidden_size: 32\nnum_heads: 4\n"
    "vocab_size: 256\nmax_positions: 64\n",
    "data/d.yaml": "defaults: [data_schema, _self_]\nsource: python\nseq_len: 16\nvocab_size: 256\n",
    "optim/o.yaml": "defaults: [optim_schema, _self_]\nlr: 1e-3\n",
    "train/t.yaml": "defaults: [train_schema, _self_]\nsteps: 10\nmicro_batch: 2\n",
    "run/r.yaml": "defaults: [run_schema, _self_]\nname: x\n",
    "model/misspelt.yaml": "defaults: [model_schema, _self_]\nnum_layer: 2\n",
    "model/wrong_type.yaml": "defaults: [model_schema, _self_]\nnum_layers: abc\n",
    "model/syntax.yaml": "defaults: [model_schema, _self_]\nname: a\n num_layers: 2\n",
    "model/twice.yaml": "defaults: [model_schema, _self_]\nname: a\nname: b\n",
    "model/no_schema.yaml": "defaults: [modle_schema, _self_]\nname: a\n",
    "model/list.yaml": "- a\n- b\n",
    "model/unset.yaml": "defaults: [model_schema, _self_]\nname: a\n",
    "experiment/section.yaml": "# @package _global_\nmodle:\n  num_layers: 3\n",
    "experiment/choice.yaml": "# @package _global_\ndefaults: [{override /model: tinny}]\n",
    "experiment/off.yaml": "# @package _global_\nkernels:\n  compile: off\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("conf")
    for name, text in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


# word, code, option=value, words of the rule, words of the way out
ONE = [
    ("model.num_layer=3", 101, "model.num_layer=3", "section model has no option num_layer", "Nearest: num_layers"),
    ("+model.num_layer=3", 101, "model.num_layer=3", "section model has no option num_layer", "Nearest: num_layers"),
    ("~model.num_layer", 101, "model.num_layer=(delete)", "section model has no option", "Nearest: num_layers"),
    ("model.num_layers.x=3", 101, "model.num_layers.x=3", "section model has no option", "Nearest: num_layers"),
    ("modle.num_layers=3", 101, "modle.num_layers=3", "there is no section modle", "Use model.num_layers"),
    ("modle.foo=3", 101, "modle.foo=3", "there is no section modle", "Nearest: model"),
    ("modle=tiny", 101, "modle=tiny", "no section, group or option is called modle", "Nearest: model"),
    ("experimant=x", 101, "experimant=x", "no section, group or option is called", "Nearest: experiment"),
    ("lr=3", 101, "lr=3", "no section, group or option is called lr", "Use optim.lr"),
    ("train.lr=3", 101, "train.lr=3", "section train has no option lr", "Use optim.lr"),
    ("hydra.run.dir=x", 101, "hydra.run.dir=x", "there is no section hydra", "Known: checkpoint, data"),
    ("model=misspelt", 101, "model.num_layer=", "model/misspelt.yaml: section model has no", "Nearest: num_layers"),
    ("experiment=section", 101, "modle=", "experiment/section.yaml: there is no section modle", "Nearest: model"),
    ("model.num_layers=abc", 102, "model.num_layers=abc", "expected an integer, got 'abc' (text)", "Give an integer"),
    ("model.num_layers=", 102, "model.num_layers=", "expected an integer, got '' (text)", "Give an integer"),
    ("model.num_layers=null", 102, "model.num_layers=null", "expected an integer, got null", "Give an integer"),
    ("data.max_bytes=5e4", 102, "data.max_bytes=5", "got 50000.0 (number)", "Use data.max_bytes=50000"),
    ("parallel.dp=[1]", 102, "parallel.dp=[1]", "expected an integer or null, got [1] (list)", "an integer or null"),
    ("model.bias=maybe", 102, "model.bias=maybe", "expected true or false, got 'maybe'", "Give true or false"),
    ("optim.lr=fast", 102, "optim.lr=fast", "expected a number, got 'fast'", "Give a number"),
    ("model.norm=foo", 102, "model.norm=foo", "expected one of layernorm, rmsnorm", "Give one of layernorm, rmsnorm"),
    ("runtime.deepspeed_extra=3", 102, "runtime.deepspeed_extra=3", "expected a mapping, got 3", "Give a mapping"),
    ("optim.eps=${foo}", 102, "optim.eps=", "Interpolation key 'foo' not found", "Give a number"),
    ("model=wrong_type", 102, "model.num_layers=abc", "model/wrong_type.yaml: expected an integer", "Give an integer"),
    (
        "experiment=off",
        102,
        "kernels.compile=False",
        "experiment/off.yaml: expected one of auto, on, off",
        "need quotes",
    ),
    ("model=tinny", 103, "model=tinny", "there is no model/tinny.yaml", "Nearest: tiny, of list, "),
    ("+model=tinny", 103, "model=tinny", "there is no model/tinny.yaml", "Nearest: tiny"),
    ("model=null", 103, "model=null", "there is no model/null.yaml", "Known: list"),
    ("model=model_schema", 103, "model=model_schema", "there is no model/model_schema.yaml", "Nearest: no_schema"),
    ("model={a: 1}", 103, "model={'a': 1}", "no such choice", "tiny"),
    ("experiment=sectoin", 103, "experiment=sectoin", "there is no experiment/sectoin.yaml", "Nearest: section"),
    ("experiment=choice", 103, "model=tinny", "there is no model/tinny.yaml", "Nearest: tiny"),
    ("zero=z1", 103, "zero=z1", "there is no zero/z1.yaml", "Set options of zero one by one"),
    (
        "train.steps=???",
        104,
        "train.steps=(not set)",
        "a value is needed: Optimizer steps",
        "train.steps=VALUE, an int",
    ),
    ("model=???", 103, "model=???", "no such choice", "tiny"),
    ("a b", 105, "a b=(nothing)", "not an override, it has no '='", "Write section.option=value"),
    ("model.name={", 105, "model.name={", "cannot be read: no viable alternative", "quote a value"),
    ("=3", 105, "(nothing)=3", "the part before '=' is no option", "Write section.option=value"),
    ("model@data=tiny", 105, "model@data=tiny", "the part before '=' is no option", "Write section.option=value"),
    ("model.num_layers=1,2", 105, "model.num_layers=1,2", "several values for one run", "quote a value"),
    ("~model.norm", 105, "~model.norm=(nothing)", "an option cannot be removed", "Its default is layernorm"),
    ("~model", 105, "~model=(nothing)", "a section cannot be removed", "Choose with model=CHOICE"),
    ("--foo", 106, "--foo=(flag)", "no such flag", "Flags: --help, -h, --cfg job"),
    ("-m", 106, "-m=(flag)", "no such flag", "Flags: --help"),
    ("--cfg", 106, "--cfg=(flag)", "no such flag", "--cfg job"),
    ("--train.steps=3", 106, "--train.steps=3", "written without dashes", "Write train.steps=3"),
    ("model=syntax", 107, "model/syntax.yaml=", "not valid YAML at line 3, column 12: mapping values", "Mend the file"),
    ("model=twice", 107, "model/twice.yaml=", "line 3, column 1: found duplicate key name", "Mend the file"),
    ("model=no_schema", 107, "model/no_schema.yaml=", "there is no model/modle_schema", "defaults: [<section>_schema"),
    ("model=list", 109, "model/list.yaml=", "list is not a subclass of ModelConfig", "See --help"),
    ("~runtime.deepspeed_extra.x", 109, "(command line)=", "'runtime.deepspeed_extra.x' does not exist", "See --help"),
]


@pytest.mark.parametrize(("word", "code", "head", "rule", "way_out"), ONE, ids=[case[0] for case in ONE])
def test_one_refusal(folder: Path, word: str, code: int, head: str, rule: str, way_out: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([word], folder=folder)
    (violation,) = caught.value.violations
    assert violation.code == code
    assert str(violation).startswith(f"[OCT{code}] {head}")
    assert rule in violation.rule
    assert way_out in violation.way_out


def test_all_bad_overrides_are_reported_at_once(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(["model.num_layer=3", "model=tinny", "a b", "train.steps=5"], folder=folder)
    assert [violation.code for violation in caught.value.violations] == [101, 103, 105]


def test_all_bad_flags_are_reported_at_once(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(["--foo", "--bar=1"], folder=folder)
    assert [violation.option for violation in caught.value.violations] == ["--foo", "--bar"]


def test_all_missing_values_are_reported_with_their_meaning(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(["model=unset", "model.num_heads=4"], folder=folder)
    found = {violation.option: violation for violation in caught.value.violations}
    assert set(found) == {"model.num_layers", "model.hidden_size", "model.vocab_size", "model.max_positions"}
    assert found["model.num_layers"].rule == "a value is needed: Transformer blocks"
    assert found["model.num_layers"].way_out == "Add model.num_layers=VALUE, an integer"


def test_a_missing_section_names_its_choices(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("defaults: [config_schema, _self_]\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tiny.yaml").write_text(FILES["model/tiny.yaml"])
    with pytest.raises(ConfigError, match=r"OCT104.*model=\(not set\).*A transformer.*Add model=CHOICE, one of tiny"):
        load([], folder=tmp_path)


def test_an_unknown_root_file_names_those_there_are(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"OCT107.* trian.yaml=.*there is no trian .*Root files: train.yaml"):
        load([], config_name="trian", folder=folder)


def test_a_package_without_yaml_files_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "__file__", str(tmp_path / "engine" / "config" / "load.py"))
    with pytest.raises(ConfigError) as caught:
        conf_dir()
    assert "[OCT108] conf=(not found): no train.yaml in" in str(caught.value)
    assert str(tmp_path / "engine" / "conf") in str(caught.value)
    assert "pip install ." in str(caught.value)


def test_an_installed_package_uses_its_own_yaml_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (tmp_path / "conf", tmp_path / "engine" / "conf"):
        place.mkdir(parents=True)
        (place / "train.yaml").touch()
    monkeypatch.setattr(load_module, "__file__", str(tmp_path / "engine" / "config" / "load.py"))
    assert conf_dir() == tmp_path / "engine" / "conf"
