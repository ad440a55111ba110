"""Tuned files: found in the right order, only inside their coverage, written whole, refused when broken."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mac_autotune.limits import violations
from mac_autotune.quality.metrics import Estimate
from mac_kernels import (
    BatchMacDecodeWithPagedKVCacheWrapper,
    ConfigError,
    HeadLayout,
    MacConfig,
    Rope,
    places,
    resolve_config,
    support,
    tuned,
)
from mac_kernels.launch import LaunchParams
from mac_kernels.tca import TcaBudgets
from mac_kernels.tuned import Bucket, Coverage, KernelFile, KernelKey, ModelKey, PolicyFile, Provenance, Score

KEY = KernelKey(
    gpu="NVIDIA H100 80GB HBM3", num_qo_heads=32, num_kv_heads=8, head_dim=128, dtype="bfloat16", page_size=1
)
MODEL = ModelKey(name="org/Tiny-1B", num_layers=2, num_qo_heads=4, num_kv_heads=2, head_dim=8, vocab_size=64)
SCORE = Score(value=0.9, low=0.88, high=0.92, unit="us", n=7)
FACTS = Provenance(
    gpu=KEY.gpu,
    driver="1",
    versions={"torch": "2"},
    study="s",
    trial=3,
    basis="measured",
    date="2026-11-22",
    command="c",
)
KINDS = ("environment", "user", "bundled")


def kernel_file(key: KernelKey = KEY, splits: int = 4, **changes: Any) -> KernelFile:
    buckets = tuple(
        Bucket(
            batch=batch,
            context=context,
            trial=3,
            launch=LaunchParams(splits=splits, rest_stages=1 + index),
            ratio=SCORE,
            latency={"1": SCORE, "0": SCORE},
        )
        for index, (batch, context) in enumerate([(1, 1000), (1, 64000), (64, 1000), (64, 64000)])
    )
    coverage = Coverage(batch=(1, 96), context=(500, 96000))
    values = {"key": key, "coverage": coverage, "window": 512, "band": 256, "buckets": buckets, "provenance": FACTS}
    return KernelFile(**(values | changes))


def policy_file(config: MacConfig, key: ModelKey = MODEL) -> PolicyFile:
    coverage = Coverage(batch=(1, 96), context=(500, 96000))
    return PolicyFile(
        key=key, coverage=coverage, preset="careful", config=config, scores={"kl": SCORE}, provenance=FACTS
    )


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    tuned.forget()
    yield
    tuned.forget()


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The three places, empty; the package's own is moved here."""
    found = {kind: tmp_path / kind for kind in KINDS}
    for folder in found.values():
        folder.mkdir()

    def config_places(environ: Any = None, user_dir: Path | None = None) -> tuple[places.Place, ...]:
        real = original(environ, found["user"])
        return (*(place for place in real if place.kind != "bundled"), places.Place("bundled", found["bundled"]))

    original = places.config_places
    monkeypatch.setattr("mac_kernels.tuned.lookup.config_places", config_places)
    return found


def environ_of(folders: dict[str, Path], given_there: bool) -> dict[str, str]:
    return {"MAC_KERNELS_CONFIG": str(folders["environment"])} if given_there else {}


@pytest.mark.parametrize("present", [frozenset(KINDS[i] for i in range(3) if bits >> i & 1) for bits in range(8)])
def test_the_strongest_place_wins(folders: dict[str, Path], present: frozenset[str]) -> None:
    for rank, kind in enumerate(KINDS):
        if kind in present:
            tuned.save(kernel_file(splits=2**rank), folders[kind])
    choice = tuned.launch_for(KEY, batch=1, context=1000, environ=environ_of(folders, "environment" in present))
    expected = next((kind for kind in KINDS if kind in present), "default")
    assert choice.source == expected
    if expected == "default":
        assert choice.launch is None and choice.why.endswith("--dtype bfloat16 --page-size 1")
        assert "mac-kernels tune kernel --hq 32 --hkv 8 --head-dim 128" in choice.why
    else:
        assert choice.launch is not None and choice.launch.splits == 2 ** KINDS.index(expected)
        assert choice.path == folders[expected] / KEY.file_name


def test_the_environment_may_name_the_file_itself(folders: dict[str, Path]) -> None:
    path = tuned.save(kernel_file(splits=8), folders["environment"])
    tuned.save(kernel_file(splits=2), folders["user"])
    environ = {"MAC_KERNELS_CONFIG": str(path)}
    assert tuned.launch_for(KEY, batch=1, context=1000, environ=environ).launch == LaunchParams(splits=8, rest_stages=1)
    other = dataclasses.replace(KEY, head_dim=64)
    assert tuned.launch_for(other, batch=1, context=1000, environ=environ).source == "default"


def test_an_argument_wins_and_a_cpu_looks_nothing_up(caplog: pytest.LogCaptureFixture) -> None:
    layout, cpu = HeadLayout(32, 8, 128), torch.device("cpu")
    asked = LaunchParams(splits=2)
    choice = tuned.choose_launch(cpu, layout, batch=1, context=10, page_size=1, launch=asked)
    assert (choice.source, choice.launch) == ("argument", asked)
    assert tuned.choose_launch(cpu, layout, batch=1, context=10, page_size=1).launch is None
    assert not caplog.records


def test_a_miss_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setenv("MAC_KERNELS_CONFIG", str(tuned.save(kernel_file(), tmp_path)))
    tuned.forget()
    with caplog.at_level(logging.WARNING, "mac_kernels.tuned"):
        for batch in (1, 2, 3):
            layout = HeadLayout(8, 2, 64)
            tuned.choose_launch(torch.device("cuda"), layout, batch=batch, context=100, page_size=1)
    assert [record.getMessage() for record in caplog.records] == [
        "no tuned launch parameters for Some GPU, 8/2 heads of 64, bfloat16, page size 1; using the defaults. To tune: "
        "mac-kernels tune kernel --hq 8 --hkv 2 --head-dim 64 --dtype bfloat16 --page-size 1"
    ]


@given(batch=st.integers(1, 200), context=st.integers(1, 200_000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_the_nearest_bucket_serves_inside_the_coverage_only(
    tmp_path_factory: pytest.TempPathFactory, batch: int, context: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "nearest"
    if not folder.exists():
        tuned.save(kernel_file(), folder)
    file = tuned.load(folder / KEY.file_name)
    assert isinstance(file, KernelFile)
    inside = 1 <= batch <= 96 and 500 <= context <= 96000
    choice = tuned.launch_for(KEY, batch=batch, context=context, environ={"MAC_KERNELS_CONFIG": str(folder)})
    assert (choice.source == "environment") is inside
    if inside:
        distance = {
            (b.batch, b.context): max(b.batch / batch, batch / b.batch) * max(b.context / context, context / b.context)
            for b in file.buckets
        }
        chosen = next(b for b in file.buckets if b.launch == choice.launch)
        assert distance[chosen.batch, chosen.context] == pytest.approx(min(distance.values()))
    else:
        assert choice.launch is None and "does not cover" in choice.why and f"{batch}" in choice.why


def scores() -> st.SearchStrategy[Score]:
    numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)
    return st.builds(Score, value=numbers, low=numbers, high=numbers, unit=st.text(max_size=5), n=st.integers(0, 99))


@given(
    ratio=scores(),
    splits=st.sampled_from([1, 2, 4, 8]),
    name=st.text(max_size=20),
    threshold=st.floats(-1, 1, allow_nan=False),
    table=st.none() | st.just(((1.0, 2.0), (0.5, 3.0))),
)
def test_files_survive_the_round_trip(ratio: Score, splits: int, name: str, threshold: float, table: Any) -> None:
    bucket = dataclasses.replace(kernel_file().buckets[0], ratio=ratio, launch=LaunchParams(splits=splits))
    kernel = kernel_file(buckets=(bucket, dataclasses.replace(bucket, launch=None)))
    config = MacConfig(threshold=threshold, influence_scale=table)
    policy = policy_file(config, dataclasses.replace(MODEL, name=name))
    for file in (kernel, policy):
        assert tuned.from_json(tuned.to_json(file), source="x") == file


def broken(change: Any) -> str:
    data = json.loads(tuned.to_json(kernel_file()))
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is no tuned file"),
        (broken(lambda d: d.update(schema=0)), "has schema 0, this version reads 1"),
        (broken(lambda d: d.update(bucket=d.pop("buckets"))), "unknown key 'bucket'; did you mean 'buckets'?"),
        (broken(lambda d: d["key"].pop("dtype")), "key: missing dtype"),
        (broken(lambda d: d["key"].update(head_dim="128")), "head_dim='128' must be an integer"),
        (broken(lambda d: d["coverage"].update(batch=[4, 1])), "batch=(4, 1) must be two integers"),
        (broken(lambda d: d["buckets"][0]["launch"].update(splits=3)), "splits=3 must be a power of two"),
        (broken(lambda d: d["buckets"][0]["launch"].update(rest_stages=True)), "rest_stages=True must be an integer"),
        (broken(lambda d: d["buckets"][1]["ratio"].update(value=None)), "bucket 1: ratio: value=None must be a finite"),
        (broken(lambda d: d["buckets"].clear()), "has no buckets"),
        (broken(lambda d: d["provenance"].update(versions=3)), "versions=3 must be an object of strings"),
    ],
)
def test_a_broken_file_is_an_error_that_names_it_and_the_fix(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / KEY.file_name
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        tuned.launch_for(KEY, batch=1, context=1000, environ={"MAC_KERNELS_CONFIG": str(tmp_path)})
    assert message in str(error.value) and str(path) in str(error.value)
    assert "delete it to use the defaults, or write it again" in str(error.value)
    path.unlink()
    (tmp_path / "config.json").write_text('{"schema": 1}')
    assert tuned.launch_for(KEY, batch=1, context=1000, environ={"MAC_KERNELS_CONFIG": str(tmp_path)}).launch is None


def test_a_file_under_another_name_is_refused(tmp_path: Path) -> None:
    path = tuned.save(kernel_file(dataclasses.replace(KEY, page_size=16)), tmp_path)
    path.rename(tmp_path / KEY.file_name)
    with pytest.raises(ConfigError, match="its key is not what its name says"):
        tuned.launch_for(KEY, batch=1, context=1000, environ={"MAC_KERNELS_CONFIG": str(tmp_path)})


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    file = policy_file(MacConfig())
    with pytest.raises(ValueError, match="not JSON compliant"):
        tuned.save(dataclasses.replace(file, scores={"kl": dataclasses.replace(SCORE, low=float("nan"))}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tuned.save(kernel_file(splits=2), tmp_path)
    before = path.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tuned.save(kernel_file(splits=8), tmp_path)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


def plan_both_ways(layout: HeadLayout, context: int) -> list[BatchMacDecodeWithPagedKVCacheWrapper]:
    """As transformers and FlashInfer's users plan, and as SGLang does."""
    rope = Rope.from_inv_freq(torch.ones(layout.head_dim // 2))
    paged, rows = (BatchMacDecodeWithPagedKVCacheWrapper(backend="triton") for _ in range(2))
    indptr, indices = torch.arange(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    one = torch.ones(1, dtype=torch.int32)
    paged.plan(indptr, indices, one, layout=layout, page_size=1, rope=rope, max_kv_len=context)
    slots = torch.zeros(1, context, dtype=torch.int32)
    rows.plan_rows(slots, indices, one, layout=layout, rope=rope, max_kv_len=context)
    return [paged, rows]


def test_every_plan_takes_the_launch_parameters_of_its_file(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tuned.choose_launch
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: KEY.gpu)
    monkeypatch.setattr(tuned, "choose_launch", lambda _, *args, **kw: original(torch.device("cuda"), *args, **kw))
    monkeypatch.setitem(support._CHECKS, "triton", lambda *_: ())
    monkeypatch.setattr("mac_kernels.fused.FusedStep", lambda planned, launch: SimpleNamespace(launch=launch))
    monkeypatch.delenv("MAC_KERNELS_CONFIG", raising=False)
    layout, file = HeadLayout(32, 8, 128), kernel_file()
    path = tuned.save(file, folders["bundled"])
    for mac in plan_both_ways(layout, 1200):
        assert mac._planned().step.launch == file.buckets[0].launch
        assert "tuned for batch 1 x 1000 tokens" in mac.explain().notes[-1]
    path.unlink()
    tuned.forget()
    for mac in plan_both_ways(layout, 1200):
        assert mac._planned().step.launch is None and "mac-kernels tune kernel" in mac.explain().notes[-1]
    path.write_text("{")
    tuned.forget()
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))}.*JSON"):
        plan_both_ways(layout, 1200)


def resolve(folders: dict[str, Path], environ: dict[str, str], model: ModelKey | None = MODEL, **more: Any) -> Any:
    return resolve_config(environ=environ, user_dir=folders["user"], model=model, **more)


@pytest.mark.parametrize("present", [frozenset(KINDS[i] for i in range(3) if bits >> i & 1) for bits in range(8)])
def test_a_policy_is_found_by_the_model(folders: dict[str, Path], present: frozenset[str]) -> None:
    for rank, kind in enumerate(KINDS):
        if kind in present:
            tuned.save(policy_file(MacConfig(window=100 + rank)), folders[kind])
    environ = environ_of(folders, "environment" in present)
    resolved = resolve(folders, environ)
    expected = next((100 + rank for rank, kind in enumerate(KINDS) if kind in present), 512)
    assert resolved.config.window == expected
    assert resolve(folders, environ, model=None).config == MacConfig()
    assert resolve(folders, environ, preset="fast").config == MacConfig.preset("fast")
    other = dataclasses.replace(MODEL, num_layers=3)
    assert resolve(folders, environ, model=other).config == MacConfig()
    if not present:
        assert "mac-kernels tune policy --model org/Tiny-1B" in resolved.why[0]


def test_a_plain_config_wins_over_the_policy_of_its_place_only(folders: dict[str, Path]) -> None:
    (folders["user"] / "config.json").write_text('{"schema": 1, "mac": {"window": 77}}')
    tuned.save(policy_file(MacConfig(window=101, band=33)), folders["user"])
    resolved = resolve(folders, {})
    assert (resolved.config.window, resolved.config.band) == (77, 33)
    assert resolved.sources["band"].where.endswith("policy,model=Tiny-1B.json")
    tuned.save(policy_file(MacConfig(window=100)), folders["environment"])
    assert resolve(folders, environ_of(folders, True)).config == MacConfig(window=100)


def test_the_name_decides_between_policies_of_one_shape(folders: dict[str, Path]) -> None:
    tuned.save(policy_file(MacConfig(window=101), dataclasses.replace(MODEL, name="a/Alpha")), folders["user"])
    tuned.save(policy_file(MacConfig(window=102)), folders["user"])
    assert resolve(folders, {}).config.window == 102
    finetuned = dataclasses.replace(MODEL, name="/models/my-finetune")
    resolved = resolve(folders, {}, model=finetuned)
    assert resolved.config.window == 101 and "which has its shape (tuned for Alpha)" in resolved.why[0]


def test_a_policy_file_can_be_named_and_launch_parameters_cannot(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tuned.save(policy_file(MacConfig(window=99)), tmp_path)
    assert resolve_config(file=path, environ={}, user_dir=folders["user"]).config.window == 99
    with pytest.raises(ConfigError, match="holds launch parameters, no config"):
        resolve_config(file=tuned.save(kernel_file(), tmp_path), environ={}, user_dir=folders["user"])


def test_bundled_files_are_right() -> None:
    folder = Path(places.__file__).parent / "tuned" / "bundled"
    for path in folder.glob("*.json"):
        if path.name.startswith("tca,"):
            assert TcaBudgets.load(path).file_name == path.name
        else:
            assert tuned.load(path).key.file_name == path.name


def test_the_policy_that_comes_along_serves_its_model_and_keeps_its_limits(tmp_path: Path) -> None:
    smollm2 = ModelKey(
        name="HuggingFaceTB/SmolLM2-135M-Instruct",
        num_layers=30,
        num_qo_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
    )
    resolved = resolve_config(environ={}, user_dir=tmp_path, model=smollm2)
    assert resolved.sources["influence_scale"].kind == "bundled" and resolved.config != MacConfig()
    found = tuned.find_policy(smollm2, environ={}, user_dir=tmp_path)
    assert found is not None and found.file.config == resolved.config
    scores, basis = found.file.scores, found.file.provenance.basis
    assert basis == "measured" and scores["latency_ratio"].high < 0.85
    assert scores["kl"].value <= scores["preset_kl"].value and scores["recall"].value >= 0.95
    kept = {name: Estimate(one.value, one.low, one.high, one.n) for name, one in scores.items()}
    preset = {name.removeprefix("preset_"): one for name, one in kept.items() if name.startswith("preset_")}
    assert violations(found.file.preset, kept, preset) == {}


def test_inventory_tells_what_is_hidden(folders: dict[str, Path]) -> None:
    first, second = (tuned.save(kernel_file(), folders[kind]) for kind in ("user", "bundled"))
    assert [(found.path, hidden) for found, hidden in tuned.inventory({}, folders["user"])] == [
        (first, None),
        (second, first),
    ]
