"""`make gpu-check`, as far as it runs without a GPU."""

import json
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import main
from tests.cli import hyperfit

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_all_checks_run_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--shapes", "tiny", "--out", str(out)]
    result = hyperfit(ROOT, *options, timeout=600, before=main)  # which exits
    assert result.returncode == 0, result.stdout + result.stderr
    findings = json.loads(out.read_text())["findings"]
    crashed_or_skipped = [f for f in findings if f["case"].startswith(("crashed", "skipped"))]
    assert not crashed_or_skipped
    needs_gpu = {f["check"] for f in findings if f["case"] == "needs a GPU"}
    assert needs_gpu == {"out of memory, training", "out of memory, decoding"}
    assert len({f["check"] for f in findings}) == 21
