"""``doctor --sglang`` where SGLang is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sglang_cpu", exc_type=ImportError)  # its work-arounds come before SGLang's imports

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


def test_every_step_takes_effect() -> None:
    code = "import sglang_cpu; from mac_cli.app import main; main(['doctor', '--sglang', '--json'])"
    done = subprocess.run(  # a process of its own, because the hooks stay
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout, done.stderr[-4000:]
    steps = json.loads(done.stdout[done.stdout.index("{") :])["sglang"]
    assert len(steps) >= 7 and all(step["works"] for step in steps), steps
    assert done.returncode == 0
