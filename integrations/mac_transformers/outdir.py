"""Results go to a folder whole or not at all."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mac_kernels.errors import InputError
from mac_kernels.files import write_whole


class OutputFolder:
    """A folder that can be written: checked first, since what will be written may take minutes to compute.

    Parameters
    ----------
    path : Path
        Made if it is not there.

    Raises
    ------
    InputError
        If it cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise InputError(f"output folder {path} cannot be written ({error}); give another with --output") from None

    def write(self, name: str, content: bytes) -> Path:
        """Write a file of the folder in one step: a reader sees the old content or the new, never a part of it."""
        write_whole(self.path / name, content)
        return self.path / name
