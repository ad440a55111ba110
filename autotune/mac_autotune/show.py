"""Studies in a storage: their list, their best trials, and the line that opens optuna-dashboard."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import optuna
from optuna.trial import TrialState
from rich.console import Console
from rich.table import Table

from mac_kernels import InputError
from mac_kernels.settings import cache_dir

from .study import DONE, feasible, open_storage


def locations(storage: str | None) -> list[str]:
    """The storage given, or all journals in the cache folder."""
    if storage is not None:
        if "://" not in storage and not Path(storage).expanduser().is_file():
            raise InputError(f"--storage {storage} does not exist; give a journal file or the URL of a database")
        return [storage]
    return [str(path) for path in sorted((cache_dir() / "studies").glob("*.journal"))]


def find_study(name: str, storage: str | None) -> tuple[optuna.Study, str]:
    """A study by its name or the only one that contains the name, and where it is.

    Raises
    ------
    InputError
        If none or several are meant; the known names are listed.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    known = {
        found: location
        for location in locations(storage)
        for found in optuna.get_all_study_names(open_storage(location))
    }
    meant = [name] if name in known else [found for found in known if name in found]
    if len(meant) != 1:
        raise InputError(f"study {name!r} is none or several of: {', '.join(known) or 'no study at all'}")
    location = known[meant[0]]
    return optuna.load_study(study_name=meant[0], storage=open_storage(location)), location


def dashboard_line(location: str) -> str:
    """The command that shows a storage live."""
    return f"optuna-dashboard {shlex.quote(location)}"


def show(name: str | None, storage: str | None, as_json: bool) -> None:
    """Print the studies, or the best trials of one."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if name is None:
        _print(_studies(storage), as_json, "no study yet; `mac-kernels tune policy` or `tune kernel` makes one")
        return
    study, location = find_study(name, storage)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    best = sorted(complete, key=lambda t: (not feasible(t), t.values[0]))[:10]
    default = [trial for trial in complete if trial.number == 0 and trial not in best]
    rows = [
        {
            "trial": trial.number,
            "values": " ".join(f"{value:.4g}" for value in trial.values),
            "breaks": ", ".join(key for key, value in trial.constraints.items() if value > 0),
            "parameters": " ".join(f"{key}={_short(value)}" for key, value in trial.params.items()),
        }
        for trial in (*default, *best)
    ]
    _print(rows, as_json, "no complete trial yet")
    if not as_json:
        print(f"live: {dashboard_line(location)}")


def _studies(storage: str | None) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for location in locations(storage):
        opened = open_storage(location)
        for name in optuna.get_all_study_names(opened):
            study = optuna.load_study(study_name=name, storage=opened)
            trials = study.get_trials(deepcopy=False)
            done = [trial for trial in trials if trial.state == TrialState.COMPLETE and feasible(trial)]
            rows.append(
                {
                    "study": name,
                    "finished": sum(trial.state in DONE for trial in trials),
                    "best": f"{min(trial.values[0] for trial in done):.4g}" if done else "",
                    "storage": location,
                }
            )
    return rows


def _print(rows: list[dict[str, object]], as_json: bool, nothing: str) -> None:
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        print(nothing)
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=None if Console().is_terminal else 200).print(table)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
