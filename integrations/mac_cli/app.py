"""The ``mac-kernels`` command: assembles the verbs, turns errors into exit codes."""

from __future__ import annotations

import sys
import warnings

import typer
from rich.markup import escape

from mac_autotune.cli import tune_command
from mac_autotune.errors import ExportRefused
from mac_autotune.quality.cli import eval_command
from mac_kernels.errors import MacError, MissingError, UnsupportedError

from .ab import ab
from .config import config_app
from .demo import demo
from .doctor import doctor
from .output import ExitCode, err
from .support import support
from .tca import tca_app

_EXIT_CODES = "\n\n".join(f"{code.value}: {code.meaning}" for code in ExitCode)

app = typer.Typer(
    name="mac-kernels",
    help="Attention kernels for long-context decoding.\n\nExample: mac-kernels doctor",
    epilog=f"Exit codes:\n\n{_EXIT_CODES}",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command("demo")(demo)
app.command("doctor")(doctor)
app.command("support")(support)
app.command("ab")(ab)
app.add_typer(config_app, name="config")
app.add_typer(eval_command, name="eval")
app.add_typer(tune_command, name="tune")
app.add_typer(tca_app, name="tca")


def autotune() -> None:
    """``mac-autotune``: ``mac-kernels tune`` under its own name."""
    main(["tune", *sys.argv[1:]])


def main(args: list[str] | None = None) -> None:
    """Run the command; ``args`` default to those of the process. Always ends with ``SystemExit``."""
    warnings.showwarning = _show_warning
    try:
        app(args, prog_name="mac-kernels")
    except (MissingError, UnsupportedError) as error:
        _fail(error, ExitCode.MISSING)
    except ExportRefused as error:
        _fail(error, ExitCode.CHECK_FAILED)
    except MacError as error:
        _fail(error, ExitCode.INPUT)


def _fail(error: MacError, code: ExitCode) -> None:
    err().print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
    sys.exit(code)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    err().print(f"[yellow]warning:[/] {escape(str(message))}", soft_wrap=True, highlight=False)
