from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.load import load
from engine.config.schema import Config
from engine.errors import ConfigError
from engine.runtime import extensions


def config(*words: str) -> Config:
    return load(["run.name=t", "optim=adamw", "zero=z3", *words])


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without compilers and with an empty folder of extensions."""
    monkeypatch.setenv(extensions.VARIABLE, str(tmp_path))
    monkeypatch.setattr(extensions.shutil, "which", lambda name, path=None: None)
    return tmp_path


def test_host_adamw_without_compiler_or_build_is_refused(bare: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        extensions.require(config("zero.offload_optimizer=cpu"))
    said = str(caught.value)
    assert "[OCT701] zero.offload_optimizer=cpu: adamw steps in host memory" in said
    assert f"not built in {bare}, and c++ to build it is not here" in said
    assert "Install g++ and ninja and run 'make setup', or use zero.offload_optimizer=none or optim=sgd" in said


def test_a_build_needs_no_compiler(bare: Path) -> None:
    (bare / "cpu_adam").mkdir()
    (bare / "cpu_adam" / "cpu_adam.so").touch()
    extensions.require(config("zero.offload_optimizer=cpu"))


@pytest.mark.parametrize("words", [("optim=sgd", "zero.offload_optimizer=cpu"), ("zero.offload_params=cpu",), ()])
def test_what_needs_no_extension_runs_anywhere(bare: Path, words: tuple[str, ...]) -> None:
    extensions.require(config(*words))


def test_a_strategy_for_gpus_is_refused_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        extensions.require(config("optim=sgd", "zero.offload_strategy=superoffload"))
    said = str(caught.value)
    assert "[OCT349] zero.offload_strategy=superoffload: it overlaps the host's step with a GPU's work" in said
    assert "use zero.offload_strategy=plain" in said


def test_nvme_without_libaio_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        extensions.require(config("zero.offload_params=nvme", "zero.nvme_path=/disk"))
    said = str(caught.value)
    assert "[OCT702] zero.offload_params=nvme: DeepSpeed reads and writes NVMe with its async_io extension" in said
    assert "Install libaio-dev (libaio-devel on RPM systems), or use zero.offload_params=cpu" in said


def test_both_refusals_come_at_once(bare: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        extensions.require(config("zero.offload_optimizer=nvme", "zero.nvme_path=/disk"))
    assert [violation.code for violation in caught.value.violations] == [701, 702]


def test_the_users_folder_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(extensions.VARIABLE, "/elsewhere")
    extensions.export()
    assert extensions.os.environ[extensions.VARIABLE] == "/elsewhere"


def test_the_environments_own_ninja_comes_before_the_systems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two versions build for each other what the other one has just built."""
    system, own = tmp_path / "usr", tmp_path / "venv"
    for folder in (system, own):
        folder.mkdir()
        (folder / "ninja").touch(0o755)
    monkeypatch.setattr(extensions.sysconfig, "get_path", lambda name: str(own))
    monkeypatch.setenv(extensions.VARIABLE, "/elsewhere")
    monkeypatch.setenv("PATH", str(system))
    for _ in range(2):
        extensions.export()
        assert extensions.os.environ["PATH"] == f"{own}:{system}"
