"""`make gpu-check`, as far as it runs without a GPU."""

import json
from pathlib import Path

import pytest
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.profile_checks import ms_by_kind

from tests.cli import hyperfit

ROOT = Path(__file__).parents[1]


@pytest.mark.exhaustive
def test_all_checks_run_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--shapes", "tiny", "--out", str(out)]
    result = hyperfit(ROOT, *options, timeout=600, before=main)  # which exits
    assert result.returncode == 0, result.stdout + result.stderr
    findings = json.loads(out.read_text())["findings"]
    crashed_or_skipped = [f for f in findings if f["case"].startswith(("crashed", "skipped"))]
    assert not crashed_or_skipped
    needs_gpu = {f["check"] for f in findings if f["case"] == "needs a GPU"}
    assert needs_gpu == {"no CUDA graph", "out of memory, training", "out of memory, decoding"}
    assert len({f["check"] for f in findings}) == 25


def test_kernels_are_summed_by_kind() -> None:
    times = {
        "nvjet_tst_128x256_64x4": 3.0, "void cutlass::Kernel2<cutlass_80_tensorop>": 2.0,
        "fmha_cutlassF_bf16_aligned": 0.5, "triton_red_fused_mean_mul_2": 1.0,
        "void at::native::multi_tensor_apply_kernel<FusedAdam>": 4.0,
        "Memcpy HtoD (Pinned -> Device)": 0.25, "at::native::elementwise_kernel": 0.125,
    }  # fmt: skip
    assert ms_by_kind(times) == {
        "products_ms": 5.0, "attention_ms": 0.5, "optimizer_ms": 4.0, "fused_ms": 1.0,
        "copies_ms": 0.25, "other_ms": 0.125,
    }  # fmt: skip
