"""Measure SGLang servers on this GPU: ``python -m benchmarks.sglang latency`` and ``... smollm2``.

``latency``: tokens per second and time to first token at long contexts, dummy weights, hits forced. ``smollm2``: real
weights: agreement with the baseline, hit rates and speed of the presets. ``matrix``: every kind of server once.
``tca``: TCA-Attention beside the baseline, dummy weights, budgets set.

The tensor-parallel table: ``... latency --shape llama-70b --tp 4 --batches 1,8,32 --own 512 --short 0``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mac_kernels.errors import MacError

from . import results, sglang_latency, sglang_matrix, sglang_smollm2, sglang_tca

SUITES = {"latency": sglang_latency, "smollm2": sglang_smollm2, "matrix": sglang_matrix, "tca": sglang_tca}


def main(argv: list[str] | None = None) -> int:
    """Run one suite; 0 if all results were right, 1 if one was wrong, 2 if a server or the input failed."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sglang", description=__doc__)
    chosen = parser.add_subparsers(dest="suite", required=True)
    for name, suite in SUITES.items():
        one = chosen.add_parser(name, description=suite.__doc__)
        suite.add_arguments(one)
        add_server_arguments(one)
    args = parser.parse_args(arguments)
    args.command_line = command_line("benchmarks.sglang", arguments)
    output = args.output or results.folder() / SUITES[args.suite].table(args)
    try:
        return asyncio.run(SUITES[args.suite].run(args, output))
    except MacError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what every benchmark of a server needs."""
    parser.add_argument("--baseline", default="flashinfer", help="attention backend that MAC is compared with")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--server-args", type=shlex.split, default=(), help="more, for every server, in quotes")
    parser.add_argument("--serving", type=json.loads, default={}, help="section `serving` of MAC's config, as JSON")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()) / "mac-kernels", help="of the servers")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<gpu>/sglang.csv, or sglang_tp.csv")


def command_line(module: str, arguments: Sequence[str]) -> str:
    """The command for the table, without the places of this machine."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--output", "--logs", "--model", "--text"):
        parser.add_argument(name)
    return f"python -m {module} {shlex.join(parser.parse_known_args(arguments)[1])}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
