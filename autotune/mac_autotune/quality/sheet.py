"""Where results go: the table on disk, the terminal, and the model that they come from."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mac_kernels import InputError
from mac_transformers.batch import FULL
from mac_transformers.weights import find_weights

from ..command import command_line
from .csv import Row, read, upsert
from .recall import Nomination
from .suites import Answer, Bench, Cell

RESULTS = Path("benchmarks/results/quality")
_QUANTISATION = re.compile(r"\.I?Q\d\w*$")
_LINE_EVERY_S = 15.0


class Sheet:
    """The results of one command: adds cells to the table as they finish and knows which are there already.

    Parameters
    ----------
    model : str or None
        As for :func:`mac_transformers.weights.find_weights`.
    output : Path or None
        The table; default ``benchmarks/results/quality/<model>.csv``, one for all GGUF quantisations of a model.
    as_json : bool
        Print the rows as JSON instead of a table.
    """

    def __init__(self, model: str | None, output: Path | None, as_json: bool) -> None:
        self._weights = find_weights(model)
        self.model = self._weights.name.removesuffix(".gguf")
        self.output = RESULTS / f"{_QUANTISATION.sub('', self.model)}.csv" if output is None else output
        self._as_json = as_json
        self._old: dict[tuple[object, ...], dict[str, int]] = {}
        for r in read(self.output):
            cell = r.model, r.suite, r.task, r.text, r.config, r.context, r.tokens
            self._old.setdefault(cell, {})[r.metric] = r.n
        self._rows: dict[tuple[str, ...], Row] = {}
        self._begin = time.monotonic()

    def has(self, suite: str, task: str, text: str, config: str, *, context: int, tokens: int) -> bool:
        """Whether the table held this cell before."""
        return (self.model, suite, task, text, config, context, tokens) in self._old

    def has_trials(self, task: str, rules: Iterable[str], *, context: int, tokens: int, trials: int) -> bool:
        """Whether the table held a needle task for all rules with as many trials scored, or drawn in vain."""

        def count(config: str, metric: str) -> int:
            return self._old.get((self.model, "needle", task, "docs", config, context, tokens), {}).get(metric, 0)

        return count(FULL, "found") >= 4 * trials or all(count(rule, "recall") >= trials for rule in rules)

    def left(self, seconds: float | None) -> float | None:
        """What is left of a time limit that began with this command."""
        return None if seconds is None else seconds - (time.monotonic() - self._begin)

    @contextmanager
    def bench(self, device: str) -> Iterator[Bench]:
        """The model on a device, fp32 throughout, with progress on standard error.

        Raises
        ------
        InputError
            If the device is not there.
        """
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(f"--device {device}: PyTorch sees no GPU here; use --device cpu")
        # TF32 has ten bits of mantissa: its rounding would drown what is measured
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        model, tokenizer = self._weights.load()
        torch.nn.Module.to(model, device)
        with _told() as progress:
            yield Bench(model, tokenizer, progress)

    def add(self, cells: Iterable[Cell]) -> None:
        """Add finished cells to the table on disk."""
        fresh = [row for cell in cells for row in self._rows_of(cell)]
        upsert(self.output, fresh)
        self._rows |= {row.key: row for row in fresh}

    def show(self) -> None:
        """Print what this command measured."""
        if self._as_json:
            print(json.dumps([asdict(row) for row in self._rows.values()], indent=2))
            return
        metrics = list(dict.fromkeys(row.metric for row in self._rows.values()))
        table = Table("task", "text", "config", "group hit", "KV read", *metrics, title=f"{self.model}: {self.output}")
        lines: dict[tuple[str, str, str], dict[str, Row]] = {}
        for row in self._rows.values():
            lines.setdefault((row.task, row.text, row.config), {})[row.metric] = row
        for names, found in lines.items():
            one = next(iter(found.values()))
            values = [_with_interval(found[metric]) if metric in found else "" for metric in metrics]
            table.add_row(*names, f"{one.group_hit:.3f}", f"{one.kv_read:.3f}", *values)
        _console().print(table)

    def _rows_of(self, cell: Cell) -> Iterator[Row]:
        for metric, estimate in cell.metrics.items():
            yield Row(
                model=self.model,
                suite=cell.suite,
                task=cell.task,
                text=cell.text,
                config=cell.config,
                context=cell.context,
                tokens=cell.tokens,
                group_hit=cell.reuse.group_hit,
                head_hit=cell.reuse.head_hit,
                kv_read=cell.reuse.kv_read,
                metric=metric,
                value=estimate.value,
                ci_low=estimate.low,
                ci_high=estimate.high,
                n=estimate.n,
                commit=_commit(),
                date=datetime.date.today().isoformat(),
                command=command_line("eval"),
            )


def append_answers(file: Path | None, answers: Iterable[Answer]) -> None:
    """Add needle answers to a file of JSON lines."""
    if file is not None:
        with file.open("a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(asdict(answer)) + "\n" for answer in answers)


def show_nominations(found: Mapping[str, Sequence[Nomination]], output: Path | None, *, as_json: bool) -> None:
    """Print what the sketch kinds found, by text, and write it to a JSON file."""
    document = {text: [asdict(one) for one in ones] for text, ones in found.items()}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(document, indent=2))
        return
    table = Table("text", "sketch", "bytes", "nominees", "threshold", "recall", "recall (near)", "group hit", "lost")
    for text, ones in found.items():
        for one in sorted(ones, key=lambda o: (o.threshold, o.count, o.group_hit_loss)):
            table.add_row(
                text, one.kind, str(one.nbytes), str(one.count), str(one.threshold), f"{one.recall:.3f}",
                f"{one.near_recall:.3f}", f"{one.group_hit:.3f}", f"{one.group_hit_loss:.4f}",
            )  # fmt: skip
    _console().print(table)


@contextmanager
def _told() -> Iterator[_Told]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield _Told(bar)


class _Told:
    """Progress on a terminal as a bar, elsewhere as a line now and then."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("")
        self._last = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        self._bar.update(self._task, description=what, completed=done, total=total)
        if self._bar.disable and (done == total or time.monotonic() - self._last > _LINE_EVERY_S):
            self._last = time.monotonic()
            print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)


def _with_interval(row: Row) -> str:
    return f"{row.value:.4g} [{row.ci_low:.3g}, {row.ci_high:.3g}]"


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160)


def _commit() -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"
