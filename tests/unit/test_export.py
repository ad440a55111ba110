"""What is written, what is refused, and what a policy is expected to cost."""

from __future__ import annotations

import csv
import dataclasses
import random
from collections.abc import Mapping
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from mac_autotune.confirm import Confirmed
from mac_autotune.errors import ExportRefused
from mac_autotune.export import PRESET, bucket_of, covered, kernel_file, policy_file, provenance, rate, with_gain
from mac_autotune.latency import Curve, LatencyModel, Reads, curves_in, curves_of, latency_model
from mac_autotune.limits import LIMITS, violations
from mac_autotune.quality.metrics import Estimate
from mac_autotune.tune_policy import spread
from mac_kernels import PRESETS, ConfigError, HeadLayout, InputError, MacConfig
from mac_kernels.launch import LaunchParams
from mac_kernels.testing.timing import Timing
from mac_kernels.tuned import KernelKey, ModelKey

H100 = "NVIDIA H100 80GB HBM3"
KEY = KernelKey(gpu=H100, num_qo_heads=32, num_kv_heads=8, head_dim=128, dtype="bfloat16", page_size=1)
MODEL = ModelKey(name="m", num_layers=2, num_qo_heads=4, num_kv_heads=2, head_dim=8, vocab_size=64)
DEFAULT, FAST, UNEVEN = LaunchParams(), LaunchParams(splits=2), LaunchParams(splits=4)
FACTS = provenance(gpu=H100, study="s", trial=1, basis="measured", command="c")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "NVIDIA_H100_80GB_HBM3" / "decode.csv"


def noisy_clock(factor: Mapping[LaunchParams, Mapping[float, float]], noise: float):
    draw = random.Random(0)

    def time(launches: Mapping[str, LaunchParams], hit: float, *, repeats: int) -> dict[str, Timing]:
        found = {}
        for name, launch in launches.items():
            us = 100 * factor.get(launch, {}).get(hit, 1.0) * (1 + noise * draw.uniform(-1, 1))
            found[name] = Timing(us, us, us, repeats)
        return found

    return time


def rated(candidates: dict[int, LaunchParams], noise: float = 0.01):
    factor = {FAST: {1.0: 0.9, 0.0: 0.95}, UNEVEN: {1.0: 0.5, 0.0: 1.05}}
    return rate(noisy_clock(factor, noise), DEFAULT, candidates, (1.0, 0.0))


def test_the_faster_launch_wins_its_bucket() -> None:
    bucket = bucket_of(16, 4096, *rated({7: FAST}))
    assert (bucket.launch, bucket.trial) == (FAST, 7)
    assert bucket.ratio.value == pytest.approx((0.9 * 0.95) ** 0.5, rel=0.01)
    assert bucket.ratio.low < bucket.ratio.value < bucket.ratio.high < 1
    assert bucket.latency["1"].value == pytest.approx(90, rel=0.01)
    file = kernel_file(KEY, [bucket], window=512, band=256, provenance=FACTS)
    assert with_gain(file) is file and file.coverage == covered([16], [4096]) and file.coverage.batch == (10, 24)


def test_a_gain_within_the_noise_and_a_loss_at_one_hit_rate_keep_the_default() -> None:
    for candidates, noise in (({3: DEFAULT}, 0.01), ({3: UNEVEN}, 0.001), ({3: FAST}, 0.9)):
        default, found = rated(candidates, noise)
        assert not found[0].better
        bucket = bucket_of(16, 4096, default, found)
        assert bucket.launch is None and bucket.trial == 0
        file = kernel_file(KEY, [bucket], window=512, band=256, provenance=FACTS)
        with pytest.raises(ExportRefused, match="nothing is faster than the default"):
            with_gain(file)


def estimate(value: float, spread: float = 0.01) -> Estimate:
    return Estimate(value, value - spread, value + spread, 9)


def confirmed(ratio: float, *, broken: tuple[str, ...] = (), spread: float = 0.01) -> Confirmed:
    return Confirmed({"kl": estimate(0.001)}, estimate(ratio, spread), dict.fromkeys(broken, "kl 0.1 is above 0.0015"))


def write_policy(found: dict[str, Confirmed]):
    configs = {name: MacConfig(window=100 + int(name)) for name in found}
    return policy_file(
        MODEL,
        "careful",
        configs,
        {PRESET: confirmed(1.0), **found},
        coverage=covered([1], [4096]),
        provenance=lambda trial: dataclasses.replace(FACTS, trial=trial),
    )


def test_the_fastest_policy_that_keeps_the_limits_is_written() -> None:
    file = write_policy({"3": confirmed(0.5, broken=("kl",)), "4": confirmed(0.8), "5": confirmed(0.9)})
    assert file.config.window == 104 and file.provenance.trial == 4
    assert file.scores["latency_ratio"].value == 0.8 and file.scores["preset_kl"].unit == "nats"


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"3": confirmed(0.5, broken=("kl",))}, "trial 3: kl 0.1 is above 0.0015"),
        ({"3": confirmed(0.995)}, r"trial 3: latency ratio 0.995 \[0.985, 1.005\] is not below 1"),
        ({}, "no trial kept them"),
    ],
)
def test_a_policy_that_is_no_gain_or_breaks_a_limit_is_refused(found: dict[str, Confirmed], reason: str) -> None:
    with pytest.raises(ExportRefused, match=reason):
        write_policy(found)


def test_limits_tell_what_is_broken() -> None:
    good = {"kl": estimate(0.001), "kl_p99": estimate(0.01), "ppl_ratio": estimate(1.0), "top1": estimate(0.99)}
    assert violations("careful", good) == {}
    bad = {**good, "top1": estimate(0.9), "recall": estimate(0.8), "kl": estimate(float("nan"))}
    assert violations("careful", bad) == {
        "kl": "kl nan is above 0.0015",
        "top1": "top1 0.9 is below 0.985",
        "recall": "recall 0.8 is below 0.95",
    }
    with pytest.raises(ConfigError, match="no quality limits"):
        violations("paper", good)
    assert set(LIMITS) < set(PRESETS)


def test_where_the_preset_breaks_its_own_limit_its_interval_is_the_limit() -> None:
    base = {"top1": estimate(0.97), "kl": estimate(0.001, 0.0005)}
    assert violations("careful", {"top1": estimate(0.961)}, base) == {}
    assert violations("careful", {"top1": estimate(0.959)}, base) == {"top1": "top1 0.959 is below 0.96"}
    assert violations("careful", {"kl": estimate(0.0016)}, base) == {"kl": "kl 0.0016 is above 0.0015"}


LAYOUT = HeadLayout(32, 4, 128)


def test_the_estimate_knows_what_costs_time() -> None:
    model = latency_model(LAYOUT, H100, (), [(16, 32768)])
    base, reads = MacConfig(), Reads(0.5, 400)
    assert model.basis == "estimated" and model.ratio(base, reads, base, reads) == 1
    assert model.ratio(base, Reads(0.9, 400), base, reads) < 0.5
    assert model.ratio(dataclasses.replace(base, window=1024), reads, base, reads) > 1
    assert model.ratio(base, Reads(0.0, 0.0), base, Reads(1.0, 400)) > 3
    with pytest.raises(InputError, match="no entry in the latency model"):
        latency_model(LAYOUT, "Abacus", (), [(1, 1)])


def test_measured_curves_are_reproduced_and_read_from_the_benchmark_table() -> None:
    curves = curves_in(RESULTS, LAYOUT)
    buckets = {(batch, context) for batch in (1, 16, 64) for context in (32768, 126976)}
    assert {(c.batch, c.context) for c in curves} == buckets
    model = latency_model(LAYOUT, H100, curves, ())
    assert model.basis == "measured" and set(model.buckets) == {(c.batch, c.context) for c in curves}
    for curve in curves:
        for hit, us in curve.points:
            reads = Reads(hit, 64 + 256 + 4)
            assert model.step_us(MacConfig(), reads, curve.batch, curve.context) == pytest.approx(us)
    assert curves_in(RESULTS, HeadLayout(7, 7, 64)) == ()
    with pytest.raises(InputError, match="cannot be read"):
        curves_in(Path(__file__), LAYOUT) or curves_in(Path("/nowhere.csv"), LAYOUT)


def test_the_curve_of_the_nearest_window_and_band_serves() -> None:
    curves = [
        Curve(1, 4096, window, band, ((0.0, us), (1.0, us))) for window, band, us in ((512, 256, 20), (1024, 512, 30))
    ]
    model = latency_model(LAYOUT, H100, curves, ())
    assert model.buckets == ((1, 4096),)
    for window, band, us in ((512, 256, 20), (256, 256, 20), (512, 128, 20), (1024, 512, 30), (1024, 256, 20)):
        config = MacConfig(window=window, band=band)
        got = model.step_us(config, Reads(1.0, 64 + band + 4), 1, 4096)
        assert got == pytest.approx(us, abs=0.7), (window, band)


def test_other_backends_and_configs_of_the_table_are_left_out(tmp_path: Path) -> None:
    with RESULTS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kept = [row for row in rows if (row["provider"], row["backend"], row["config"]) == ("mac", "triton", "careful")]
    assert 0 < len(kept) < sum(row["provider"] == "mac" for row in rows)
    alone = tmp_path / "decode.csv"
    with alone.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(kept)
    assert curves_in(alone, LAYOUT) == curves_in(RESULTS, LAYOUT)


def test_the_estimate_is_near_the_measurement_where_there_is_one() -> None:
    """Both models judge presets by ratios: over hit rates .4 to .9 they agree within a third."""
    curves = tuple(c for c in curves_in(RESULTS, LAYOUT) if c.batch > 1)
    measured = latency_model(LAYOUT, H100, curves, ())
    estimated = LatencyModel(LAYOUT, measured.gpu, measured.buckets)
    base, base_reads = MacConfig(), Reads(0.5, 400)
    for hit in (0.4, 0.6, 0.7, 0.8, 0.9):
        ratios = [model.ratio(base, Reads(hit, 400), base, base_reads) for model in (measured, estimated)]
        assert ratios[0] == pytest.approx(ratios[1], rel=0.33)


def test_curves_come_from_a_tuned_file() -> None:
    bucket = bucket_of(16, 4096, *rated({7: FAST}))
    (curve,) = curves_of(kernel_file(KEY, [bucket], window=512, band=256, provenance=FACTS))
    assert isinstance(curve, Curve) and [hit for hit, _ in curve.points] == [0.0, 1.0]
    assert curve.at(0.5) == pytest.approx((90 + 95) / 2, rel=0.02)


def test_a_curve_is_over_the_hits_that_were_planted() -> None:
    """Of three kv groups no share of .9 or .5 can hit: all or one do."""
    file = kernel_file(KEY, [bucket_of(1, 4096, *rated({7: FAST}))], window=512, band=256, provenance=FACTS)
    bucket = dataclasses.replace(
        file.buckets[0],
        latency={hit: dataclasses.replace(file.buckets[0].ratio, value=us) for hit, us in BY_HIT.items()},
    )
    key = dataclasses.replace(KEY, num_qo_heads=9, num_kv_heads=3)
    (curve,) = curves_of(dataclasses.replace(file, key=key, buckets=(bucket,)))
    assert [hit for hit, _ in curve.points] == pytest.approx([0, 1 / 3, 1])
    assert curve.points[1][1] == BY_HIT["0.5"] and curve.points[0][1] == BY_HIT["0"]


BY_HIT = {"1": 10.0, "0.9": 10.0, "0.5": 30.0, "0": 31.0}


def test_what_is_confirmed_is_spread_over_levels_of_divergence() -> None:
    from optuna.trial import create_trial

    trials = [
        create_trial(value=latency, user_attrs={"divergence": divergence})
        for latency, divergence in ((0.5, 1.1), (0.6, 1.0), (0.7, 0.9), (0.8, 0.5), (0.9, 0.2))
    ]
    assert [trial.value for trial in spread(trials, 1.0, 3)] == [0.5, 0.8, 0.9]
    assert [trial.value for trial in spread(trials[:1], 1.0, 3)] == [0.5]
