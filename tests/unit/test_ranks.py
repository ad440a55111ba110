"""Tensor parallelism: ranks in processes of their own, which exchange nothing, decide as one process of all heads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mac_kernels import Reason


def decode(folder: Path, size: int, backend: str, device: str) -> dict[str, torch.Tensor]:
    """Run the ranks side by side; what they decided, heads in order."""
    script = str(Path(__file__).with_name("rank_steps.py"))
    paths = [folder / f"{size}-{rank}.pt" for rank in range(size)]
    runs = [
        subprocess.Popen([sys.executable, script, str(rank), str(size), backend, device, str(path)])
        for rank, path in enumerate(paths)
    ]
    assert [run.wait() for run in runs] == [0] * size
    parts = [torch.load(path) for path in paths]
    return {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]}


@pytest.mark.parametrize(
    ("backend", "device"), [("reference", "cpu"), pytest.param("triton", "cuda", marks=pytest.mark.gpu)]
)
def test_ranks_decide_as_one_process_of_all_heads(backend: str, device: str, tmp_path: Path) -> None:
    whole = decode(tmp_path, 1, backend, device)
    hits = whole["reason"] == Reason.HIT
    assert 0.2 < hits.float().mean() < 0.8, "hits and misses must both occur"
    assert len(whole["reason"].unique()) >= 3
    for size in (2, 4):
        ranks = decode(tmp_path, size, backend, device)
        for name in ("reason", "matched_pos", "start"):
            assert torch.equal(ranks[name], whole[name]), f"{name} of {size} ranks"
        torch.testing.assert_close(ranks["out"], whole["out"], rtol=1e-4, atol=1e-5)
