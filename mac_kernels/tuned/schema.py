"""The two kinds of tuned files and their JSON form: launch parameters of a GPU, policy of a model."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ..config import MacConfig
from ..errors import ConfigError
from ..launch import LaunchParams

SCHEMA_VERSION = 1
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A measured value with its interval over ``n`` observations; ``unit`` in words."""

    value: float
    low: float
    high: float
    unit: str
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a tuned file comes from.

    ``versions`` of packages by name; ``basis``: ``"measured"``, or ``"estimated"`` where a model stood in for the GPU;
    ``command`` writes it again.
    """

    gpu: str
    driver: str
    versions: Mapping[str, str]
    study: str
    trial: int
    basis: str
    date: str
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Inclusive ranges of batch size and context (tokens) that a file speaks for."""

    batch: tuple[int, int]
    context: tuple[int, int]

    def missing(self, batch: int, context: int) -> str | None:
        """Which of the two lies outside, in words; ``None`` if both are covered."""
        for name, value, (low, high) in (("batch", batch, self.batch), ("context", context, self.context)):
            if not low <= value <= high:
                return f"{name} {value} is outside of {low} to {high}"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelKey:
    """What launch parameters depend on: GPU name, heads as a tensor-parallel rank sees them, cache dtype, page size."""

    gpu: str
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    page_size: int

    @property
    def file_name(self) -> str:
        """Name of the file for this key."""
        heads = f"hq={self.num_qo_heads},hkv={self.num_kv_heads},d={self.head_dim}"
        return f"kernel,device_name={plain(self.gpu)},{heads},dtype={self.dtype},page_size={self.page_size}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelKey:
    """What a policy depends on: the model's name (path or hub id; may be empty) and shape, over all ranks."""

    name: str
    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def short_name(self) -> str:
        """Last component of the name, without the suffix of a GGUF file."""
        last = re.split(r"[/\\]", self.name.rstrip("/\\"))[-1]
        return re.sub(r"(\.I?Q\d\w*)?\.gguf$", "", last, flags=re.IGNORECASE)

    @property
    def file_name(self) -> str:
        """Name of the file for this key."""
        return f"policy,model={plain(self.short_name) or 'unnamed'}.json"

    def same_shape(self, other: ModelKey) -> bool:
        """Whether all but the name agrees."""
        return dataclasses.replace(self, name="") == dataclasses.replace(other, name="")

    def same_name(self, other: ModelKey) -> bool:
        """Whether both are named, and alike."""
        return bool(self.short_name) and self.short_name.lower() == other.short_name.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Launch parameters of one batch size and context.

    ``launch`` is ``None`` where the default won. ``latency`` in us by planted hit rate (``"1"`` ... ``"0"``), ``ratio``
    to the default's latency, geometric mean over the hit rates, with its range over the rounds; both measured at
    export, in turn.
    """

    batch: int
    context: int
    trial: int
    launch: LaunchParams | None
    ratio: Score
    latency: Mapping[str, Score]

    def curve(self, num_kv_heads: int) -> tuple[tuple[float, float], ...]:
        """Hit rates, as shares of the kv groups that there are, and us of a step, from no hit to all."""
        groups = self.batch * num_kv_heads
        return tuple(sorted({planted_share(float(hit), groups): us.value for hit, us in self.latency.items()}.items()))


def planted_share(hit: float, groups: int) -> float:
    """The share of kv groups that hit where a hit rate was planted: of 3 groups all (.9) or one (.5)."""
    return 1 - round((1 - hit) * groups) / groups


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFile:
    """Tuned launch parameters; ``window`` and ``band`` are those that the latencies were measured with."""

    key: KernelKey
    coverage: Coverage
    window: int
    band: int
    buckets: tuple[Bucket, ...]
    provenance: Provenance

    def nearest(self, batch: int, context: int) -> Bucket:
        """The bucket nearest by ratio of sizes; the caller has checked the coverage."""
        return min(
            self.buckets,
            key=lambda b: abs(math.log(b.batch / batch)) + abs(math.log(b.context / context)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFile:
    """A tuned policy: the config, the preset whose quality limits it keeps, and what was measured at export."""

    key: ModelKey
    coverage: Coverage
    preset: str
    config: MacConfig
    scores: Mapping[str, Score]
    provenance: Provenance


TunedFile = KernelFile | PolicyFile


def plain(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^0-9A-Za-z.-]+", "_", name).strip("_")


def to_json(file: TunedFile) -> str:
    """The JSON form of a tuned file."""
    body = dataclasses.asdict(file)
    if isinstance(file, PolicyFile):
        body["mac"] = json.loads(file.config.to_json())["mac"]
        del body["config"]
    kind = "kernel" if isinstance(file, KernelFile) else "policy"
    return json.dumps({"schema": SCHEMA_VERSION, "kind": kind, **body}, indent=1, allow_nan=False) + "\n"


def kind_of(text: str) -> str | None:
    """``"kernel"``, ``"policy"`` or ``"tca"`` (budgets); ``None`` for others: a plain config or a broken file."""
    try:
        data = json.loads(text)
    except ValueError:
        return None
    kind = data.get("kind") if isinstance(data, dict) else None
    return kind if kind in ("kernel", "policy", "tca") else None


def from_json(text: str, *, source: str) -> TunedFile:
    """Parse a tuned file.

    Raises
    ------
    ConfigError
        If it is no JSON object, of another schema, or has unknown, missing or wrong values; the message names the file
        and what to do.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise _wrong(source, f"is not valid JSON ({error})") from None
    if not isinstance(data, dict) or data.get("kind") not in ("kernel", "policy"):
        raise _wrong(source, 'is no tuned file: it needs "kind": "kernel" or "policy"')
    if data.get("schema") != SCHEMA_VERSION:
        raise _wrong(source, f"has schema {data.get('schema')!r}, this version reads {SCHEMA_VERSION}")
    body = {name: value for name, value in data.items() if name not in ("kind", "schema")}
    return _kernel(body, source) if data["kind"] == "kernel" else _policy(body, source)


def _kernel(body: dict[str, Any], source: str) -> KernelFile:
    values = dict(body)
    if isinstance(values.get("buckets"), list):
        values["buckets"] = tuple(_bucket(bucket, source, index) for index, bucket in enumerate(values["buckets"]))
    file = _record(KernelFile, _nested(values, source, key=KernelKey), source, "the file")
    if not file.buckets:
        raise _wrong(source, "has no buckets")
    return file


def _policy(body: dict[str, Any], source: str) -> PolicyFile:
    values = _nested(body, source, key=ModelKey)
    mac = values.pop("mac", None)
    if not isinstance(mac, dict):
        raise _wrong(source, "has no object 'mac' with the fields of MacConfig")
    values["config"] = MacConfig.from_dict(mac, source=f"{source}: mac")
    values["scores"] = _scores(values.get("scores"), source, "scores")
    return _record(PolicyFile, values, source, "the file")


def _nested(body: dict[str, Any], source: str, *, key: type[KernelKey] | type[ModelKey]) -> dict[str, Any]:
    """Turn the parts that both kinds have into their classes."""
    values = dict(body)
    if isinstance(coverage := values.get("coverage"), dict):
        pairs = {name: tuple(pair) if isinstance(pair, list) else pair for name, pair in coverage.items()}
        values["coverage"] = _record(Coverage, pairs, source, "coverage")
    for name, cls in (("key", key), ("provenance", Provenance)):
        if name in values:
            values[name] = _record(cls, values[name], source, name)
    return values


def _bucket(body: Any, source: str, index: int) -> Bucket:
    where = f"bucket {index}"
    values = dict(body) if isinstance(body, dict) else body
    if isinstance(values, dict):
        if values.get("launch") is not None:
            values["launch"] = _record(LaunchParams, values["launch"], source, f"{where}: launch")
            if problems := launch_problems(values["launch"]):
                raise _wrong(source, f"{where}: launch: {'; '.join(problems)}")
        if "ratio" in values:
            values["ratio"] = _record(Score, values["ratio"], source, f"{where}: ratio")
        values["latency"] = _scores(values.get("latency"), source, f"{where}: latency")
    bucket = _record(Bucket, values, source, where)
    if bucket.batch < 1 or bucket.context < 1:
        raise _wrong(source, f"{where}: batch={bucket.batch} and context={bucket.context} must be >= 1")
    return bucket


def _scores(body: Any, source: str, where: str) -> dict[str, Score]:
    if not isinstance(body, dict):
        raise _wrong(source, f"{where}: expected an object of scores by name, got {type(body).__name__}")
    return {name: _record(Score, value, source, f"{where}: {name}") for name, value in body.items()}


def _record(cls: type[T], values: Any, source: str, where: str) -> T:
    """Build a dataclass from an object with exactly its fields (those with a default may be absent)."""
    if not isinstance(values, dict):
        raise _wrong(source, f"{where}: expected an object, got {type(values).__name__}")
    # cls is one of ours, all dataclasses
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields and not (cls is PolicyFile and name == "mac"):
            close = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise _wrong(source, f"{where}: unknown key {name!r}{hint}")
    absent = [name for name, field in fields.items() if name not in values and field.default is dataclasses.MISSING]
    if absent:
        raise _wrong(source, f"{where}: missing {', '.join(absent)}")
    for name, value in values.items():
        good, kind = _TYPES.get(str(fields[name].type), (lambda _: True, ""))
        if not good(value):
            raise _wrong(source, f"{where}: {name}={value!r} must be {kind}")
    return cls(**values)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_range(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_int, value)) and 1 <= value[0] <= value[1]


def _is_words(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(x, str) for pair in value.items() for x in pair)


# by annotation; what is not listed was built, and so checked, before
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (_is_int, "an integer"),
    "float": (_is_number, "a finite number"),
    "str": (lambda value: isinstance(value, str), "a string"),
    "tuple[int, int]": (_is_range, "two integers, 1 <= low <= high"),
    "Mapping[str, str]": (_is_words, "an object of strings"),
    "Coverage": (lambda value: isinstance(value, Coverage), "an object with batch and context"),
    "tuple[Bucket, ...]": (lambda value: isinstance(value, tuple), "a list of buckets"),
}


_CHOICES = {"cluster_size": (0, 1, 2, 4, 8), "front_warps": (4, 8)}


def launch_problems(launch: LaunchParams) -> list[str]:
    """What is wrong with launch parameters on any GPU; empty if nothing is."""
    values = dataclasses.asdict(launch)
    powers = {name for name in values if name.startswith("block_") or name.endswith(("_warps", "splits"))}
    problems = []
    for name, value in values.items():
        if name in _CHOICES:
            if not _is_int(value) or value not in _CHOICES[name]:
                problems.append(f"{name}={value!r} must be one of {', '.join(map(str, _CHOICES[name]))}")
        elif not _is_int(value) or value < 1:
            problems.append(f"{name}={value!r} must be an integer >= 1")
        elif name in powers and value & (value - 1):
            problems.append(f"{name}={value} must be a power of two")
        elif name.endswith("_warps") and value > 32:
            problems.append(f"{name}={value} must be <= 32")
    return problems


def _wrong(source: str, what: str) -> ConfigError:
    fix = "delete it to use the defaults, or write it again with `mac-kernels tune`"
    return ConfigError(f"{source}: {what}; {fix}")
