"""``mac-kernels doctor``: what is installed, and which backends work here, proven by a step that they run."""

from __future__ import annotations

import platform
import sys
import warnings
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mac_kernels.errors import ConfigError

from .output import ExitCode, JsonOption, out, print_json

# distribution -> what it is for
PACKAGES = {
    "mac-kernels": "this package",
    "torch": "everything",
    "triton": "GPU kernels",
    "numpy": "everything",
    "flashinfer-python": "extra flashinfer",
    "sglang": "extra sglang",
    "transformers": "extra demo",
    "accelerate": "extra demo",
    "gguf": "extra demo",
    "huggingface_hub": "extra demo",
    "matplotlib": "extra demo",
    "optuna": "extra tune",
}


@dataclass(frozen=True, slots=True)
class BackendReport:
    """Whether one backend works on one device: ``problem`` says why not; ``error`` is the measured deviation."""

    backend: str
    device: str
    works: bool
    problem: str = ""
    max_abs_error: float | None = None


@dataclass(frozen=True, slots=True)
class StepReport:
    """Whether one step of the SGLang plugin takes effect; ``problem`` says why not."""

    step: str
    works: bool
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that ``doctor`` found."""

    python: str
    platform: str
    packages: dict[str, str | None]
    devices: dict[str, str]
    backends: list[BackendReport]
    config_files: list[str]
    problems: list[str]
    sglang: list[StepReport]


SGLangOption = Annotated[bool, typer.Option("--sglang", help="Go through the steps of the SGLang plugin, too.")]


def doctor(sglang: SGLangOption = False, as_json: JsonOption = False) -> None:
    """Show what is installed and which backends work here, and why the others do not.

    Example: mac-kernels doctor --sglang
    """
    diagnosis = diagnose(sglang=sglang)
    if as_json:
        print_json(asdict(diagnosis))
    else:
        _print(diagnosis)
    broken = not all(report.works for report in diagnosis.sglang)
    if diagnosis.problems or broken or not any(report.works for report in diagnosis.backends):
        raise typer.Exit(ExitCode.CHECK_FAILED)


def diagnose(*, sglang: bool = False) -> Diagnosis:
    """Look at this machine; runs one tiny decode step on every backend and device.

    ``sglang`` also imports SGLang and goes through the steps of its plugin.
    """
    from .probe import probe_backends, visible_devices

    files, problems = _config_files()
    devices = visible_devices()
    return Diagnosis(
        python=f"{platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        packages={name: _version(name) for name in PACKAGES},
        devices=devices,
        backends=probe_backends(list(devices)),
        config_files=files,
        problems=problems,
        sglang=_sglang_steps() if sglang else [],
    )


def _sglang_steps() -> list[StepReport]:
    from mac_sglang.doctor import examine

    return [StepReport(step.name, step.done, step.problem) for step in examine()]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _config_files() -> tuple[list[str], list[str]]:
    from mac_kernels.settings import resolve_config

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            files = [str(path) for path in resolve_config().files]
            problems = []
        except ConfigError as error:
            files, problems = [], [str(error)]
    return files, [*(str(warning.message) for warning in caught), *problems]


def _print(diagnosis: Diagnosis) -> None:
    console = out()
    packages = Table("package", "version", "for", title="Installed", title_justify="left")
    for name, version in diagnosis.packages.items():
        packages.add_row(name, version or "not installed", PACKAGES[name])
    console.print(f"Python {diagnosis.python} on {diagnosis.platform}", soft_wrap=True, highlight=False)
    console.print(packages)
    backends = Table("backend", "device", "works", "why", title="Backends", title_justify="left")
    for report in diagnosis.backends:
        why = report.problem or f"one exact step is off plain attention by {report.max_abs_error:.1e}"
        backends.add_row(report.backend, report.device, "yes" if report.works else "no", escape(why))
    console.print(backends)
    if diagnosis.sglang:
        steps = Table("step", "works", "why", title="SGLang plugin", title_justify="left")
        for step in diagnosis.sglang:
            steps.add_row(step.step, "yes" if step.works else "no", escape(step.problem))
        console.print(steps)
    for device, description in diagnosis.devices.items():
        console.print(f"{device}: {description}", soft_wrap=True, highlight=False)
    files = ", ".join(diagnosis.config_files) or "none"
    console.print(f"config files read: {files}", soft_wrap=True, highlight=False)
    for problem in diagnosis.problems:
        console.print(f"[red]problem:[/] {problem}", soft_wrap=True, highlight=False)
