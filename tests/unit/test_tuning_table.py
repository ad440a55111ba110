"""What the table of tuned launch parameters, the files that come along and the documentation say of each other."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import results, tuning_summary
from benchmarks.tuning_summary import Measured
from mac_autotune.export import SLOWER
from mac_kernels import BatchMacDecodeWithPagedKVCacheWrapper, ConfigError, HeadLayout, Rope, places, support, tuned
from mac_kernels.tuned import KernelFile

ROOT = Path(__file__).parents[2]
TABLE = results.RESULTS / "NVIDIA_H100_80GB_HBM3" / "tuning.csv"
BUNDLED = Path(places.__file__).parent / "tuned" / "bundled"
ASKED = {(32, 8, 128), (32, 4, 128), (9, 3, 64), (14, 2, 64), (12, 2, 128), (40, 8, 128), (64, 8, 128)}
TO_RANDOM = 1.03
"""How far a bucket may be behind the best of 200 random points, or of all if the space has fewer."""


@pytest.fixture(scope="module")
def buckets() -> list[Measured]:
    return tuning_summary.measured(results.read(TABLE))


def files() -> Iterator[KernelFile]:
    for path in sorted(BUNDLED.glob("kernel,*.json")):
        file = tuned.load(path)
        assert isinstance(file, KernelFile)
        yield file


def layout_of(file: KernelFile) -> tuple[int, int, int]:
    return file.key.num_qo_heads, file.key.num_kv_heads, file.key.head_dim


def test_every_bucket_keeps_up_with_the_random_search_and_with_the_default(buckets: list[Measured]) -> None:
    assert {one.layout for one in buckets} >= ASKED
    for one in buckets:
        assert one.to_random <= TO_RANDOM and one.ratio <= 1, one
        assert max(one.ratios.values()) <= SLOWER, one


def test_the_files_that_come_along_are_what_was_measured(buckets: list[Measured]) -> None:
    in_table = {(*one.layout, one.batch, one.context): one.ratio for one in buckets}
    in_files = {}
    for file in files():
        assert file.provenance.basis == "measured" and file.key.gpu == "NVIDIA H100 80GB HBM3"
        for bucket in file.buckets:
            in_files[(*layout_of(file), bucket.batch, bucket.context)] = bucket.ratio.value
            assert (bucket.launch is None) == (bucket.ratio.value == 1)
    assert in_files == {key: pytest.approx(in_table[key], rel=1e-3) for key in in_files}
    tuned_layouts = {layout_of(file) for file in files()}
    assert all(one.ratio == 1 for one in buckets if one.layout not in tuned_layouts), "a gain that does not come along"


def test_the_documentation_has_the_table(buckets: list[Measured]) -> None:
    assert tuning_summary.table(buckets) in (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")


@pytest.fixture
def on_that_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A GPU of that name, nothing in the user's folder, and a copy of the files that come along, which is returned."""
    copy = shutil.copytree(BUNDLED, tmp_path / "bundled")
    original, choose = places.config_places, tuned.choose_launch

    def config_places(environ: object = None, user_dir: object = None) -> list[places.Place]:
        del environ, user_dir
        found = original({}, tmp_path / "user")
        return [places.Place(one.kind, copy) if one.kind == "bundled" else one for one in found]

    monkeypatch.setattr("mac_kernels.tuned.lookup.config_places", config_places)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(tuned, "choose_launch", lambda _, *args, **kw: choose(torch.device("cuda"), *args, **kw))
    monkeypatch.setitem(support._CHECKS, "triton", lambda *_: ())
    monkeypatch.setattr("mac_kernels.fused.FusedStep", lambda planned, launch: SimpleNamespace(launch=launch))
    tuned.forget()
    yield copy
    tuned.forget()


def plans(layout: HeadLayout, batch: int, context: int) -> list[BatchMacDecodeWithPagedKVCacheWrapper]:
    """As transformers plans, and as SGLang does."""
    rope = Rope.from_inv_freq(torch.ones(layout.head_dim // 2))
    paged, rows = (BatchMacDecodeWithPagedKVCacheWrapper(backend="triton") for _ in range(2))
    indptr, indices = torch.arange(batch + 1, dtype=torch.int32), torch.zeros(batch, dtype=torch.int32)
    one = torch.ones(batch, dtype=torch.int32)
    paged.plan(indptr, indices, one, layout=layout, page_size=1, rope=rope, max_kv_len=context)
    rows.plan_rows(
        torch.zeros(1, context, dtype=torch.int32), indices, one, layout=layout, rope=rope, max_kv_len=context
    )
    return [paged, rows]


def test_they_serve_without_a_flag(on_that_gpu: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mac_kernels.tuned"):
        for file in files():
            for bucket in file.buckets:
                for mac in plans(HeadLayout(*layout_of(file)), bucket.batch, bucket.context):
                    assert mac._planned().step.launch == bucket.launch
                    assert str(on_that_gpu) in mac.explain().notes[-1] and "(bundled)" in mac.explain().notes[-1]
    assert not caplog.records


def test_without_them_the_defaults_serve_and_a_broken_one_is_an_error(on_that_gpu: Path) -> None:
    file = next(files())
    bucket, path = file.buckets[0], on_that_gpu / file.key.file_name
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))}.*JSON.*delete it to use the defaults"):
        plans(HeadLayout(*layout_of(file)), bucket.batch, bucket.context)
    path.unlink()
    tuned.forget()
    for mac in plans(HeadLayout(*layout_of(file)), bucket.batch, bucket.context):
        assert mac._planned().step.launch is None
        assert "using the defaults. To tune: mac-kernels tune kernel" in mac.explain().notes[-1]
