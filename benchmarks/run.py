"""Measure a suite on this GPU and write its table: ``python -m benchmarks.run decode``."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mac_kernels import MacConfig
from mac_kernels.testing.scenario import random_store
from mac_kernels.testing.timing import Timing

from . import fill, mac_tca, results, tca
from .decode import BYPASSED, Measured, WrongResultError, run_case
from .registry import DECODE, DecodeCase

_SUITES: dict[str, Sequence[DecodeCase | fill.FillCase | tca.TcaCase | mac_tca.MissCase]] = {
    "decode": DECODE,
    "fill": fill.FILL,
    "tca": (*tca.TCA, *mac_tca.MISSES),
}
_BASELINE = "flashinfer-tc"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, and as ``cases`` what they choose; exits with 2 if they are wrong or choose nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=list(_SUITES))
    parser.add_argument("--only", default="", help="run the cases in whose name this pattern is found, e.g. G8-B64")
    parser.add_argument("--preset", default="careful")
    parser.add_argument("--no-correction", action="store_true", help="the preset without its correction")
    parser.add_argument("--backends", default="triton", help="MAC backends to time together, e.g. triton,flashinfer")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<gpu>/<suite>.csv")
    args = parser.parse_args(argv)
    args.cases = [case for case in _SUITES[args.suite] if re.search(args.only, str(case))]
    if not args.cases:
        parser.error(f"--only {args.only!r} matches no case of {args.suite}; one is {_SUITES[args.suite][0]}")
    return args


def missing() -> str | None:
    """What this machine lacks to time anything, and what to do."""
    if not torch.cuda.is_available():
        return "no CUDA device: timings are only taken on a GPU"
    if find_spec("flashinfer") is None:
        return "flashinfer-python, beside which everything is timed, is not installed: pip install -e '.[flashinfer]'"
    return None


def main(argv: list[str] | None = None) -> int:
    """Run the chosen cases; 0 if all results were right, 1 if one was wrong, 2 without a GPU or FlashInfer."""
    args = parse(argv)
    if lack := missing():
        print(lack, file=sys.stderr)
        return 2
    path = args.output or results.folder() / f"{args.suite}.csv"
    plain = " --no-correction" if args.no_correction else ""
    facts = results.facts(
        f"python -m benchmarks.run {args.suite} --preset {args.preset}{plain} --backends {args.backends} "
        f"--repeats {args.repeats}"
    )
    config = MacConfig.preset(args.preset, **({"correction": False} if plain else {}))
    name = f"{args.preset} without correction" if plain else args.preset
    print(f"{facts['gpu']}, driver {facts['driver']}, torch {facts['torch']}, triton {facts['triton']}, "
          f"flashinfer {facts['flashinfer']}; us per call, p50")  # fmt: skip
    if args.suite == "fill":
        return fill.run(args.cases, config, path, facts, args.repeats)
    if args.suite == "tca":
        misses = [case for case in args.cases if isinstance(case, mac_tca.MissCase)]
        alone = [case for case in args.cases if isinstance(case, tca.TcaCase)]
        wrong = tca.run(alone, path, facts, args.repeats)
        return mac_tca.run(misses, path, facts, args.repeats) or wrong
    wrong = 0
    for (layout, batch, context), group in itertools.groupby(args.cases, lambda c: (c.layout, c.batch, c.context)):
        store = random_store([context] * batch, layout, page_size=16, dtype=torch.bfloat16, device="cuda")
        for case in group:
            try:
                measured = run_case(
                    case, store, config, seed=1, repeats=args.repeats, backends=args.backends.split(",")
                )
            except WrongResultError as error:
                print(f"{case}: WRONG, not timed: {error}", flush=True)
                wrong += 1
                continue
            _show(case, measured)
            results.upsert(path, _rows(case, measured, config, name, facts))
        del store
        torch.cuda.empty_cache()
    return 1 if wrong else 0


def _show(case: DecodeCase, measured: Measured) -> None:
    full = measured.latency[_BASELINE].p50_us
    figures = f"{_BASELINE} {full:8.1f}"
    for name, timing in measured.latency.items():
        if name != _BASELINE:
            figures += f"  mac-{name} {timing.p50_us:8.1f}  speedup {full / timing.p50_us:6.2f}"
    print(f"{case!s:48} hit {measured.hit_rate:.3f}  {figures}", flush=True)


def _rows(case: DecodeCase, measured: Measured, config: MacConfig, name: str, facts: results.Row) -> list[results.Row]:
    common = {
        "suite": "decode",
        "case": "step",
        "batch": case.batch,
        "context": case.context,
        "hq": case.layout.num_qo_heads,
        "hkv": case.layout.num_kv_heads,
        "head_dim": case.layout.head_dim,
        "dtype": "bfloat16",
        "page_size": case.page_size,
        "window": config.window,
        "band": config.band,
        "lag": case.lag,
        "hit_rate": f"{case.hit_rate:g}",
        "miss_pattern": case.miss_pattern,
        "tp": 1,
        **facts,
    }
    baseline = measured.latency[_BASELINE]
    rows = []
    for provider, timing in measured.latency.items():
        if provider == _BASELINE:
            continue
        backend = provider.removesuffix(BYPASSED)
        label = name + provider.removeprefix(backend)
        ours = {"provider": "mac", "backend": backend, "config": label}
        # a later run with another backend has a baseline of its own: ratios are those of one run
        beside = {"provider": _BASELINE, "backend": "fa2", "config": results.beside(backend, label)}
        rows += _metrics({**common, **ours}, timing, measured.mac_bytes)
        rows += _metrics({**common, **beside}, baseline, measured.full_bytes)
    return rows


def _metrics(who: dict[str, Any], timing: Timing, kv_bytes: int) -> list[results.Row]:
    """Latency, and bandwidth, which counts keys and values alone, so that ring traffic does not flatter."""
    quantiles = (timing.p20_us, timing.p50_us, timing.p80_us)
    speeds = [kv_bytes / us / 1e6 for us in reversed(quantiles)]
    return results.as_text(
        {**who, "n": timing.n, "metric": metric, "unit": unit, **_three(values)}
        for metric, unit, values in (("latency", "us", quantiles), ("bandwidth", "TB/s", speeds))
    )


def _three(values: Sequence[float]) -> dict[str, str]:
    return dict(zip(("p20", "p50", "p80"), (f"{value:.4g}" for value in values), strict=True))


if __name__ == "__main__":
    sys.exit(main())
