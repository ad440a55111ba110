"""``mac-kernels tca tune``: the block, window and mass target that read least of a context at a given KL."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mac_kernels.places import user_config_dir

from .output import JsonOption, out, print_json
from .progress import stages
from .tca_model import LONGEST, Loaded, checked, config_of

if TYPE_CHECKING:
    from mac_autotune.tune_tca import Tried
    from mac_kernels.tca import TcaBudgets, TcaConfig

_BLOCK, _TARGET = 128, 0.98
"""Of trial 0."""


def tune(
    *,
    model: Annotated[
        str | None, typer.Option(help="Model folder, .gguf file or hub id; default SmolLM2-135M-Instruct.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    kl: Annotated[float, typer.Option(min=0.0, help="Nats that decoding may differ from full attention.")] = 0.004,
    context: Annotated[
        int | None, typer.Option(min=4096, help="Tokens at which the share that is read counts; default: the model's.")
    ] = None,
    names: Annotated[str, typer.Option("--texts", help="Of docs, code; separated by commas.")] = "docs,code",
    tokens: Annotated[
        int | None, typer.Option(min=1024, help="Tokens that calibration reads; default: the context, at most 32768.")
    ] = None,
    steps: Annotated[int, typer.Option(min=8, help="Decode steps recorded per text.")] = 96,
    layers: Annotated[int, typer.Option(min=1, help="Layers recorded, evenly spread.")] = 6,
    trials: Annotated[int, typer.Option(min=1, help="Finished trials in all, earlier ones included.")] = 60,
    timeout: Annotated[float | None, typer.Option(min=1.0, help="Seconds after which no trial is begun.")] = None,
    storage: Annotated[str | None, typer.Option(help="Journal file or database URL; default: the cache.")] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study.")] = None,
    top: Annotated[int, typer.Option(min=2, help="Trials that are confirmed at once in a closed loop.")] = 6,
    confirm_tokens: Annotated[int, typer.Option(min=16, help="Tokens decoded per text to confirm.")] = 256,
    sinks: Annotated[int, typer.Option(help="First tokens that are always kept.")] = 4,
    rule: Annotated[str, typer.Option(help="literal (as published) or ours.")] = "ours",
    output: Annotated[Path | None, typer.Option(help="Folder of the file; default: the user's config folder.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Find block, local window and mass target: what reads least of the context at a KL to full attention.

    Writes the budgets for them, as calibrate does; run the same command again to go on with the study.
    """
    chosen = checked(names, device, "optuna")
    from mac_autotune import calibrate_tca
    from mac_autotune.quality.suites import Bench
    from mac_autotune.study import StudyPlan
    from mac_autotune.tca_objective import windows
    from mac_autotune.tune_tca import Calibrations, TcaTask, tune_tca

    with stages() as display:
        loaded = Loaded.of(model, device)
        size = loaded.context if context is None else context
        window = calibrate_tca.default_window(size, _BLOCK)
        base = config_of(block=_BLOCK, local_window=window, sinks=sinks, rule=rule, mass_target=_TARGET)
        task = TcaTask(
            name=loaded.key.short_name,
            base=base,
            kl=kl,
            context=size,
            names=tuple(chosen),
            prompt_tokens=min(4 * windows(size)[-1], size // 2),
            tokens=steps,
            layers=layers,
            top=top,
            confirm_tokens=confirm_tokens,
            plan=StudyPlan(name=study or "", storage=storage, trials=trials, timeout_s=timeout),
        )
        read = loaded.passages(chosen, min(size, LONGEST) if tokens is None else tokens, 1)

        def measured(config: TcaConfig) -> TcaBudgets:
            what = f"calibrating block {config.block}, window {config.local_window}"
            found = calibrate_tca.calibrate(
                loaded.net, read, config=config, progress=lambda done, total: display(what, done, total)
            )
            return loaded.budgets(config, "row", found["row"], chosen, read)

        calibrated = Calibrations(measured)
        bench = Bench(loaded.net, loaded.tokenizer, display)
        best, tried = tune_tca(task, bench, calibrated, lambda line: typer.echo(line, err=True))
    budgets = dataclasses.replace(calibrated(best.config), config=best.config)
    path = (user_config_dir() if output is None else output) / budgets.file_name
    budgets.save(path)
    rows = [{**_row(one), "chosen": one == best} for one in tried]
    if as_json:
        print_json({"path": str(path), "context": size, "confirmed": rows})
        return
    table = Table(*rows[0], title=f"confirmed in a closed loop; kv_read at {size} tokens")
    for row in rows:
        table.add_row(*map(str, row.values()))
    out().print(table)
    out().print(f"written: {path}", soft_wrap=True, highlight=False)


def _row(one: Tried) -> dict[str, Any]:
    config = {name: getattr(one.config, name) for name in ("block", "local_window", "mass_target")}
    kl = {"kl": one.kl.value, "kl_low": one.kl.low, "kl_high": one.kl.high}
    return {
        "trial": one.trial,
        **config,
        "kv_read": round(one.share, 4),
        **{name: round(value, 6) for name, value in kl.items()},
    }
