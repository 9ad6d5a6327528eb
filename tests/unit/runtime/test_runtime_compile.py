"""What is compiled, and with which options."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from engine.dist.context import SINGLE
from engine.model.layers import build_stacks
from engine.runtime.compile import compile_parts
from tests.helpers.models import LLAMA, layers_of, noisy_weights


@pytest.mark.parametrize("deterministic", [False, True])
def test_blocks_and_the_loss_are_compiled_and_take_no_kernel_by_its_time_where_bits_count(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: seen.append(options))
    layers = layers_of(LLAMA)
    (model,) = build_stacks(layers, [(0, len(layers))], noisy_weights(), tp=SINGLE)
    compile_parts(model, nn.Identity(), deterministic=deterministic)
    wanted = {"options": {"deterministic": True}} if deterministic else {}
    assert seen == [wanted] * (LLAMA.num_layers + 1)
