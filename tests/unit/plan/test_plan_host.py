from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.enums import Device, DType, Offload, OffloadStrategy, Recompute
from engine.errors import ConfigError
from engine.plan.costs import total_parameters
from engine.plan.host import available_bytes, host_bytes, input_bytes, require, snapshot_bytes
from engine.plan.memory import memory
from tests.helpers.configs import make

OFFLOAD = {
    "zero__offload_optimizer": Offload.cpu,
    "zero__offload_strategy": OffloadStrategy.plain,
    "precision__dtype": DType.bf16,
}


def test_each_host_keeps_what_its_ranks_keep() -> None:
    cfg = make(**OFFLOAD)
    count = total_parameters(cfg.model)
    assert sum(host_bytes(cfg, 8, 4)) == 18 * count
    assert host_bytes(cfg, 8, 4) == [9 * count, 9 * count]
    piped = make(**OFFLOAD, parallel__pp=2)
    stages = [memory(piped, 4, stage).host for stage in range(2)]
    assert host_bytes(piped, 4, 2) == [2 * stages[0], 2 * stages[1]]
    assert host_bytes(piped, 4, 4) == [2 * sum(stages)]


def test_what_does_not_fit_is_refused_with_the_number_of_hosts() -> None:
    cfg = make(**OFFLOAD, model__hidden_size=4800)
    needed = 18 * total_parameters(cfg.model) / 2**30
    with pytest.raises(ConfigError) as caught:
        require(cfg, 8, 4, available=int(needed / 5 * 2**30) + 1000)
    (violation,) = caught.value.violations
    assert str(violation) == (
        f"[OCT345] zero.offload_optimizer=cpu: 4 ranks of this host would keep {needed / 2:.1f} GiB in its memory, and "
        f"{needed / 5:.1f} GiB are free. Use zero.offload_optimizer=none, or spread the replicas over at least 5 such "
        "hosts"
    )


def test_streamed_state_of_a_gpu_is_measured_where_its_share_is_known() -> None:
    streamed = {**OFFLOAD, "zero__offload_strategy": OffloadStrategy.auto, "model__hidden_size": 4800}
    require(make(**streamed, train__device=Device.auto), 8, 4, available=0)
    for known in ({"train__device": Device.cpu}, {"zero__offload_ratio": 1.0}):
        cfg = make(**streamed, **known)
        assert sum(host_bytes(cfg, 8, 4)) == 12 * total_parameters(cfg.model)
        with pytest.raises(ConfigError, match="OCT345"):
            require(cfg, 8, 4, available=0)


def test_parameters_on_the_host_are_named_and_nvme_is_offered() -> None:
    cfg = make(zero__stage=3, zero__offload_params=Offload.cpu)
    with pytest.raises(ConfigError) as caught:
        require(cfg, 1, 1, available=0)
    (violation,) = caught.value.violations
    assert str(violation).startswith("[OCT345] zero.offload_params=cpu: 1 ranks of this host")
    assert "Use zero.offload_params=none, zero.offload_params=nvme, or" in violation.way_out


def test_checkpoints_that_do_not_fit_are_refused() -> None:
    cfg = make(checkpoint__every=10, train__steps=10)
    copies = snapshot_bytes(cfg, 8, 4)
    assert copies == [48 * total_parameters(cfg.model) // 8] * 2
    require(cfg, 8, 4, available=copies[0])
    with pytest.raises(ConfigError) as caught:
        require(cfg, 8, 4, available=copies[0] - 1)
    (violation,) = caught.value.violations
    assert str(violation).startswith("[OCT383] checkpoint.every=10: checkpoints of 4 ranks of this host need 0.0 GiB")
    assert violation.way_out == "Use checkpoint.every=0, or spread the replicas over at least 3 such hosts"
    require(make(checkpoint__every=11, train__steps=10), 8, 4, available=0)


def test_inputs_of_groups_that_do_not_fit_are_refused() -> None:
    cfg = make(**OFFLOAD, train__recompute=Recompute.full, train__recompute_offload=True, model__max_positions=2**22)
    cfg.data.seq_len = 2**22
    inputs, offloaded = input_bytes(cfg, 2, 2), host_bytes(cfg, 2, 2)
    # Four blocks, two sequences, 48 wide in bf16, on both ranks.
    assert inputs == [2 * 4 * 2 * 2**22 * 48 * 2]
    require(cfg, 2, 2, available=inputs[0] + offloaded[0])
    with pytest.raises(ConfigError) as caught:
        require(cfg, 2, 2, available=inputs[0] + offloaded[0] - 1)
    (violation,) = caught.value.violations
    free = (inputs[0] + offloaded[0]) / 2**30
    assert str(violation) == (
        f"[OCT396] train.recompute_offload=true: inputs of recomputed groups of 2 ranks of this host need "
        f"{inputs[0] / 2**30:.1f} GiB in its memory beside {offloaded[0] / 2**30:.1f} GiB of offloaded state, and "
        f"{free:.1f} GiB are free. Use train.recompute_interval=2, which keeps half of them, "
        "train.recompute_offload=false, or spread the replicas over at least 2 such hosts"
    )


def test_what_fits_and_what_is_not_offloaded_passes() -> None:
    cfg = make(**OFFLOAD)
    require(cfg, 8, 4, available=host_bytes(cfg, 8, 4)[0])
    require(make(), 8, 4, available=0)
    require(cfg, 1, 1)


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:   800 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 800 * 1024),
        ({"sys/fs/cgroup/memory.max": "max\n"}, 800 * 1024),
        ({"sys/fs/cgroup/memory.max": "5000\n", "sys/fs/cgroup/memory.current": "3000\n"}, 2000),
        (
            {
                "sys/fs/cgroup/memory.max": "5000\n",
                "sys/fs/cgroup/memory.current": "3000\n",
                "sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 1000\n",
            },
            3000,
        ),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "5000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "6000\n",
            },
            0,
        ),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, 800 * 1024),
    ],
    ids=["no cgroup", "no limit", "limit", "cache is given back", "version 1, over its limit", "version 1, no limit"],
)
def test_free_memory_is_the_machine_s_or_the_container_s(tmp_path: Path, files: dict[str, str], free: int) -> None:
    assert available_bytes(machine(tmp_path, files)) == free


def test_a_machine_that_cannot_be_asked_refuses_nothing(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None
