"""Options of a server: the section ``serving`` of the JSON config, and where each value comes from."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mac_kernels.config import read_config
from mac_kernels.errors import ConfigError

DEFAULT_SHARE = 0.04
"""Part of the KV pool's bytes that rings or far sets take where their option is not set, but at least one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """How much memory a server gives to MAC or TCA, and what it measures.

    Parameters
    ----------
    ring_memory_gb : float or None, GiB per GPU, default None
        Budget of the ring pool, ``> 0``. ``None``: 4% of the KV pool, but at least one ring.
    snapshot_memory_gb : float, GiB of pinned host memory per rank, default 4.0
        Budget of the ring snapshots in the prefix cache, ``>= 0``; 0 turns them off.
    audit_rate : float, in [0, 1], default 0.0
        Share of (step, layer) pairs in which one request, drawn at random, is also computed exactly, to measure the
        error; 0 turns the audit off. MAC alone.
    index_memory_gb : float or None, GiB per GPU, default None
        Budget of TCA's far sets, ``> 0``. ``None``: 4% of the KV pool, but at least those of one request.

    Raises
    ------
    ConfigError
        If a value is outside its range.
    """

    ring_memory_gb: float | None = None
    snapshot_memory_gb: float = 4.0
    audit_rate: float = 0.0
    index_memory_gb: float | None = None

    def __post_init__(self) -> None:
        snapshot, rate = self.snapshot_memory_gb, self.audit_rate
        budgets = [(name, getattr(self, name)) for name in ("ring_memory_gb", "index_memory_gb")]
        checks = [
            *(
                (name, gb, gb is None or (_is_number(gb) and gb > 0), "a number > 0, or null for 4%")
                for name, gb in budgets
            ),
            ("snapshot_memory_gb", snapshot, _is_number(snapshot) and snapshot >= 0, "a number >= 0 (0: none)"),
            ("audit_rate", rate, _is_number(rate) and 0 <= rate <= 1, "a number in [0, 1] (0: off)"),
        ]
        wrong = [f"{name}={value!r} must be {allowed}" for name, value, good, allowed in checks if not good]
        if wrong:
            raise ConfigError("bad serving options: " + "; ".join(wrong))


def read_options(files: tuple[Path, ...]) -> ServingOptions:
    """Merge the ``serving`` sections of config files, given strongest first (``ResolvedConfig.files``).

    Raises
    ------
    ConfigError
        If a section is no object, a key is unknown or a value is out of range; the message names the file.
    """
    options = ServingOptions()
    for path in reversed(files):
        section = json.loads(read_config(path)).get("serving", {})
        options = _changed(options, section, source=str(path))
    return options


def _changed(options: ServingOptions, section: object, *, source: str) -> ServingOptions:
    if not isinstance(section, Mapping):
        raise ConfigError(f"{source}: 'serving' must be an object of options, got {type(section).__name__}")
    known = [field.name for field in dataclasses.fields(ServingOptions)]
    unknown = [repr(key) for key in section if key not in known]
    if unknown:
        raise ConfigError(f"{source}: unknown serving option {', '.join(unknown)}; known: {', '.join(known)}")
    values: dict[str, Any] = {**dataclasses.asdict(options), **section}
    try:
        return ServingOptions(**values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
