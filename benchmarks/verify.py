"""Time a suite only if the backend is right: ``python -m benchmarks.verify decode``.

Runs the conformance tests of the chosen backends on this GPU first; if one fails, nothing is timed and no speedup is
printed. Takes the arguments of :mod:`benchmarks.run`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from .mac_tca import MissCase
from .run import main as run
from .run import missing, parse


def kits(args: argparse.Namespace) -> list[str]:
    """The test files that judge what is going to be timed."""
    names = [f"{name}_conformance" for name in (args.backends.split(",") if args.suite == "decode" else ["triton"])]
    if args.suite == "tca":
        misses = any(isinstance(case, MissCase) for case in args.cases)  # steps of MAC
        names = ["tca", *(["tca_index", *names] if misses else [])]
    return [f"tests/kernels/test_{name}.py" for name in names]


def main(argv: list[str] | None = None) -> int:
    """0 if the tests pass and every timed result is right, 2 where they would be skipped."""
    args = parse(argv)
    if lack := missing():
        print(lack, file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", "auto", *kits(args)]
    if subprocess.run(command, check=False).returncode:
        print("the conformance tests are red: nothing is timed", file=sys.stderr)
        return 1
    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
