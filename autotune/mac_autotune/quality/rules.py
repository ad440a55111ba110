"""Readable names of policies: ``careful``, ``tau=.6,beta=.15``, ``fast,rows=int8``, ``tca,mass=.5``, ``fast+tca``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, get_args

import torch

from mac_kernels import PRESETS, ConfigError, MacConfig, find_match
from mac_kernels.config import HeadTable
from mac_kernels.step import FindMatch
from mac_kernels.tca import TcaBudgets, TcaConfig
from mac_transformers.batch import FULL
from mac_transformers.policies import Mac, Policy, Stored, Tca, Window, find_newest

from .rounding import STORED, rounding_pool
from .sketches import Ballot, Basis, SketchedMatch, SketchKind

ALIASES = {
    "tau": "threshold",
    "beta": "influence",
    "W": "window",
    "S": "band",
    "F": "sinks",
    "scope": "match_scope",
    "age": "max_age",
    "context": "min_context",
    "k": "nominees",
    "loaded_exact": "recompute_loaded_groups",
}
_FORMATS = {"rows": STORED, "q": ("q_pre",), "o": ("out",), "g": ("kbar",)}
_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
_WORDS = {"none": None, "on": True, "off": False}


def parse_rule(text: str, scale: HeadTable | None = None, budgets: Sequence[TcaBudgets] = ()) -> Policy:
    """Turn a rule into a policy.

    A rule is a preset (or ``newest``, the control that takes the newest row under the threshold), then ``key=value``
    pairs separated by commas: any field of :class:`MacConfig` or its short name (:data:`ALIASES`); ``rows``, ``q``,
    ``o`` or ``g`` = ``bf16``, ``fp8`` or ``int8`` (all stored rows, queries, outputs, mean keys); ``sketch`` = the name
    of a sketch kind (with ``k``, the rows it nominates); ``scale=on`` = the calibrated ``scale``. Without a preset it
    starts from the defaults without the influence bound, so that a rule's name says all that it bounds.
    ``window:RULE`` and ``window:N`` are the sink + window control, ``full:bf16`` and ``full:fp8`` full attention over a
    KV cache of that dtype.

    ``tca`` takes the first of the ``budgets`` that has all the fields of :class:`mac_kernels.tca.TcaConfig` that the
    rule names (``mass_target``, for short ``mass``, and ``refresh`` are free), and ``measure``; ``prefill=dense`` reads
    the prompt exactly. A preset with ``+tca`` behind its name lets MAC's misses read selected tokens; TCA's keys then
    begin with ``tca.``, and ``tca.refresh`` is the block unless it is named.

    Raises
    ------
    ConfigError
        If a name, a key or a value is wrong.

    Examples
    --------
    >>> parse_rule("tau=.6,influence=.15").config.threshold
    0.6
    >>> parse_rule("window:careful").like
    'careful'
    """
    if text.startswith("window:"):
        size = text.removeprefix("window:")
        return Window(tokens=int(size)) if size.isdigit() else Window(like=size)
    if text.startswith(f"{FULL}:"):
        return _stored(text)
    first, *rest = text.split(",")
    if first == "tca":
        return _tca(text, rest, budgets)
    first, plus, method = first.partition("+")
    if plus and method != "tca":
        raise ConfigError(f"unknown method {method!r} in {text!r}; a preset may be followed by +tca")
    find: FindMatch = find_match
    base = PRESETS.get(first)
    if "=" in first:
        base, rest = MacConfig(influence=None), [first, *rest]
    elif first == "newest":
        base, find = MacConfig(influence=None, nominees=None), find_newest
    if base is None:
        raise ConfigError(
            f"unknown rule {first!r} in {text!r}; begin with one of {', '.join(PRESETS)}, newest, tca, window:, full:"
        )
    found = None
    if plus:
        selecting = [pair.removeprefix("tca.") for pair in rest if pair.startswith("tca.")]
        rest = [pair for pair in rest if not pair.startswith("tca.")]
        found = _selecting(text, selecting, budgets)
    fields, sketch = base.to_dict(), ""
    formats: dict[str, str] = {}
    for pair in rest:
        key, equals, value = pair.partition("=")
        key = ALIASES.get(key, key)
        if not equals:
            raise ConfigError(f"{pair!r} in {text!r} is no key=value pair; e.g. tau=.6")
        if key in _FORMATS:
            formats |= dict.fromkeys(_FORMATS[key], value)
        elif key == "sketch":
            sketch = value
        elif key == "scale":
            if value != "on" or scale is None:
                raise ConfigError(f"{pair!r} in {text!r} takes the calibrated scale; say scale=on and name its file")
            fields["influence_scale"] = scale
        elif key in fields and key != "tca":
            fields[key] = _value(value)
        else:
            known = [*fields, *ALIASES, *_FORMATS, "sketch", "scale"]
            raise ConfigError(f"unknown key {key!r} in {text!r}; known: {', '.join(known)}")
    if sketch:
        find = _sketched(sketch, fields["nominees"])
        fields["nominees"] = None
    config = MacConfig.from_dict({**fields, "tca": None if found is None else found.config}, source=text)
    options: dict[str, Any] = {"find": find, "budgets": None if found is None else found.budgets}
    return Mac(config, pool=rounding_pool(formats), **options) if formats else Mac(config, **options)


def parse_rules(text: str, scale: HeadTable | None = None, budgets: Sequence[TcaBudgets] = ()) -> dict[str, Policy]:
    """Policies by their rule, from rules separated by blanks; a window's partner must be among them.

    Raises
    ------
    ConfigError
        If a rule is wrong, or a window names a rule that is not there.
    """
    rules = {rule: parse_rule(rule, scale, budgets) for rule in text.split()}
    for rule, policy in rules.items():
        if isinstance(policy, Window) and policy.like is not None and policy.like not in rules:
            raise ConfigError(f"{rule!r} needs the rule {policy.like!r} in the same list")
    if not rules:
        raise ConfigError("no rule given; e.g. --configs 'careful balanced window:careful'")
    return rules


def _stored(text: str) -> Stored:
    dtype = _DTYPES.get(text.removeprefix(f"{FULL}:"))
    if dtype is None:
        raise ConfigError(f"{text!r} must name a dtype of the KV cache: {', '.join(_DTYPES)}")
    return Stored(dtype)


def _selecting(text: str, pairs: Sequence[str], budgets: Sequence[TcaBudgets]) -> Tca:
    """What misses read."""
    found = _tca(text, pairs, budgets)
    if found.config.refresh is not None:
        return found
    return dataclasses.replace(found, config=dataclasses.replace(found.config, refresh=found.config.block))


def _tca(text: str, pairs: Sequence[str], budgets: Sequence[TcaBudgets]) -> Tca:
    fields: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"{pair!r} in {text!r} is no key=value pair; e.g. mass=.5")
        fields["mass_target" if key == "mass" else key] = _value(value)
    prefill, measure = fields.pop("prefill", "sparse"), fields.pop("measure", None)
    if prefill not in ("sparse", "dense"):
        raise ConfigError(f"prefill={prefill} in {text!r} must be sparse or dense")
    for found in budgets:
        config = TcaConfig.from_dict({**found.config.to_dict(), **fields}, source=text)
        free = {name: getattr(config, name) for name in ("mass_target", "mode", "refresh")}
        same = dataclasses.replace(found.config, **free)
        if config == same and measure in (None, found.measure):
            return Tca(config, found, prefill)
    raise ConfigError(
        f"{text!r} takes calibrated budgets, and none were given for it; write them with `mac-kernels tca calibrate` "
        "and name the file: --budgets FILE"
    )


@lru_cache
def _sketched(name: str, nominees: int) -> FindMatch:
    return SketchedMatch(_kind(name), nominees)


def _kind(name: str) -> SketchKind:
    parts = name.split("-")
    try:
        basis, scope, dim, bits, *more = parts
        ballot = next((word for word in more if word != "centred"), "sum")
        if basis not in get_args(Basis) or ballot not in get_args(Ballot) or scope not in ("head", "group"):
            raise ValueError(name)
        # the words were checked just now, and a size that is not 8 or 4 has no codes
        return SketchKind(basis, scope == "head", int(dim), int(bits.removeprefix("int")), "centred" in more, ballot)  # type: ignore[arg-type]
    except ValueError:
        raise ConfigError(f"sketch={name!r} is no kind; e.g. random-head-40-int8-each, signed-group-128-int8") from None


def _value(text: str) -> object:
    if text in _WORDS:
        return _WORDS[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
