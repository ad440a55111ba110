"""Measure a suite on this GPU and write its table: ``python -m benchmarks.run decode``."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from pathlib import Path

import torch

from mac_kernels import MacConfig
from mac_kernels.testing.scenario import random_store

from . import fill, results, tca
from .decode import BYPASSED, Measured, WrongResultError, run_case
from .registry import DECODE, DecodeCase


def main(argv: list[str] | None = None) -> int:
    """Run the chosen cases; 0 if all results were right, 1 if one was wrong, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=["decode", "fill", "tca"])
    parser.add_argument("--only", default="", help="run the cases in whose name this pattern is found, e.g. G8-B64")
    parser.add_argument("--preset", default="careful")
    parser.add_argument("--no-correction", action="store_true", help="the preset without its correction")
    parser.add_argument("--backends", default="triton", help="MAC backends to time together, e.g. triton,flashinfer")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<gpu>/<suite>.csv")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: timings are only taken on a GPU", file=sys.stderr)
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
        return fill.run(
            [case for case in fill.FILL if re.search(args.only, str(case))], config, path, facts, args.repeats
        )
    if args.suite == "tca":
        return tca.run([case for case in tca.TCA if re.search(args.only, str(case))], path, facts, args.repeats)
    wrong = 0
    cases = [case for case in DECODE if re.search(args.only, str(case))]
    for (layout, batch, context), group in itertools.groupby(cases, lambda c: (c.layout, c.batch, c.context)):
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
    full = measured.latency["flashinfer-tc"].p50_us
    figures = f"flashinfer-tc {full:8.1f}"
    for name, timing in measured.latency.items():
        if name != "flashinfer-tc":
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
    rows = []
    for backend, timing in measured.latency.items():
        full = backend == "flashinfer-tc"
        searching = backend.removesuffix(BYPASSED)
        who = {"provider": backend if full else "mac", "backend": "fa2" if full else searching, "n": timing.n}
        who["config"] = "full" if full else name + backend.removeprefix(searching)
        kv_bytes = measured.full_bytes if full else measured.mac_bytes
        quantiles = (timing.p20_us, timing.p50_us, timing.p80_us)
        rows.append({**common, **who, "metric": "latency", "unit": "us", **_three(quantiles)})
        # bandwidth counts keys and values alone, so ring traffic does not flatter
        speeds = [kv_bytes / us / 1e6 for us in reversed(quantiles)]
        rows.append({**common, **who, "metric": "bandwidth", "unit": "TB/s", **_three(speeds)})
    return [{name: str(value) for name, value in row.items()} for row in rows]


def _three(values: tuple[float, float, float] | list[float]) -> dict[str, str]:
    return dict(zip(("p20", "p50", "p80"), (f"{value:.4g}" for value in values), strict=True))


if __name__ == "__main__":
    sys.exit(main())
