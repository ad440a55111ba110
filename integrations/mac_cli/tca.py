"""``mac-kernels tca``: budgets of a model's heads for TCA-Attention, and the block, window and target to use."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mac_kernels import InputError
from mac_kernels.places import user_config_dir

from .output import JsonOption, out, print_json
from .progress import stages
from .tca_model import LONGEST, Loaded, checked, config_of
from .tca_tune import tune

if TYPE_CHECKING:
    from mac_kernels.tca import TcaBudgets
    from mac_kernels.tca.budgets import RetainedMass
    from mac_kernels.tca.calibrate import Measure

tca_app = typer.Typer(help="TCA-Attention: budgets of a model's heads.", no_args_is_help=True)

tca_app.command("tune", epilog="Example: mac-kernels tca tune --model ./my-model --kl .004")(tune)

_TARGETS = (0.98, 0.95, 0.9, 0.3)


@tca_app.command("calibrate", epilog="Example: mac-kernels tca calibrate --model ./my-model")
def calibrate(
    *,
    model: Annotated[
        str | None, typer.Option(help="Model folder, .gguf file or hub id; default SmolLM2-135M-Instruct.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    names: Annotated[str, typer.Option("--texts", help="Of docs, code; separated by commas.")] = "docs,code",
    passages: Annotated[int, typer.Option(min=1, help="Passages per text.")] = 1,
    tokens: Annotated[
        int | None, typer.Option(min=64, help="Tokens of a passage; default: the model's context, at most 32768.")
    ] = None,
    local_window: Annotated[
        int | None, typer.Option(help="Default: 4096, at most a sixteenth of the model's context.")
    ] = None,
    block: Annotated[int, typer.Option(help="Tokens of a block, a power of two.")] = 128,
    sinks: Annotated[int, typer.Option(help="First tokens that are always kept.")] = 4,
    rule: Annotated[str, typer.Option(help="literal (as published) or ours.")] = "ours",
    alpha: Annotated[float, typer.Option(help="Weight of redundancy in the rule literal.")] = 0.5,
    measure: Annotated[str, typer.Option(help="What mass_target is compared with: raw, norm or row.")] = "row",
    output: Annotated[Path | None, typer.Option(help="Folder of the file; default: the user's config folder.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what every head needs to keep, once per model, and write it for TCA to find."""
    chosen = checked(names, device)
    from mac_autotune import calibrate_tca
    from mac_kernels.tca.calibrate import MEASURES

    kind: Measure | None = next((known for known in MEASURES if known == measure), None)
    if kind is None:
        raise InputError(f"--measure {measure!r} must be one of {', '.join(MEASURES)}")
    with stages() as display:
        loaded = Loaded.of(model, device)
        window = calibrate_tca.default_window(loaded.context, block) if local_window is None else local_window
        config = config_of(block=block, local_window=window, sinks=sinks, rule=rule, alpha=alpha)
        length = min(loaded.context, LONGEST) if tokens is None else tokens
        texts = loaded.passages(chosen, length, passages)
        found = calibrate_tca.calibrate(
            loaded.net, texts, config=config, progress=lambda done, total: display("layers read", done, total)
        )
    budgets = loaded.budgets(config, kind, found[kind], chosen, texts)
    path = (user_config_dir() if output is None else output) / budgets.file_name
    budgets.save(path)
    shares = {name: _shares(budgets, name, found[name]) for name in MEASURES}
    if as_json:
        print_json({"path": str(path), "far_share": shares, "choices": budgets.choices(config)})
        return
    _show(budgets, shares, path)


def _shares(budgets: TcaBudgets, measure: Measure, retained: RetainedMass) -> dict[str, float]:
    """Share of the far region kept at some targets under one measure."""
    other = dataclasses.replace(budgets, measure=measure, retained=retained)
    return {
        str(target): round(other.far_share(dataclasses.replace(budgets.config, mass_target=target)), 4)
        for target in _TARGETS
    }


def _show(budgets: TcaBudgets, shares: dict[Measure, dict[str, float]], path: Path) -> None:
    from mac_kernels.tca.candidates import NUM_SPARSE, mean_keep

    table = Table(
        "measure", *(f"kept at {target}" for target in _TARGETS), title="share of the far region, by mass_target"
    )
    for measure, by_target in shares.items():
        table.add_row(measure, *(f"{share:.1%}" for share in by_target.values()))
    out().print(table)
    block = budgets.config.block
    lines = Table(
        "layer", "far region kept by each kv head", title=f"{budgets.measure}, mass_target {budgets.config.mass_target}"
    )
    for layer, heads in enumerate(budgets.choices(budgets.config)):
        words = ["dense" if one == NUM_SPARSE else f"{mean_keep(one, block) / block:.1%}" for one in heads]
        lines.add_row(str(layer), "  ".join(words))
    out().print(lines)
    out().print(f"written: {path}", soft_wrap=True, highlight=False)
