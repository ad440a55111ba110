"""The command that a file or table was made by, as anybody could give it."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

_LEFT_OUT = ("--output", "--storage")
"""Options whose values are places of this machine and say nothing of what was computed."""


def command_line(verb: str) -> str:
    """The command of this process without the folders of this machine.

    Parameters
    ----------
    verb : str
        Of ``mac-kernels``; it is added if the process was started as a module or under the verb's own name.
    """
    given = sys.argv[2:] if sys.argv[1:2] == [verb] else sys.argv[1:]
    kept, arguments = ["mac-kernels", verb], iter(given)
    for argument in arguments:
        name, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if name in _LEFT_OUT:
            if not equals:
                next(arguments, None)
        elif argument != "--json":
            kept.append(name + equals + _without_folder(value))
    return shlex.join(kept)


def _without_folder(value: str) -> str:
    """A path's last part; other values, a hub's ``owner/name`` among them, as they are."""
    # not Path.exists, which refuses a value that is too long for a name, as lists of rules are
    is_path = Path(value).is_absolute() or os.path.exists(value)
    return (Path(value).name or value) if is_path else value
