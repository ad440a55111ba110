"""Which tuned file serves a GPU or a model, and why: a look at files, never a timing."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from ..config import read_config
from ..errors import ConfigError
from ..files import write_whole
from ..launch import LaunchParams
from ..places import CONFIG_VARIABLE, Place, PlaceKind, config_places
from .schema import KernelFile, KernelKey, ModelKey, PolicyFile, TunedFile, from_json, kind_of, to_json

if TYPE_CHECKING:
    import torch

    from ..types import HeadLayout

F = TypeVar("F", bound=TunedFile)
Source = Literal["argument", "environment", "user", "bundled", "default"]
_LOG = logging.getLogger("mac_kernels.tuned")
_SAID: set[tuple[KernelKey, Path | None]] = set()


@dataclass(frozen=True, slots=True)
class Found(Generic[F]):
    """A tuned file, where it lies and what kind of place that is."""

    file: F
    path: Path
    kind: PlaceKind


@dataclass(frozen=True, slots=True)
class LaunchChoice:
    """Launch parameters (``None``: :func:`mac_kernels.launch.default_launch`), their source, and why in a sentence."""

    launch: LaunchParams | None
    source: Source
    why: str
    path: Path | None = None


def choose_launch(
    device: torch.device,
    layout: HeadLayout,
    *,
    batch: int,
    context: int,
    page_size: int,
    dtype: torch.dtype | str = "bfloat16",
    launch: LaunchParams | None = None,
) -> LaunchChoice:
    """Look up the launch parameters of the fused step; a miss says once how to tune.

    Parameters
    ----------
    device : torch.device
        Without CUDA the default is taken and nothing is looked up.
    layout : HeadLayout
        As this rank sees it.
    batch : int
        Requests of the plan.
    context : int, tokens
        Upper bound of the context over all runs of the plan.
    page_size : int, tokens
    dtype : torch.dtype or str, default "bfloat16"
        Of the KV cache.
    launch : LaunchParams, optional
        Wins over every file.

    Raises
    ------
    ConfigError
        If the file that should serve is broken.
    """
    if launch is not None:
        return LaunchChoice(launch, "argument", "launch parameters: given explicitly")
    if device.type != "cuda":
        return LaunchChoice(None, "default", "launch parameters: the defaults (no GPU)")
    import torch

    key = KernelKey(
        gpu=torch.cuda.get_device_name(device),
        num_qo_heads=layout.num_qo_heads,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        dtype=str(dtype).removeprefix("torch."),
        page_size=page_size,
    )
    choice = launch_for(key, batch=max(batch, 1), context=context)
    if choice.source == "default" and (key, choice.path) not in _SAID:
        _SAID.add((key, choice.path))
        _LOG.warning(choice.why)
    return choice


def launch_for(
    key: KernelKey,
    *,
    batch: int,
    context: int,
    environ: Mapping[str, str] | None = None,
    user_dir: Path | None = None,
) -> LaunchChoice:
    """:func:`choose_launch` for a key; says nothing."""
    found = find_kernel(key, environ=environ, user_dir=user_dir)
    heads = f"{key.num_qo_heads}/{key.num_kv_heads} heads of {key.head_dim}"
    if found is None:
        where = f"{key.gpu}, {heads}, {key.dtype}, page size {key.page_size}"
        return LaunchChoice(
            None, "default", f"no tuned launch parameters for {where}; using the defaults. To tune: {tune_command(key)}"
        )
    if outside := found.file.coverage.missing(batch, context):
        command = tune_command(key, _with(found.file, batch, context))
        why = f"{found.path} does not cover this plan ({outside}); using the defaults. To tune: {command}"
        return LaunchChoice(None, "default", why, found.path)
    bucket = found.file.nearest(batch, context)
    what = "tuned for" if bucket.launch is not None else "the defaults, the best for"
    why = f"launch parameters: {what} batch {bucket.batch} x {bucket.context} tokens, from {found.path} ({found.kind})"
    return LaunchChoice(bucket.launch, found.kind, why, found.path)


def find_kernel(
    key: KernelKey, *, environ: Mapping[str, str] | None = None, user_dir: Path | None = None
) -> Found[KernelFile] | None:
    """The strongest file of launch parameters for a key.

    Raises
    ------
    ConfigError
        If it is broken, or speaks of another key than its name says.
    """
    named = (os.environ if environ is None else environ).get(CONFIG_VARIABLE, "")
    return _find_kernel(key, named, user_dir)


@functools.lru_cache(maxsize=256)
def _find_kernel(key: KernelKey, named: str, user_dir: Path | None) -> Found[KernelFile] | None:
    for place in config_places({CONFIG_VARIABLE: named}, user_dir):
        if place.path.is_dir():
            path = place.path / key.file_name
            if path.is_file():
                file = load(path)
                if not isinstance(file, KernelFile) or file.key != key:
                    raise ConfigError(f"{path}: its key is not what its name says; write it again or rename it")
                return Found(file, path, place.kind)
        elif isinstance(single := _single(place), KernelFile) and single.key == key:
            return Found(single, place.path, place.kind)
    return None


def find_policy(
    key: ModelKey, *, environ: Mapping[str, str] | None = None, user_dir: Path | None = None
) -> Found[PolicyFile] | None:
    """The policy of a model: the strongest place that has one, there by name and shape before shape alone.

    Raises
    ------
    ConfigError
        If a policy file in one of the places is broken.
    """
    for place in config_places(environ, user_dir):
        found = [
            Found(file, path, place.kind)
            for path, file in _policies(place)
            if isinstance(file, PolicyFile) and file.key.same_shape(key)
        ]
        if found:
            return next((one for one in found if one.file.key.same_name(key)), found[0])
    return None


def inventory(
    environ: Mapping[str, str] | None = None, user_dir: Path | None = None
) -> list[tuple[Found[TunedFile], Path | None]]:
    """All tuned files, strongest place first, each with the file of equal key that hides it, if one does.

    Raises
    ------
    ConfigError
        If one is broken.
    """
    found: list[tuple[Found[TunedFile], Path | None]] = []
    winners: dict[KernelKey | ModelKey, Path] = {}
    for place in config_places(environ, user_dir):
        if place.path.is_dir():
            paths = sorted((*place.path.glob("kernel,*.json"), *place.path.glob("policy,*.json")))
            files = [(path, load(path)) for path in paths]
        else:
            files = [(place.path, single)] if (single := _single(place)) else []
        for path, file in files:
            found.append((Found(file, path, place.kind), winners.get(file.key)))
            winners.setdefault(file.key, path)
    return found


def _policies(place: Place) -> Iterator[tuple[Path, TunedFile]]:
    if place.path.is_dir():
        yield from ((path, load(path)) for path in sorted(place.path.glob("policy,*.json")))
    elif single := _single(place):
        yield place.path, single


def _single(place: Place) -> TunedFile | None:
    """The tuned file that the environment names itself; a plain config is none."""
    if not place.path.is_file():
        return None
    text = read_config(place.path)
    return from_json(text, source=str(place.path)) if kind_of(text) in ("kernel", "policy") else None


def load(path: Path) -> TunedFile:
    """Read a tuned file.

    Raises
    ------
    ConfigError
        If it cannot be read or is wrong; the message names it and the fix.
    """
    return from_json(read_config(path), source=str(path))


def save(file: TunedFile, folder: Path) -> Path:
    """Write a tuned file under its own name, whole or not at all, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file.key.file_name
    write_whole(path, to_json(file))
    forget()
    return path


def tune_command(key: KernelKey, buckets: tuple[set[int], set[int]] | None = None) -> str:
    """The command that writes the file of a key; ``buckets``: batch sizes and contexts other than its defaults."""
    lists = (",".join(map(str, sorted(values))) for values in buckets or ())
    asked = "".join(f" {name} {values}" for name, values in zip(("--batches", "--contexts"), lists, strict=False))
    return (
        f"mac-kernels tune kernel --hq {key.num_qo_heads} --hkv {key.num_kv_heads} --head-dim {key.head_dim} "
        f"--dtype {key.dtype} --page-size {key.page_size}{asked}"
    )


def _with(file: KernelFile, batch: int, context: int) -> tuple[set[int], set[int]]:
    """The batch sizes and contexts of a file and these."""
    return {*(bucket.batch for bucket in file.buckets), batch}, {*(bucket.context for bucket in file.buckets), context}


def forget() -> None:
    """Look at the files again at the next call, and say again what was said once."""
    _find_kernel.cache_clear()
    _SAID.clear()
