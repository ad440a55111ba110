"""``mac-kernels eval``: measure on a real model what reuse costs."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mac_kernels import InputError, MacConfig
from mac_kernels.config import HeadTable
from mac_kernels.files import write_whole

if TYPE_CHECKING:
    from mac_kernels.tca import TcaBudgets

_CALIBRATION_SEED = 3  # the other commands measure passages 0 to 2
_CALIBRATION_TRIAL = 1000  # the needles' own trials begin at 0
DEFAULT_RULES = "careful balanced fast paper newest window:careful window:balanced window:fast"
eval_command = typer.Typer(no_args_is_help=True, help="Measure what reuse costs on a real model.")

ModelOption = Annotated[
    str | None, typer.Option(help="Model folder, .gguf file or hub id; default SmolLM2-135M-Instruct.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda.")]
RulesOption = Annotated[
    str, typer.Option("--configs", help="Rules separated by blanks, e.g. 'careful tau=.6,beta=.15 window:careful'.")
]
ScaleOption = Annotated[
    Path | None, typer.Option("--scale", help="Config file whose influence_scale the rules with scale=on take.")
]
BudgetsOption = Annotated[
    list[Path] | None, typer.Option("--budgets", help="File of `mac-kernels tca calibrate` for the rules tca,...")
]
OutputOption = Annotated[
    Path | None, typer.Option(help="Table to add to; default benchmarks/results/quality/<model>.csv.")
]
TextsOption = Annotated[str, typer.Option("--texts", help="Of docs, code, greedy; separated by commas.")]
PromptOption = Annotated[int, typer.Option("--prompt-tokens", min=64, help="Tokens read before decoding.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
SecondsOption = Annotated[float | None, typer.Option("--seconds", min=1.0, help="Begin nothing new after this time.")]


@eval_command.command()
def kl(
    *,
    configs: RulesOption = DEFAULT_RULES,
    scale: ScaleOption = None,
    budgets: BudgetsOption = None,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    names: TextsOption = "docs,code,greedy",
    prompt_tokens: PromptOption = 3600,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens decoded per text, over all passages.")] = 1024,
    passages: Annotated[int, typer.Option(min=1, help="Passages that the tokens of a text are spread over.")] = 2,
    against: Annotated[
        str,
        typer.Option(help="Rules among --configs; the others' KL is also told relative to theirs at equal reading."),
    ] = "",
    output: OutputOption = None,
    as_json: JsonOption = False,
    seconds: SecondsOption = None,
) -> None:
    """Teacher-forced divergence from full attention: KL, top-1 agreement, perplexity ratio.

    Example: mac-kernels eval kl --configs 'careful window:careful' --texts docs --tokens 256
    """
    from . import texts
    from .rules import parse_rules
    from .sheet import Sheet
    from .suites import kl_suite

    chosen = [name for name in texts.TEXTS if name in names.split(",")]
    if len(chosen) != len(names.split(",")):
        raise InputError(f"--texts {names!r} must be some of {', '.join(texts.TEXTS)}, each once")
    rules = parse_rules(configs, _scale(scale), _budgets(budgets))
    if stray := [rule for rule in against.split() if rule not in rules]:
        raise InputError(f"--against names {stray[0]!r}, which is not among --configs; add it there")
    sheet = Sheet(model, output, as_json)
    spread = tokens // passages * passages
    todo = [
        name
        for name in chosen
        if any(
            not sheet.has("kl", "teacher_forced", name, rule, context=prompt_tokens, tokens=spread) for rule in rules
        )
    ]
    with sheet.bench(device) as bench:
        if todo:
            sheet.add(
                kl_suite(
                    bench,
                    rules,
                    names=todo,
                    prompt_tokens=prompt_tokens,
                    tokens=spread,
                    passages=passages,
                    curve=against.split(),
                    seconds=sheet.left(seconds),
                )
            )
    sheet.show()


@eval_command.command()
def needle(
    *,
    configs: RulesOption = "careful balanced fast paper window:careful window:balanced window:fast",
    scale: ScaleOption = None,
    budgets: BudgetsOption = None,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    tasks: Annotated[str, typer.Option(help="Tasks separated by commas.")] = (
        "single,multi_key,multi_value,variable_tracking,common_words"
    ),
    modes: Annotated[str, typer.Option(help="asked: question in the prompt; decoded: question decoded, too.")] = (
        "asked,decoded"
    ),
    prompt_tokens: PromptOption = 2048,
    trials: Annotated[int, typer.Option(min=1, help="Trials to score per task, full attention being right.")] = 20,
    rows: Annotated[int, typer.Option(min=1, help="Most sequences decoded at once (memory).")] = 16,
    answers: Annotated[
        Path | None, typer.Option(help="File to add every answer to, a line of JSON each, with where it leaves full's.")
    ] = None,
    output: OutputOption = None,
    as_json: JsonOption = False,
    seconds: SecondsOption = None,
) -> None:
    """Facts hidden in a long text, asked for at its end, in the manner of RULER.

    Example: mac-kernels eval needle --configs careful --tasks single --trials 5
    """
    from .needle import MODES, TASKS
    from .rules import parse_rules
    from .sheet import Sheet, append_answers
    from .suites import ANSWER_TOKENS, needle_suite

    for given, known in ((tasks, TASKS), (modes, MODES)):
        if unknown := [name for name in given.split(",") if name not in known]:
            raise InputError(f"unknown {unknown[0]!r} in {given!r}; choose from {', '.join(known)}")
    rules = parse_rules(configs, _scale(scale), _budgets(budgets))
    sheet = Sheet(model, output, as_json)
    with sheet.bench(device) as bench:
        for task in tasks.split(","):
            wanted = [
                mode
                for mode in MODES
                if mode in modes.split(",")
                and not sheet.has_trials(
                    f"{task}/{mode}", rules, context=prompt_tokens, tokens=ANSWER_TOKENS, trials=trials
                )
            ]
            cells = needle_suite(
                bench, rules, tasks=[task], modes=wanted, prompt_tokens=prompt_tokens, trials=trials, rows=rows,
                seconds=sheet.left(seconds), told=functools.partial(append_answers, answers),
            )  # fmt: skip
            for found in cells:
                sheet.add(found)
    sheet.show()


@eval_command.command()
def sketch(
    *,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    names: TextsOption = "docs,code",
    prompt_tokens: PromptOption = 3600,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens whose matches are replayed, per text.")] = 512,
    nominees: Annotated[str, typer.Option(help="Nominated rows to try; separated by commas.")] = "4,8,12,16",
    thresholds: Annotated[str, typer.Option(help="Thresholds to try; separated by commas.")] = "0.45,0.6",
    window: Annotated[int, typer.Option(min=2, help="Ring rows.")] = 512,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Sketch kinds of at most 128 bytes per row and kv head: how often they nominate the nearest row.

    Example: mac-kernels eval sketch --texts docs --tokens 64 --nominees 8
    """
    from . import texts
    from .recall import Nomination, nominations
    from .sheet import Sheet, show_nominations
    from .sketches import default_kinds

    known: tuple[texts.PassageName, ...] = ("docs", "code")
    chosen = [name for name in known if name in names.split(",")]
    if len(chosen) != len(names.split(",")):
        raise InputError(f"--texts {names!r} must be some of docs, code, each once")
    sheet = Sheet(model, None, as_json)
    found: dict[str, list[Nomination]] = {}
    with sheet.bench(device) as bench:
        from mac_transformers.intercept import layout_of

        for name in chosen:
            whole = texts.passages(bench.tokenizer, name, length=prompt_tokens + tokens)[0]
            found[name] = nominations(
                bench.model,
                whole,
                default_kinds(layout_of(bench.model)),
                prompt_tokens=prompt_tokens,
                window=window,
                counts=[int(count) for count in nominees.split(",")],
                thresholds=[float(threshold) for threshold in thresholds.split(",")],
                progress=bench.step(f"sketch {name}"),
            )
    show_nominations(found, output, as_json=as_json)


@eval_command.command()
def freerun(
    *,
    configs: RulesOption = "careful balanced fast paper window:careful window:balanced window:fast",
    scale: ScaleOption = None,
    budgets: BudgetsOption = None,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    prompt_tokens: PromptOption = 3600,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens written per passage.")] = 512,
    passages: Annotated[int, typer.Option(min=1, help="Prompts.")] = 4,
    output: OutputOption = None,
    as_json: JsonOption = False,
    seconds: SecondsOption = None,
) -> None:
    """Free-running generation: how long it agrees with full attention, and whether it repeats itself.

    Example: mac-kernels eval freerun --configs careful --passages 1 --tokens 64
    """
    from .rules import parse_rules
    from .sheet import Sheet
    from .suites import freerun_suite

    rules = parse_rules(configs, _scale(scale), _budgets(budgets))
    sheet = Sheet(model, output, as_json)
    if not all(sheet.has("freerun", "greedy", "docs", rule, context=prompt_tokens, tokens=tokens) for rule in rules):
        with sheet.bench(device) as bench:
            sheet.add(
                freerun_suite(
                    bench,
                    rules,
                    prompt_tokens=prompt_tokens,
                    tokens=tokens,
                    passages=passages,
                    seconds=sheet.left(seconds),
                )
            )
    sheet.show()


@eval_command.command("drift")
def drift_command(
    *,
    configs: RulesOption = "careful balanced fast tau=.45 careful,age=none fast,age=none",
    scale: ScaleOption = None,
    budgets: BudgetsOption = None,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    prompt_tokens: PromptOption = 3600,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens decoded per passage.")] = 4000,
    passages: Annotated[int, typer.Option(min=1, help="Passages.")] = 1,
    output: OutputOption = None,
    as_json: JsonOption = False,
    seconds: SecondsOption = None,
) -> None:
    """Long passages: whether the error of reused states grows with their age, or as they are handed on.

    Example: mac-kernels eval drift --configs careful --tokens 64
    """
    from .rules import parse_rules
    from .sheet import Sheet
    from .suites import drift_suite

    rules = parse_rules(configs, _scale(scale), _budgets(budgets))
    sheet = Sheet(model, output, as_json)
    with sheet.bench(device) as bench:
        sheet.add(
            drift_suite(
                bench,
                rules,
                prompt_tokens=prompt_tokens,
                tokens=tokens,
                passages=passages,
                seconds=sheet.left(seconds),
            )
        )
    sheet.show()


@eval_command.command()
def calibrate(
    output: Annotated[Path, typer.Argument(help="Config file to write.")],
    *,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    names: TextsOption = "docs,code",
    prompt_tokens: PromptOption = 3072,
    passages: Annotated[int, typer.Option(min=1, help="Passages per text; none that the other commands measure.")] = 1,
    trials: Annotated[int, typer.Option(min=0, help="Needle trials per task, answered, besides.")] = 2,
    preset: Annotated[str, typer.Option(help="careful, balanced or fast.")] = "careful",
) -> None:
    """Measure, head by head, what a reused state does to the model, and write the preset that it allows.

    Example: mac-kernels eval calibrate smollm2.json
    """
    import torch

    from ..calibrate import calibrate as measure
    from ..calibrate import calibrated
    from . import needle, texts
    from .sheet import Sheet

    known: tuple[texts.PassageName, ...] = ("docs", "code")
    chosen = [name for name in known if name in names.split(",")]
    if len(chosen) != len(names.split(",")):
        raise InputError(f"--texts {names!r} must be some of docs, code, each once")
    config = calibrated(preset, ((1.0,),))  # before anything is read: refuses a preset that takes no scale
    with Sheet(model, None, False).bench(device) as bench:
        found = [
            texts.passages(bench.tokenizer, name, length=prompt_tokens, count=passages, seed=_CALIBRATION_SEED)
            for name in chosen
        ]
        answered = [
            needle.answered_trial(bench.tokenizer, task, length=prompt_tokens, seed=_CALIBRATION_TRIAL + trial)
            for task in ("single", "multi_key", "multi_value", "variable_tracking")
            for trial in range(trials)
        ]
        scale = measure(
            bench.model,
            torch.cat(found),
            config=dataclasses.replace(config, influence_scale=None),
            answered=answered,
            progress=bench.step("calibrate"),
        )
    write_whole(output, calibrated(preset, scale).to_json())
    typer.echo(output)


@eval_command.command()
def plot(
    table: Annotated[Path, typer.Argument(help="Table written by `eval kl`.")],
    *,
    output: Annotated[Path | None, typer.Option(help="PNG to write; default beside the table.")] = None,
) -> None:
    """Draw what each rule reads against what it costs.

    Example: mac-kernels eval plot benchmarks/results/quality/SmolLM2-135M-Instruct.csv
    """
    from .csv import read
    from .plot import plot_frontier

    path = table.with_suffix(".png") if output is None else output
    plot_frontier(read(table), path)
    typer.echo(path)


def _budgets(files: list[Path] | None) -> list[TcaBudgets]:
    from mac_kernels.tca import TcaBudgets

    return [TcaBudgets.load(file) for file in files or ()]


def _scale(file: Path | None) -> HeadTable | None:
    if file is None:
        return None
    table = MacConfig.load(file).influence_scale
    if table is None:
        raise InputError(f"--scale {file} has no influence_scale; write one with `mac-kernels eval calibrate`")
    return table
