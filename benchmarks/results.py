"""The tidy table of timings: one metric a row, replaced by key, written in one go."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import io
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from mac_kernels.files import write_whole

RESULTS = Path(__file__).parent / "results"
KEY = (
    *("suite", "case", "provider", "backend", "batch", "context", "hq", "hkv", "head_dim", "dtype", "page_size"),
    *("window", "band", "lag", "config", "hit_rate", "miss_pattern", "tp", "metric"),
)
COLUMNS = (
    *KEY,
    *("unit", "p20", "p50", "p80", "n", "gpu", "driver", "torch", "triton", "flashinfer", "commit", "date", "command"),
)
Row = dict[str, str]


def facts(command: str) -> Row:
    """GPU, versions, commit and date of this run."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        **{name: _version(package) for name, package in _PACKAGES.items()},
        "commit": os.environ.get("MAC_COMMIT") or output("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
    }


_PACKAGES = {"torch": "torch", "triton": "triton", "flashinfer": "flashinfer-python"}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def output(*command: str) -> str:
    """What a command prints; ``unknown`` if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def folder() -> Path:
    """Where this GPU's tables are: ``results/<name with underscores>``."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return RESULTS / name.replace(" ", "_")


def read(path: Path) -> list[Row]:
    """Rows of a table; a missing file is an empty one.

    Raises
    ------
    ValueError
        If its columns are others.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has columns {reader.fieldnames}, expected {COLUMNS}; choose another --output")
        return list(reader)


def beside(backend: str, config: str) -> str:
    """``config`` of the full attention that was timed in turn with a row of MAC: ratios are taken within one run."""
    return f"full, beside {backend} {config}"


def as_text(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows as a table keeps them."""
    return [{name: str(value) for name, value in row.items()} for row in rows]


def upsert(path: Path, rows: Iterable[Row]) -> None:
    """Replace the rows of equal key, add the others, sort, and swap the file in whole."""
    table = {tuple(row[name] for name in KEY): row for row in (*read(path), *rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for _, row in sorted(table.items()))
    write_whole(path, text.getvalue())
