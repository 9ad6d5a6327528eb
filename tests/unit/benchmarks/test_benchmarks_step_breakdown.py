from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.step.breakdown import PARTS, NoDeviceEvents, Trace, breakdown, kind_of, largest_kernels, longest_gaps

Event = dict[str, Any]


def kernel(start: float, end: float, name: str, category: str = "kernel") -> Event:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": end - start}


def written(folder: Path, events: list[Event]) -> Trace:
    path = folder / "trace.json"
    path.write_text(json.dumps({"traceEvents": [{"ph": "M", "name": "process_name"}, *events]}))
    return Trace.read(path)


def test_every_moment_counts_once_and_the_parts_are_the_step(tmp_path: Path) -> None:
    nccl = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL"
    events = [
        kernel(0, 10, "aten::mm", "cpu_op"),
        kernel(1_000, 3_000, "nvjet_hsh_256x128_64x4"),
        # Half of it beside the product, a fifth of the rest beside a copy.
        kernel(2_000, 4_000, nccl),
        kernel(3_800, 4_400, "Memcpy DtoD", "gpu_memcpy"),
        kernel(5_000, 6_000, "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>"),
        kernel(5_500, 5_800, "triton_poi_fused__scaled_dot_product_flash_attention_add_3"),
        kernel(6_000, 6_200, "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7"),
        kernel(7_900, 8_000, "cudaStreamSynchronize", "cuda_runtime"),
    ]
    found = breakdown(written(tmp_path, events), steps=2)
    assert found == pytest.approx(
        {
            "GEMM": 1.0,
            "attention": 0.1,
            "other kernels": 0.0,
            "exposed communication": 0.5,
            "optimizer": 0.5,
            "copies": 0.2,
            "host gaps": 1.7,
        }
    )
    assert list(found) == list(PARTS)
    assert sum(found.values()) == pytest.approx(8.0 / 2)


def test_work_beside_work_of_its_own_class_counts_once(tmp_path: Path) -> None:
    events = [kernel(0, 100, "gemm_a"), kernel(50, 200, "gemm_b"), kernel(50, 60, "gemm_c")]
    found = breakdown(written(tmp_path, events), steps=1)
    assert found["GEMM"] == pytest.approx(0.2)
    assert sum(found.values()) == pytest.approx(0.2)


def test_the_longest_gaps_say_what_is_around_them_and_what_the_host_did(tmp_path: Path) -> None:
    events = [
        kernel(0, 9_000, "step", "user_annotation"),
        kernel(4_500, 6_500, "cudaStreamSynchronize", "cuda_runtime"),
        kernel(100, 200, "aten::mm", "cpu_op"),
        # Overlaps the next two, and ends after them.
        kernel(1_000, 4_000, "nccl"),
        kernel(1_500, 2_000, "gemm_a"),
        kernel(3_000, 3_500, "gemm_b"),
        kernel(4_250, 4_300, "gemm_c"),
        kernel(6_300, 7_000, "Memcpy HtoD", "gpu_memcpy"),
    ]
    first, second = longest_gaps(written(tmp_path, events))
    assert first == {
        "ms": pytest.approx(2.0),
        "after": "gemm_c",
        "before": "Memcpy HtoD",
        "host": ["step 2.00 ms", "cudaStreamSynchronize 1.80 ms"],
    }
    assert (second["ms"], second["after"], second["before"]) == (pytest.approx(0.25), "nccl", "gemm_c")
    assert longest_gaps(written(tmp_path, events), count=1) == [first]


def test_kernels_are_added_up_by_name(tmp_path: Path) -> None:
    events = [kernel(0, 1_000, "gemm_a"), kernel(2_000, 2_500, "adam"), kernel(3_000, 4_200, "gemm_a")]
    found = largest_kernels(written(tmp_path, events), steps=2)
    assert found == [
        {"part": "GEMM", "name": "gemm_a", "ms": pytest.approx(1.1), "launches": 1.0},
        {"part": "optimizer", "name": "adam", "ms": pytest.approx(0.25), "launches": 0.5},
    ]
    assert largest_kernels(written(tmp_path, events), steps=2, count=1) == found[:1]


def test_the_trace_of_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoDeviceEvents, match="^the trace has no work of a GPU in it$"):
        written(tmp_path, [kernel(0, 10, "aten::mm", "cpu_op")])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "GEMM"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<>>", "GEMM"),
        ("triton_tem_fused_mm_4", "GEMM"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("keys_kernel", "attention"),
        ("forward_kernel", "attention"),
        ("_forward_kernel", "other kernels"),
        ("triton_red_fused_native_layer_norm_addmm_copy_2", "other kernels"),
        ("_adamw_kernel", "optimizer"),
        ("_squared_norm_kernel", "optimizer"),
        ("void at::native::multi_tensor_apply_kernel<LpNormFunctor>", "optimizer"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_SIMPLE", "exposed communication"),
        ("_link_gather_kernel", "exposed communication"),
        ("void at::native::elementwise_kernel<direct_copy_kernel_cuda>", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, FillFunctor<float>>", "copies"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, MulFunctor<float>>", "other kernels"),
        ("void at::native::elementwise_kernel<4, CUDAFunctor_add<float>::{lambda(int)#1}>", "other kernels"),
    ],
)
def test_kernels_are_known_by_their_names(name: str, kind: str) -> None:
    assert kind_of(kernel(0, 1, name)) == kind
