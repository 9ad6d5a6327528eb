from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.config.load import load
from engine.dist.context import ParallelContext
from engine.runtime.ds_config import deepspeed_config


def emitted(*words: str, device: str = "cuda") -> dict[str, Any]:
    cfg = load(["run.name=t", *words])
    return deepspeed_config(cfg, replace(ParallelContext.single(), device=torch.device(device)))


def test_without_offload_no_offload_keys() -> None:
    keys = emitted("zero=z3")["zero_optimization"]
    assert not {"offload_optimizer", "offload_param", "zenflow"} & keys.keys()


@pytest.mark.parametrize("stage", ["z1", "z2", "z3"])
def test_offloaded_optimizer(stage: str) -> None:
    place = emitted(f"zero={stage}", "zero.offload_optimizer=cpu", "zero.offload_ratio=1")["zero_optimization"]
    assert place["offload_optimizer"]["device"] == "cpu"
    assert place["offload_optimizer"]["pin_memory"] is True
    assert ("ratio" in place["offload_optimizer"]) is (stage == "z3")


def test_memory_is_pinned_only_for_gpus() -> None:
    words = ("zero=z3", "zero.offload_optimizer=cpu", "zero.offload_params=cpu")
    keys = emitted(*words, device="cpu")["zero_optimization"]
    assert keys["offload_optimizer"]["pin_memory"] is keys["offload_param"]["pin_memory"] is False
    assert emitted(*words, "zero.pin_memory=false")["zero_optimization"]["offload_param"]["pin_memory"] is False


def test_one_replica_overlaps_with_nothing_but_layers_of_stage_3() -> None:
    found = [emitted(*words)["zero_optimization"]["overlap_comm"] for words in (["zero=z3"], ["zero=z2"])]
    assert found == [True, False]
    assert emitted("zero=z3", "zero.overlap_comm=false")["zero_optimization"]["overlap_comm"] is False
    assert emitted("zero=z3", device="cpu")["zero_optimization"]["overlap_comm"] is False
    # Its layers come from the host, which would run ahead of the device and fill it with them.
    assert emitted("zero=z3_offload")["zero_optimization"]["overlap_comm"] is False


def test_nvme_names_its_folder() -> None:
    words = ("zero=z3", "zero.offload_optimizer=nvme", "zero.offload_params=nvme", "zero.nvme_path=/disk")
    keys = emitted(*words)["zero_optimization"]
    assert [keys[name]["nvme_path"] for name in ("offload_optimizer", "offload_param")] == ["/disk", "/disk"]


def test_only_adamw_must_be_deepspeeds_own() -> None:
    forced = [emitted("zero.offload_optimizer=cpu", f"optim={name}") for name in ("adamw", "sgd", "lion")]
    assert [config["zero_force_ds_cpu_optimizer"] for config in forced] == [True, False, False]


def test_overlapped_steps() -> None:
    words = ("zero=z3", "zero.offload_optimizer=cpu", "train.accum_steps=4")
    fast = emitted(*words, "zero.offload_strategy=superoffload")["zero_optimization"]
    assert fast["offload_optimizer"]["super_offload"] is True
    flow = emitted(*words, "zero.offload_strategy=zenflow")
    assert flow["zero_optimization"]["zenflow"]["update_interval"] == 4
    assert flow["optimizer"]["type"] == "AdamW"


def test_dynamic_and_constant_loss_scale() -> None:
    dynamic = emitted("precision=fp16", "precision.initial_scale_power=12", "precision.scale_window=7")
    assert dynamic["fp16"] == {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 12,
        "loss_scale_window": 7,
        "hysteresis": 1,
        "min_loss_scale": 1,
    }
    assert dynamic["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "bf16" not in dynamic
    assert emitted("precision=fp16", "precision.loss_scale=256")["fp16"]["loss_scale"] == 256


def test_no_timer_waits_for_the_device_unless_it_is_asked_for() -> None:
    assert emitted()["timers"] == {"throughput": {"enabled": False}}
    timed = emitted("+runtime.deepspeed_extra.timers.throughput.enabled=true")
    assert timed["timers"] == {"throughput": {"enabled": True}}


def test_blocks_are_gathered_whole_and_one_ahead() -> None:
    small = emitted("zero=z3")["zero_optimization"]
    assert small["leaf_module"] == {"classes": ["Block"]}
    assert (small["stage3_prefetch_bucket_size"], small["stage3_max_live_parameters"]) == (50_000_000, 1_000_000_000)
    sizes = ("model=llama_8b", "model.hidden_size=8192", "model.num_heads=64", "model.ffn_size=28672")
    # Queries, keys and values, output, three matrices of the feed-forward, two norms.
    cut, norms = 8192 * (8192 + 2 * 1024) + 8192 * 8192 + 3 * 8192 * 28672, 2 * 8192
    for words, block in (((), cut + norms), (("parallel.tp=2",), cut // 2 + norms)):
        large = emitted("zero=z3", *sizes, *words)["zero_optimization"]
        assert (large["stage3_prefetch_bucket_size"], large["stage3_max_live_parameters"]) == (
            block,
            max(3 * block, 1_000_000_000),
        )
    assert not {"leaf_module", "stage3_prefetch_bucket_size"} & emitted("zero=z2")["zero_optimization"].keys()
