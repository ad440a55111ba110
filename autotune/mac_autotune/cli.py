"""``mac-kernels tune`` (also ``mac-autotune``): launch parameters for a GPU, a policy for a model."""

from __future__ import annotations

import enum
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mac_kernels import ConfigError, InputError, MissingError

from .command import command_line

tune_command = typer.Typer(no_args_is_help=True, help="Tune launch parameters for a GPU, or a policy for a model.")

PRESETS = "careful, balanced, fast"
TrialsOption = Annotated[
    int, typer.Option(min=1, help="Finished trials the study shall have in all, earlier ones included.")
]
TimeoutOption = Annotated[float | None, typer.Option(min=1.0, help="Seconds after which no trial is begun.")]
StorageOption = Annotated[
    str | None, typer.Option(help="Journal file, or URL of a database for many machines; default: the cache folder.")
]
StudyOption = Annotated[str | None, typer.Option(help="Name of the study; default: from what is tuned.")]
SeedOption = Annotated[int, typer.Option(help="Of sampler and planted inputs.")]
OutputOption = Annotated[Path | None, typer.Option(help="Folder of the tuned file; default: the user's config folder.")]
DryOption = Annotated[bool, typer.Option("--dry-run", help="Print the plan and a time estimate, and do nothing.")]
ExportOption = Annotated[
    bool, typer.Option("--export/--no-export", help="Measure the best again and write the file; off for extra workers.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


class Sampler(enum.StrEnum):
    """How points are drawn."""

    TPE = "tpe"
    RANDOM = "random"
    NSGA2 = "nsga2"


class Mode(enum.StrEnum):
    """One objective under constraints, or the front of two."""

    SINGLE = "single"
    PARETO = "pareto"


@tune_command.command()
def kernel(
    *,
    hq: Annotated[int, typer.Option(min=1, help="Query heads of one tensor-parallel rank.")],
    hkv: Annotated[int, typer.Option(min=1, help="Key/value heads of one rank.")],
    head_dim: Annotated[int, typer.Option(min=2, help="Head dimension.")],
    dtype: Annotated[str, typer.Option(help="Of the KV cache: bfloat16 or float16.")] = "bfloat16",
    page_size: Annotated[int, typer.Option(min=1, help="Tokens per page; 1 for SGLang and transformers.")] = 1,
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,16,64",
    contexts: Annotated[str, typer.Option(help="Contexts in tokens, separated by commas.")] = "32768,126976",
    cache_gb: Annotated[float, typer.Option(min=0.001, help="Leave out what needs a larger KV cache than this.")] = 9.0,
    trials: TrialsOption = 64,
    timeout: TimeoutOption = None,
    storage: StorageOption = None,
    study: StudyOption = None,
    sampler: Annotated[Sampler, typer.Option(help="tpe, or random as a baseline.")] = Sampler.TPE,
    seed: SeedOption = 0,
    export: ExportOption = True,
    output: OutputOption = None,
    dry_run: DryOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find launch parameters on this GPU, for every batch size and context, beside the defaults.

    Run the same command again to go on with it, or at the same time for a second worker.

    Example: mac-kernels tune kernel --hq 32 --hkv 8 --head-dim 128 --timeout 600
    """
    _need_optuna()
    import torch

    from mac_kernels import HeadLayout

    from . import tune_kernel
    from .study import StudyPlan

    types = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in types:
        raise InputError(f"--dtype {dtype} must be one of {', '.join(types)}")
    task = tune_kernel.KernelTask(
        layout=HeadLayout(hq, hkv, head_dim),
        dtype=types[dtype],
        page_size=page_size,
        batches=_numbers("--batches", batches),
        contexts=_numbers("--contexts", contexts),
        cache_gb=cache_gb,
        plan=StudyPlan(
            name=study or "", storage=storage, trials=trials, timeout_s=timeout, sampler=sampler.value, seed=seed
        ),
        command=command_line("tune"),
    )
    if dry_run:
        steps = [f"{len(task.problems())} studies of {trials} trials: {', '.join(map(str, task.problems()))}"]
        _print_plan(steps, tune_kernel.estimate_s(task), as_json)
        return
    file = tune_kernel.tune_kernel(task, _say, export=export)
    _finish(file, output, as_json)


@tune_command.command()
def policy(
    *,
    model: Annotated[str | None, typer.Option(help="Model folder, .gguf file or hub id.")] = None,
    preset: Annotated[str, typer.Option(help=f"Trial 0, and whose quality limits to keep: {PRESETS}.")] = "careful",
    gpu: Annotated[str, typer.Option(help="GPU to be fast on.")] = "NVIDIA H100 80GB HBM3",
    timings: Annotated[
        Path | None, typer.Option(help="Benchmark table of that GPU; default: its tuned kernel file, else an estimate.")
    ] = None,
    names: Annotated[str, typer.Option("--texts", help="Texts to record: docs, code.")] = "docs,code",
    prompt_tokens: Annotated[int, typer.Option(min=2560, help="Tokens read before the recorded steps.")] = 3000,
    tokens: Annotated[int, typer.Option(min=8, help="Recorded steps of every text.")] = 160,
    layers: Annotated[int, typer.Option(min=1, help="Layers recorded, evenly spread.")] = 6,
    batches: Annotated[str, typer.Option(help="Batch sizes of the estimate.")] = "1,16,64",
    contexts: Annotated[str, typer.Option(help="Contexts of the estimate.")] = "32768,126976",
    trials: TrialsOption = 100,
    timeout: TimeoutOption = None,
    storage: StorageOption = None,
    study: StudyOption = None,
    mode: Annotated[
        Mode, typer.Option(help="single: fastest under the limits; pareto: latency against divergence.")
    ] = (Mode.SINGLE),
    sampler: Annotated[Sampler, typer.Option(help="tpe, random, or nsga2 (pareto).")] = Sampler.TPE,
    seed: SeedOption = 0,
    export: ExportOption = True,
    top: Annotated[int, typer.Option(min=1, help="Trials that are confirmed in a closed loop.")] = 4,
    confirm_tokens: Annotated[int, typer.Option(min=64, help="Tokens decoded per text to confirm.")] = 512,
    needles: Annotated[int, typer.Option(min=0, help="Needle trials per task to confirm.")] = 10,
    output: OutputOption = None,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu or cuda.")] = "cpu",
    dry_run: DryOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find window, band, threshold and the rest for a model, as fast as the preset's quality limits allow.

    Run the same command again to go on with it, or at the same time for a second worker.

    Example: mac-kernels tune policy --model HuggingFaceTB/SmolLM2-135M-Instruct --trials 60
    """
    _need_optuna()
    from . import tune_policy
    from .confirm import Effort
    from .limits import LIMITS
    from .study import StudyPlan

    if preset not in LIMITS:
        raise ConfigError(f"--preset {preset} has no quality limits to tune under; choose one of {', '.join(LIMITS)}")
    chosen: Any = tuple(name for name in ("docs", "code") if name in names.split(","))
    if len(chosen) != len(names.split(",")):
        raise InputError(f"--texts {names!r} must be some of docs, code, each once")
    task = tune_policy.PolicyTask(
        model=model,
        preset=preset,
        gpu=gpu,
        timings=timings,
        names=chosen,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        layers=layers,
        batches=_numbers("--batches", batches),
        contexts=_numbers("--contexts", contexts),
        plan=StudyPlan(
            name=study or "",
            storage=storage,
            trials=trials,
            timeout_s=timeout,
            mode=mode.value,
            sampler=sampler.value,
            seed=seed,
        ),
        effort=Effort(
            names=chosen, prompt_tokens=max(prompt_tokens, 2560), tokens=confirm_tokens, needle_trials=needles
        ),
        top=top,
        device=device,
        command=command_line("tune"),
    )
    if dry_run:
        steps = [f"record {len(chosen)} texts, replay {trials} trials, confirm {top} and the preset in a closed loop"]
        _print_plan(steps, tune_policy.estimate_s(task), as_json)
        return
    _finish(tune_policy.tune_policy(task, _say, export=export), output, as_json)


@tune_command.command()
def show(
    study: Annotated[str | None, typer.Argument()] = None, storage: StorageOption = None, as_json: JsonOption = False
) -> None:
    """List the studies, or show the best trials of one.

    Example: mac-kernels tune show
    """
    _need_optuna()
    from . import show as shown

    shown.show(study, storage, as_json)


@tune_command.command()
def report(
    study: Annotated[str, typer.Argument(help="Name of the study, see `tune show`.")],
    storage: StorageOption = None,
    output: Annotated[Path, typer.Option(help="Folder for index.html and the figures.")] = Path("tune-report"),
) -> None:
    """Write a static page: history, parameter importance, Pareto front, best trials.

    Example: mac-kernels tune report policy/SmolLM2-135M-Instruct/careful --output report
    """
    _need_optuna()
    from . import show as shown
    from .report import write_report

    loaded, location = shown.find_study(study, storage)
    for path in write_report(loaded, output, shown.dashboard_line(location)):
        print(path)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        values = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        values = ()
    if not values or values[0] < 1:
        raise InputError(f"{option} {text!r} must be whole numbers >= 1 separated by commas, e.g. 1,16,64")
    return values


def _need_optuna() -> None:
    try:
        import optuna  # noqa: F401  # only whether it is there
    except ImportError:
        raise MissingError('tune needs optuna; install it with: pip install "mac-kernels[tune,demo]"') from None


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _print_plan(steps: list[str], seconds: float, as_json: bool) -> None:
    from .progress import clock

    if as_json:
        print(json.dumps({"steps": steps, "estimate_s": round(seconds)}, indent=2))
        return
    for step in steps:
        print(step)
    print(f"about {clock(seconds)}; nothing was done")


def _finish(file: Any, output: Path | None, as_json: bool) -> None:
    """Write the file, say what it holds and how serving finds it."""
    if file is None:
        _say("trials done; run the same command without --no-export to write the file")
        return
    from mac_kernels.places import user_config_dir
    from mac_kernels.tuned import to_json

    from .export import write

    path = write(file, user_config_dir() if output is None else output)
    if as_json:
        print(to_json(file), end="")
    found = "found by itself from now on" if output is None else f"used with MAC_KERNELS_CONFIG={output}"
    _say(f"wrote {path}: {found}")
