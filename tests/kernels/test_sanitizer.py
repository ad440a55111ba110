"""compute-sanitizer finds no bad access and no race in the kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
SCRIPT = Path(__file__).parent / "sanitized_steps.py"
SUMMARIES = {"memcheck": "ERROR SUMMARY: ", "racecheck": "RACECHECK SUMMARY: "}
REPORT = re.compile(
    r"Error: Race reported between Write access at (?P<at>\S+) in \S+\n=+ +and Write access at (?P<and>\S+) in .*"
)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not Path(SANITIZER).exists(), reason="needs compute-sanitizer of the CUDA toolkit")
@pytest.mark.parametrize("tool", SUMMARIES)
def test_kernels_are_clean(tool: str) -> None:
    # without PyTorch's cache every tensor is its own allocation, so that what lies beyond it belongs to nobody
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [SANITIZER, "--tool", tool, sys.executable, str(SCRIPT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    report = done.stdout + done.stderr
    assert "all steps done" in done.stdout and SUMMARIES[tool] in report, report[-4000:]
    assert unexpected(report) == [], report[-4000:]


def unexpected(report: str) -> list[str]:
    """The errors of a report, without those that Triton's reductions are known for.

    Several lanes store the same sum to the same place with one instruction; they added it up in different orders, so
    the last bit may differ, which racecheck calls a race (https://github.com/triton-lang/triton/issues/7264).
    """
    known = [found for found in REPORT.finditer(report) if found["at"] == found["and"]]
    for found in known:
        report = report.replace(found.group(), "")
    return [line for line in report.splitlines() if re.match(r"=+ +(Error|Invalid|Warning|Program hit)", line)]


def test_only_the_known_hazard_is_let_through() -> None:
    bars, where = "=========", "Write access at k+0x10 in"
    same = f"{bars} Error: Race reported between {where} a.py:1\n{bars}     and {where}"
    other = same.replace("and Write access at k+0x10", "and Write access at k+0x20")
    read = same.replace("and Write", "and Read")
    assert unexpected(f"{same} a.py:1 [7 hazards]\n========= \n") == []
    assert len(unexpected(f"{same} a.py:1 [7 hazards]\n{other} a.py:2 [1 hazards]\n{read} a.py:2 [1 hazards]\n")) == 2
    assert unexpected("========= Invalid __global__ read of size 4 bytes\n") != []
