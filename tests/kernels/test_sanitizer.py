"""compute-sanitizer finds no bad access and no race in the kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
SCRIPT = Path(__file__).parent / "sanitized_steps.py"
SUMMARIES = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "RACECHECK SUMMARY: 0 hazards"}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not Path(SANITIZER).exists(), reason="needs compute-sanitizer of the CUDA toolkit"),
]


@pytest.mark.parametrize("tool", SUMMARIES)
def test_kernels_are_clean(tool: str) -> None:
    # without PyTorch's cache every tensor is its own allocation, so that what lies beyond it belongs to nobody
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, str(SCRIPT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    report = (done.stdout + done.stderr)[-4000:]
    print(report)
    assert "all steps done" in done.stdout, report
    assert done.returncode == 0 and SUMMARIES[tool] in report, report
