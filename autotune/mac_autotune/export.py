"""Write a study's winner where serving finds it, after measuring it again beside the default; refuse if no gain."""

from __future__ import annotations

import datetime
import importlib.metadata
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import optuna
from numpy.typing import NDArray

from mac_kernels import MacConfig, __version__
from mac_kernels.launch import LaunchParams
from mac_kernels.testing.timing import Timing
from mac_kernels.tuned import (
    Bucket,
    Coverage,
    KernelFile,
    KernelKey,
    ModelKey,
    PolicyFile,
    Provenance,
    Score,
    save,
)

from .errors import ExportRefused

if TYPE_CHECKING:  # what confirms a policy imports transformers, which a kernel's study does not need
    from .confirm import Confirmed
    from .quality.metrics import Estimate

PRESET = "preset"
"""Name of the preset among the policies that are confirmed."""
COVERED = 1.5
"""How far beyond the measured batch sizes and contexts a file speaks, as a factor."""
SLOWER = 1.02
"""No hit rate may get slower than the default by more than this factor."""
_PACKAGES = ("torch", "triton", "transformers", "optuna")


class Times(Protocol):
    """Times launch parameters in turn at one hit rate (:meth:`mac_autotune.kernel.Bench.time`)."""

    def __call__(self, launches: Mapping[str, LaunchParams], hit: float, *, repeats: int) -> Mapping[str, Timing]:
        """See there."""
        ...


@dataclass(frozen=True, slots=True)
class Rated:
    """Launch parameters measured beside the default.

    ``latency`` in us and ``ratios`` to the default by hit rate; ``ratio``: their geometric mean. Those have the range
    over the rounds as their interval.
    """

    launch: LaunchParams
    trial: int
    latency: Mapping[str, Score]
    ratios: Mapping[str, Score]
    ratio: Score

    @property
    def keeps(self) -> bool:
        """Whether no hit rate got slower beyond the limit."""
        return all(one.value <= SLOWER for one in self.ratios.values())

    @property
    def better(self) -> bool:
        """Faster in every round (by chance alone: less than 1 % of seven), and no hit rate got slower."""
        return self.ratio.high < 1 and self.keeps


def rate(
    time: Times,
    default: LaunchParams,
    candidates: Mapping[int, LaunchParams],
    hit_rates: Sequence[float],
    *,
    rounds: int = 7,
    repeats: int = 10,
) -> tuple[Rated, list[Rated]]:
    """Measure candidates (by trial number) and the default in turn, several rounds; default first, then best first."""
    launches = {"default": default, **{str(number): launch for number, launch in candidates.items()}}
    samples: dict[str, dict[float, list[Timing]]] = {name: {hit: [] for hit in hit_rates} for name in launches}
    for _ in range(rounds):
        for hit in hit_rates:
            for name, timing in time(launches, hit, repeats=repeats).items():
                samples[name][hit].append(timing)
    rated = [
        _rated(name, launch, samples[name], samples["default"], 0 if name == "default" else int(name))
        for name, launch in launches.items()
    ]
    return rated[0], sorted(rated[1:], key=lambda one: one.ratio.value)


def _rated(
    name: str,
    launch: LaunchParams,
    own: Mapping[float, Sequence[Timing]],
    base: Mapping[float, Sequence[Timing]],
    trial: int,
) -> Rated:
    latency = {
        f"{hit:g}": Score(
            value=statistics.median(t.p50_us for t in timings),
            low=statistics.median(t.p20_us for t in timings),
            high=statistics.median(t.p80_us for t in timings),
            unit="us",
            n=sum(t.n for t in timings),
        )
        for hit, timings in own.items()
    }
    logs = np.array([[np.log(a.p50_us / b.p50_us) for a, b in zip(own[hit], base[hit], strict=True)] for hit in own])
    ratios = {f"{hit:g}": _ratio(rounds, float(np.median(rounds))) for hit, rounds in zip(own, logs, strict=True)}
    return Rated(launch, trial, latency, ratios, _ratio(logs.mean(0), float(logs.mean())))


def _ratio(rounds: NDArray[np.float64], value: float) -> Score:
    """The ratio whose logarithm is ``value``, and its range over the rounds."""
    low, value, high = (float(np.exp(log)) for log in (rounds.min(), value, rounds.max()))
    return Score(value=value, low=low, high=high, unit="of the default", n=len(rounds))


def pick(rated: Sequence[Rated]) -> list[Rated]:
    """What of candidates, best first, to measure once more: the fastest that is better, or else the fastest."""
    return [next((one for one in rated if one.better), rated[0])] if rated else []


def bucket_of(batch: int, context: int, default: Rated, candidates: Sequence[Rated]) -> Bucket:
    """The bucket of a file: the best candidate that is better than the default, or the default."""
    winner = next((one for one in candidates if one.better), default)
    return Bucket(
        batch=batch,
        context=context,
        trial=winner.trial,
        launch=None if winner is default else winner.launch,
        ratio=winner.ratio,
        latency=winner.latency,
    )


def kernel_file(
    key: KernelKey, buckets: Sequence[Bucket], *, window: int, band: int, provenance: Provenance
) -> KernelFile:
    """Put buckets together."""
    return KernelFile(
        key=key,
        coverage=covered([b.batch for b in buckets], [b.context for b in buckets]),
        window=window,
        band=band,
        buckets=tuple(sorted(buckets, key=lambda b: (b.batch, b.context))),
        provenance=provenance,
    )


def with_gain(file: KernelFile) -> KernelFile:
    """The file itself.

    Raises
    ------
    ExportRefused
        If the default won in every bucket.
    """
    if all(bucket.launch is None for bucket in file.buckets):
        raise ExportRefused(
            f"nothing is faster than the default launch parameters beyond the noise on {file.key.gpu} in "
            f"{len(file.buckets)} buckets; nothing was written. More --trials may find something"
        )
    return file


def policy_file(
    key: ModelKey,
    preset: str,
    configs: Mapping[str, MacConfig],
    confirmed: Mapping[str, Confirmed],
    *,
    coverage: Coverage,
    provenance: Callable[[int], Provenance],
) -> PolicyFile:
    """The fastest confirmed policy that keeps the limits; ``configs`` and ``confirmed`` by trial number as a string.

    Raises
    ------
    ExportRefused
        If none keeps the limits and is faster than the preset beyond the noise; the message has every reason.
    """
    ranked = sorted(configs, key=lambda name: confirmed[name].ratio.value)
    winner = next((name for name in ranked if not confirmed[name].broken and confirmed[name].ratio.high < 1), None)
    if winner is None:
        reasons = "; ".join(f"trial {name}: {_why_not(confirmed[name])}" for name in ranked) or "no trial kept them"
        raise ExportRefused(
            f"no trial is faster than preset {preset} and keeps its limits: {reasons}. Nothing was written"
        )
    chosen = confirmed[winner]
    scores = {"latency_ratio": _score(chosen.ratio, "of the preset"), **_scores(chosen)}
    scores |= {f"preset_{name}": score for name, score in _scores(confirmed[PRESET]).items()}
    return PolicyFile(
        key=key,
        coverage=coverage,
        preset=preset,
        config=configs[winner],
        scores=scores,
        provenance=provenance(int(winner)),
    )


def covered(batches: Sequence[int], contexts: Sequence[int]) -> Coverage:
    """What buckets speak for: their range, and a factor :data:`COVERED` around it."""
    ranges = [(max(1, int(min(values) / COVERED)), int(max(values) * COVERED)) for values in (batches, contexts)]
    return Coverage(batch=ranges[0], context=ranges[1])


def provenance(*, gpu: str, study: str, trial: int, basis: str, command: str) -> Provenance:
    """Facts about this machine and study."""
    return Provenance(
        gpu=gpu,
        driver=_driver(),
        versions={"mac-kernels": __version__, **{name: _version(name) for name in _PACKAGES}},
        study=study,
        trial=trial,
        basis=basis,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        command=command,
    )


def write(file: KernelFile | PolicyFile, folder: Path) -> Path:
    """Write a file for serving to find."""
    return save(file, folder)


def remember(study: optuna.Study, confirmed: Mapping[str, Confirmed]) -> None:
    """Keep what was confirmed with the study, for the report."""
    for name, one in confirmed.items():
        values = {metric: found.value for metric, found in one.metrics.items()}
        record = {"ratio": one.ratio.value, "metrics": values, "broken": list(one.broken.values())}
        study.set_user_attr(f"confirmed {name}", record)


def _why_not(one: Confirmed) -> str:
    if one.broken:
        return ", ".join(one.broken.values())
    return f"latency ratio {one.ratio.value:.3f} [{one.ratio.low:.3f}, {one.ratio.high:.3f}] is not below 1"


def _scores(one: Confirmed) -> dict[str, Score]:
    units = {"kl": "nats", "kl_median": "nats", "kl_p99": "nats"}
    return {name: _score(found, units.get(name, "share")) for name, found in one.metrics.items()}


def _score(found: Estimate, unit: str) -> Score:
    return Score(value=found.value, low=found.low, high=found.high, unit=unit, n=found.n)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "none"
