"""The one settings object: fields, presets, JSON form."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import ConfigError
from .tca.config import TcaConfig

SCHEMA_VERSION = 1
CONFIG_KEYS = ("schema", "preset", "mac", "tca", "serving")  # the last one is read by servers alone
MatchScope = Literal["head", "group"]
HeadTable = tuple[tuple[float, ...], ...]
"""Numbers by layer, then by query head (or one for all heads of the layer)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MacConfig:
    """What is reused, and when. Immutable; the defaults are the preset ``careful``.

    Parameters
    ----------
    window : int, rows, default 512
        Ring rows per request and layer, ``W >= 2``; the newest ``W - 1`` queries are candidates.
    band : int, tokens, default 256
        ``S >= 1``, the newest tokens that are always attended fresh and never stored.
    sinks : int, tokens, default 4
        ``F >= 0``, the first tokens, always attended fresh.
    threshold : float, unitless, default 0.45
        A head may be reused if its query distance is below ``sqrt(2 D) (1 - threshold)``. Larger is stricter; ``>= 1``
        never reuses, ``-inf`` always does (measurement only).
    influence : float or None, unitless, default 0.1
        Upper bound of (weight of the reused state) x (distance / ``sqrt(2 D)``), ``> 0``; ``None`` turns it off.
    correction : bool, default True
        First-order correction of the reused state's weight (adds one ``[Hq, D]`` field to every ring row).
    min_context : int, tokens, default 2048
        Requests shorter than this are computed exactly (their rows are stored); more than ``band + sinks``.
    max_age : int or None, tokens, default 1024
        Largest distance to the last exact prefix that a reused state descends from, 16 tokens more for each time that
        it was handed on, ``>= 1``; ``None``: no limit.
    match_scope : {"head", "group"}, default "head"
        Nearest row of every head, or one common row per kv group (smallest worst-head distance).
    nominees : int or None, default 12
        Rows per kv group nominated by the sketch before exact distances are taken, ``>= 1``; ``None`` takes the exact
        distance of every row.
    recompute_loaded_groups : bool, default True
        If any head of a kv group needs its KV, all heads of the group are computed exactly. ``False`` is the rule of
        the paper, a control that only the reference backend runs.
    break_even : float or None, in (0, 1), default 0.02
        Share of reused kv groups below which a layer stops matching for a while (:mod:`mac_kernels.bypass`); ``None``:
        it never does. It forgoes less than this share of the KV reads, and saves the search. What the other requests
        of a batch hit decides, too: where every output must depend on its own request alone, set ``None``.
    thresholds : table of float, optional
        ``threshold`` of every layer and query head (one number for all heads of a layer will do).
    influence_scale : table of float, ``> 0``, optional
        By layer and query head, factors of what ``influence`` bounds: how much an error of this head does to the
        model's residual stream, relative to other heads. Calibrated for a model; ``None`` is 1 everywhere.
    tca : TcaConfig or None, default None
        What a missed kv group reads of the context before the rings' reach: the tokens that TCA selected, instead of
        all (:mod:`mac_kernels.tca.index`). Drops information. Needs its mode ``"index"``, a ``refresh``, the same
        ``sinks``, a ``local_window >= band + window``, a ``max_age`` and ``recompute_loaded_groups``.

    Raises
    ------
    ConfigError
        If a value is outside its range; the message names the field, the value and the range.

    Notes
    -----
    Source of the method: MAC-Attention, arXiv 2604.00235. Correction, influence bound, age limit and exact loaded
    groups are ours.
    """

    window: int = 512
    band: int = 256
    sinks: int = 4
    threshold: float = 0.45
    influence: float | None = 0.1
    correction: bool = True
    min_context: int = 2048
    max_age: int | None = 1024
    match_scope: MatchScope = "head"
    nominees: int | None = 12
    recompute_loaded_groups: bool = True
    break_even: float | None = 0.02
    thresholds: HeadTable | None = None
    influence_scale: HeadTable | None = None
    tca: TcaConfig | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tca, Mapping):
            object.__setattr__(self, "tca", TcaConfig.from_dict(self.tca, source="tca"))
        for name in ("thresholds", "influence_scale"):
            table = getattr(self, name)
            if isinstance(table, list | tuple) and all(isinstance(row, list | tuple) for row in table):
                object.__setattr__(self, name, tuple(tuple(row) for row in table))  # JSON has lists
        problems = [*_type_problems(self), *_range_problems(self)]
        if problems:
            raise ConfigError("bad MacConfig: " + "; ".join(problems))

    @staticmethod
    def preset(name: str, **changes: Any) -> MacConfig:
        """Return a named preset, optionally with some fields changed.

        Parameters
        ----------
        name : {"careful", "balanced", "fast", "exact", "paper"}
            See :data:`PRESETS`.
        **changes
            Fields to replace.

        Raises
        ------
        ConfigError
            If the name or a field is unknown, or a value is out of range.

        Examples
        --------
        >>> MacConfig.preset("fast", window=1024).influence
        0.15
        """
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}{_nearest(name, PRESETS)}; choose one of {', '.join(PRESETS)}")
        return MacConfig.from_dict({**PRESETS[name].to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dictionary (without the schema version)."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any], *, source: str = "config") -> MacConfig:
        """Build a config from a mapping of field names; absent fields keep their defaults.

        Raises
        ------
        ConfigError
            If a key is unknown (the nearest known one is named) or a value is wrong; ``source`` opens the message.
        """
        known = [f.name for f in dataclasses.fields(MacConfig)]
        unknown = [f"{key!r}{_nearest(key, known)}" for key in values if key not in known]
        if unknown:
            raise ConfigError(f"{source}: unknown key {', '.join(unknown)}; known keys: {', '.join(known)}")
        try:
            return MacConfig(**values)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    def to_json(self) -> str:
        """Return the JSON form: ``{"schema": 1, "mac": {...}}``; an infinite threshold is written as a string."""
        values = self.to_dict()
        if math.isinf(self.threshold):
            values["threshold"] = "inf" if self.threshold > 0 else "-inf"
        return json.dumps({"schema": SCHEMA_VERSION, "mac": values}, indent=2) + "\n"

    @staticmethod
    def from_json(text: str, *, source: str = "config") -> MacConfig:
        """Parse the JSON form. Keys: ``schema`` (must be 1), ``mac`` (fields), optionally ``preset`` as their base.

        Raises
        ------
        ConfigError
            If the text is no JSON object, the schema is another, a key is unknown or a value is wrong.
        """
        preset, fields = parse_config(text, source=source)
        base = {} if preset is None else PRESETS[preset].to_dict()
        return MacConfig.from_dict({**base, **fields}, source=source)

    @staticmethod
    def load(path: str | Path) -> MacConfig:
        """Read a JSON file written by :meth:`to_json`.

        Raises
        ------
        ConfigError
            If the file cannot be read or its content is wrong; the message names the file.
        """
        return MacConfig.from_json(read_config(path), source=str(path))


def read_config(path: str | Path) -> str:
    """Return the text of a config file.

    Raises
    ------
    ConfigError
        If the file cannot be read; the message names it.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give the path of a mac-kernels JSON config") from None


def parse_config(text: str, *, source: str = "config") -> tuple[str | None, dict[str, Any]]:
    """Split the JSON form into its preset, if it names one, and its fields; their values are not checked yet.

    Raises
    ------
    ConfigError
        If the text is no JSON object, the schema is another, or the preset or a key is unknown.
    """
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise ConfigError(f"{source}: not valid JSON ({error}); write it with MacConfig.to_json()") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected a JSON object, got {type(data).__name__}")
    if data.get("schema") != SCHEMA_VERSION:
        raise ConfigError(
            f"{source}: schema {data.get('schema')!r} is not {SCHEMA_VERSION}; write the file again with this version"
        )
    extra = [key for key in data if key not in CONFIG_KEYS]
    if extra:
        raise ConfigError(f"{source}: unknown key {', '.join(map(repr, extra))}; known keys: {', '.join(CONFIG_KEYS)}")
    fields = data.get("mac", {})
    if not isinstance(fields, dict):
        raise ConfigError(f"{source}: 'mac' must be an object of MacConfig fields, got {type(fields).__name__}")
    preset = data.get("preset")
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise ConfigError(f"{source}: unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    fields = dict(fields)
    if fields.get("threshold") in ("inf", "-inf"):
        fields["threshold"] = float(fields["threshold"])
    return preset, fields


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON; write infinite thresholds as the strings 'inf' and '-inf'")


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_table(value: object) -> bool:
    if value is None:
        return True
    if not isinstance(value, tuple) or not value or not all(isinstance(row, tuple) and row for row in value):
        return False
    return len({len(row) for row in value}) == 1 and all(_is_number(x) for row in value for x in row)


def _flat(table: HeadTable | None) -> list[float]:
    return [] if table is None else [x for row in table for x in row]


def _type_problems(c: MacConfig) -> list[str]:
    checks: list[tuple[str, bool, str]] = [
        *((name, _is_int(getattr(c, name)), "an integer") for name in ("window", "band", "sinks", "min_context")),
        *(
            (name, getattr(c, name) is None or _is_int(getattr(c, name)), "an integer or null")
            for name in ("max_age", "nominees")
        ),
        ("threshold", _is_number(c.threshold), "a number"),
        ("influence", c.influence is None or _is_number(c.influence), "a number or null"),
        ("break_even", c.break_even is None or _is_number(c.break_even), "a number or null"),
        *(
            (name, isinstance(getattr(c, name), bool), "true or false")
            for name in ("correction", "recompute_loaded_groups")
        ),
        ("match_scope", c.match_scope in ("head", "group"), "'head' or 'group'"),
        ("tca", c.tca is None or isinstance(c.tca, TcaConfig), "null or an object of TcaConfig fields"),
        *(
            (name, _is_table(getattr(c, name)), "null or, for every layer, a list of numbers, one per query head")
            for name in ("thresholds", "influence_scale")
        ),
    ]
    return [f"{name}={_short(getattr(c, name))} must be {kind}" for name, good, kind in checks if not good]


def _range_problems(c: MacConfig) -> list[str]:
    if _type_problems(c):
        return []
    checks = [
        ("window", c.window >= 2, ">= 2 rows"),
        ("band", c.band >= 1, ">= 1 token"),
        ("sinks", c.sinks >= 0, ">= 0 tokens"),
        ("threshold", not math.isnan(c.threshold), "a number, not NaN (>= 1 never reuses, -inf always does)"),
        ("influence", c.influence is None or c.influence > 0, "> 0, or null for no bound"),
        ("min_context", c.min_context > c.band + c.sinks, f"> band + sinks = {c.band + c.sinks} tokens"),
        ("max_age", c.max_age is None or c.max_age >= 1, ">= 1 token, or null for no limit"),
        ("nominees", c.nominees is None or c.nominees >= 1, ">= 1 row, or null to scan all"),
        ("break_even", c.break_even is None or 0 < c.break_even < 1, "in (0, 1), or null to match always"),
        ("thresholds", all(map(math.isfinite, _flat(c.thresholds))), "finite numbers"),
        ("influence_scale", all(math.isfinite(x) and x > 0 for x in _flat(c.influence_scale)), "finite numbers > 0"),
    ]
    wrong = [f"{name}={_short(getattr(c, name))} must be {allowed}" for name, good, allowed in checks if not good]
    return wrong if c.tca is None else [*wrong, *_tca_problems(c, c.tca)]


def _tca_problems(c: MacConfig, tca: TcaConfig) -> list[str]:
    """What would make a state over selected tokens overlap with what is added to it, go stale, or live for ever."""
    reach = c.band + c.window
    checks = [
        ("tca.mode", tca.mode, tca.mode == "index", "'index': a later miss may need what was not selected"),
        ("tca.refresh", tca.refresh, tca.refresh is not None, "set, e.g. 128 steps: a miss meets an old selection"),
        ("tca.sinks", tca.sinks, tca.sinks == c.sinks, f"sinks = {c.sinks}: MAC attends them apart"),
        ("tca.local_window", tca.local_window, tca.local_window >= reach, f">= band + window = {reach} tokens"),
        ("max_age", c.max_age, c.max_age is not None, "set with tca: what a selection missed is inherited so long"),
        ("recompute_loaded_groups", c.recompute_loaded_groups, c.recompute_loaded_groups, "true with tca"),
    ]
    return [f"{name}={value!r} must be {allowed}" for name, value, good, allowed in checks if not good]


PRESETS: dict[str, MacConfig] = {
    "careful": MacConfig(),
    "balanced": MacConfig(influence=0.12),
    "fast": MacConfig(influence=0.15),
    "exact": MacConfig(threshold=1.0, break_even=None),
    "paper": MacConfig(
        influence=None,
        correction=False,
        max_age=None,
        nominees=None,
        recompute_loaded_groups=False,
        break_even=None,
    ),
}
"""Named starting points, from careful to fast by their influence bound (reasons and figures: ``match/README.md``).
``exact`` runs the same ranges and merges with every group missed; ``paper`` is the published rule, a control for the
reference backend."""
