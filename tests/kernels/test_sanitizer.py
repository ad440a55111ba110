"""compute-sanitizer finds no bad access and no race in the kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mac_kernels.cuda.front import unsupported_device

SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
SCRIPT = Path(__file__).parent / "sanitized_steps.py"
REPORT = re.compile(
    r"Error: Race reported between Write access at (?P<at>\S+) in \S+\n=+ +and Write access at (?P<and>\S+) in .*"
)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not Path(SANITIZER).exists(), reason="needs compute-sanitizer of the CUDA toolkit")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("kernels", ["triton", "front", "flashinfer", "tca"])
def test_kernels_are_clean(tool: str, kernels: str) -> None:
    if kernels == "flashinfer":
        pytest.importorskip("flashinfer", reason="needs FlashInfer (extra flashinfer)")
    if kernels == "front" and (reason := unsupported_device(torch.device("cuda", 0))):
        pytest.skip(reason)
    # without PyTorch's cache every tensor is its own allocation, so that what lies beyond it belongs to nobody
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # what cuda.bindings asks the driver for and does not get is no bad access
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    done = subprocess.run(
        [SANITIZER, "--tool", tool, *options, sys.executable, str(SCRIPT), "cuda", kernels],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0 and "all steps done" in done.stdout, report[-4000:]
    assert is_clean(tool, report), report[-4000:]


def is_clean(tool: str, report: str) -> bool:
    """Whether a report shows nothing but what Triton's reductions are known for.

    Several lanes store the same sum to the same place with one instruction; they added it up in different orders, so
    the last bit may differ, which racecheck calls a race (https://github.com/triton-lang/triton/issues/7264).
    """
    if tool == "memcheck":
        return "ERROR SUMMARY: 0 errors" in report
    known = [found for found in REPORT.finditer(report) if found["at"] == found["and"]]
    shown = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", report)
    return shown is not None and int(shown[1]) == len(known)


def test_only_the_known_hazard_is_let_through() -> None:
    bars, where = "=========", "Write access at k+0x10 in"
    same = f"{bars} Error: Race reported between {where} a.py:1\n{bars}     and {where} a.py:1 [7 hazards]\n"
    other = same.replace("and Write access at k+0x10", "and Write access at k+0x20")
    read = same.replace("and Write", "and Read")

    def summary(count: int) -> str:
        return f"{bars} RACECHECK SUMMARY: {count} hazards displayed ({count} errors, 0 warnings)\n"

    assert is_clean("racecheck", summary(0)) and is_clean("racecheck", same + summary(1))
    assert not any(is_clean("racecheck", same + bad + summary(2)) for bad in (other, read, ""))
    assert not is_clean("racecheck", same)
    assert is_clean("memcheck", f"{bars} ERROR SUMMARY: 0 errors\n")
    assert not is_clean("memcheck", f"{bars} Misaligned address\n{bars} ERROR SUMMARY: 1 error\n")
