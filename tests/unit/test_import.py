"""Importing costs nothing and does nothing: measured in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import mac_kernels

PROBE = """
import json, os, sys, time
before, environ = set(sys.modules), dict(os.environ)
start = time.perf_counter()
import {module}
elapsed = time.perf_counter() - start
print(json.dumps(dict(elapsed=elapsed, modules=sorted(set(sys.modules) - before), same=environ == dict(os.environ))))
"""
# heavy, or with a side effect (a GPU context, a lock file, a patched library)
HEAVY = {"torch", "triton", "numpy", "transformers", "flashinfer", "sglang", "optuna", "matplotlib", "huggingface_hub"}


def import_alone(module: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(module=module)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", ["mac_kernels", "mac_kernels.errors", "mac_kernels.config", "mac_kernels.settings"])
def test_import_brings_the_standard_library_only(module: str) -> None:
    seen = import_alone(module)
    brought = {name.split(".")[0] for name in seen["modules"]}
    assert brought - set(sys.stdlib_module_names) - {"mac_kernels", "__editable___mac_kernels_finder"} == set()
    assert seen["same"], "the environment was changed"


def test_import_of_the_library_is_small_and_fast() -> None:
    seen = import_alone("mac_kernels")
    assert [name for name in seen["modules"] if name.startswith("mac_kernels")] == ["mac_kernels"]
    assert seen["elapsed"] < 0.1


def test_command_starts_without_heavy_modules() -> None:
    seen = import_alone("mac_cli.app")
    assert HEAVY.isdisjoint(name.split(".")[0] for name in seen["modules"])


def test_every_public_name_can_be_had() -> None:
    assert {name for name in mac_kernels.__all__ if getattr(mac_kernels, name) is None} == set()
    assert set(mac_kernels.__all__) == {*mac_kernels._HOME, "__version__"}


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'MacConfg'"):
        mac_kernels.MacConfg  # noqa: B018  # the lookup itself is tested


def test_using_the_library_does_not_start_cuda() -> None:
    code = (
        "import mac_kernels as mk, torch\n"
        "[getattr(mk, name) for name in mk.__all__]\n"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
