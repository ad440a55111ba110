"""Time a suite only if the backend is right: ``python -m benchmarks.verify decode``.

Runs the backend's conformance tests on this GPU first; if one fails, nothing is timed and no speedup is printed.
"""

from __future__ import annotations

import subprocess
import sys

from .run import main as run


def main() -> int:
    """0 if the tests pass and every timed result is right."""
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels"], check=False)
    if tests.returncode:
        print("the conformance tests are red: nothing is timed", file=sys.stderr)
        return 1
    return run()


if __name__ == "__main__":
    sys.exit(main())
