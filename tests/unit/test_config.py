"""MacConfig: ranges, presets and the JSON form."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mac_kernels import PRESETS, ConfigError, MacConfig
from mac_kernels.tca import TcaConfig

counts = st.integers(1, 10**6)
configs = st.builds(
    lambda band, sinks, spare, **rest: MacConfig(band=band, sinks=sinks, min_context=band + sinks + spare, **rest),
    band=counts,
    sinks=st.integers(0, 10**4),
    spare=counts,
    window=st.integers(2, 10**5),
    threshold=st.floats(allow_nan=False),
    influence=st.none() | st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False),
    correction=st.booleans(),
    max_age=st.none() | counts,
    match_scope=st.sampled_from(["head", "group"]),
    nominees=st.none() | counts,
    recompute_loaded_groups=st.booleans(),
)


@given(configs)
def test_json_round_trip(config):
    text = config.to_json()
    assert MacConfig.from_json(text) == config
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@given(configs)
def test_dict_round_trip(config):
    assert MacConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("threshold", [-math.inf, math.inf])
def test_infinite_thresholds_survive_json(threshold):
    assert MacConfig.from_json(MacConfig(threshold=threshold).to_json()).threshold == threshold


def test_tables_survive_json():
    config = MacConfig(thresholds=((0.5, 0.25),), influence_scale=((1.5,), (2.0,)))
    assert MacConfig.from_json(config.to_json()) == config
    assert hash(config) == hash(MacConfig.from_dict(config.to_dict()))


def test_presets_are_what_they_say():
    assert MacConfig() == PRESETS["careful"]
    assert PRESETS["balanced"].influence == 0.12
    assert PRESETS["fast"].influence == 0.15
    assert PRESETS["exact"].threshold >= 1
    paper = PRESETS["paper"]
    assert not paper.recompute_loaded_groups and not paper.correction and paper.influence is None
    for name, preset in PRESETS.items():
        assert MacConfig.preset(name) == preset
    assert MacConfig.preset("fast", window=64) == dataclasses.replace(PRESETS["fast"], window=64)


def test_preset_in_json_is_the_base_of_the_fields():
    text = json.dumps({"schema": 1, "preset": "balanced", "mac": {"window": 128}})
    assert MacConfig.from_json(text) == MacConfig(influence=0.12, window=128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 1}, r"window=1 must be >= 2"),
        ({"window": 0}, r"window=0 must be >= 2"),
        ({"window": 2.0}, r"window=2.0 must be an integer"),
        ({"window": True}, r"window=True must be an integer"),
        ({"band": 0}, r"band=0 must be >= 1"),
        ({"sinks": -1}, r"sinks=-1 must be >= 0"),
        ({"threshold": math.nan}, r"threshold=nan must be a number, not NaN"),
        ({"threshold": "0.5"}, r"threshold='0.5' must be a number"),
        ({"influence": 0}, r"influence=0 must be > 0"),
        ({"influence": math.nan}, r"influence=nan must be > 0"),
        ({"min_context": 260}, r"min_context=260 must be > band \+ sinks = 260"),
        ({"band": 4096}, r"min_context=2048 must be > band \+ sinks = 4100"),
        ({"max_age": 0}, r"max_age=0 must be >= 1"),
        ({"match_scope": "layer"}, r"match_scope='layer' must be 'head' or 'group'"),
        ({"nominees": 0}, r"nominees=0 must be >= 1"),
        ({"correction": 1}, r"correction=1 must be true or false"),
        ({"thresholds": 0.5}, r"thresholds=0.5 must be null or, for every layer, a list of numbers"),
        ({"thresholds": []}, r"thresholds=\(\) must be null"),
        ({"thresholds": [[0.5], [0.5, 0.4]]}, r"thresholds=.* must be null"),
        ({"thresholds": [[math.inf]]}, r"thresholds=\(\(inf,\),\) must be finite numbers"),
        ({"influence_scale": [["1"]]}, r"influence_scale=.* must be null"),
        ({"influence_scale": [[0.0]]}, r"influence_scale=\(\(0.0,\),\) must be finite numbers > 0"),
        ({"recompute_loaded_groups": None}, r"recompute_loaded_groups=None must be true or false"),
    ],
)
def test_out_of_range_names_field_value_and_range(changes, message):
    with pytest.raises(ConfigError, match=message):
        MacConfig(**changes)
    with pytest.raises(ConfigError, match=f"file.json: .*{message}"):
        MacConfig.from_dict(changes, source="file.json")


def test_all_problems_are_named_at_once():
    with pytest.raises(ConfigError, match=r"window=1 .*; sinks=-1"):
        MacConfig(window=1, sinks=-1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "schema None is not 1"),
        ('{"schema": 2}', "schema 2 is not 1"),
        ('{"schema": 1, "mac": []}', "'mac' must be an object"),
        ('{"schema": 1, "mca": {}}', "unknown key 'mca'; known keys: schema, preset, mac"),
        ('{"schema": 1, "mac": {"windw": 3}}', r"unknown key 'windw' \(did you mean 'window'\?\)"),
        ('{"schema": 1, "mac": {"threshold": NaN}}', "NaN is not JSON"),
        ('{"schema": 1, "mac": {"threshold": -Infinity}}', "write infinite thresholds as the strings"),
        ('{"schema": 1, "preset": "carefull"}', "unknown preset 'carefull'; choose one of careful"),
        ('{"schema": 1, "preset": ["careful"]}', "unknown preset"),
    ],
)
def test_bad_json_is_refused_with_its_source(text, message, tmp_path):
    with pytest.raises(ConfigError, match=f"here: .*{message}"):
        MacConfig.from_json(text, source="here")
    path = tmp_path / "mac.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"mac\.json"):
        MacConfig.load(path)


def test_missing_and_binary_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.json: cannot be read .*; give the path"):
        MacConfig.load(tmp_path / "absent.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="binary: cannot be read"):
        MacConfig.load(tmp_path / "binary")


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown preset 'ballanced' \(did you mean 'balanced'\?\)"):
        MacConfig.preset("ballanced")


def test_configs_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MacConfig().window = 3


TCA = {"refresh": 128, "local_window": 1024, "mass_target": 0.98}


def test_misses_by_tca_survive_json():
    config = MacConfig(tca=TcaConfig(**TCA))
    assert MacConfig.from_json(config.to_json()) == config == MacConfig.from_dict({"tca": TCA})
    assert json.loads(config.to_json())["mac"]["tca"]["local_window"] == 1024
    assert MacConfig().tca is None


@pytest.mark.parametrize(
    ("changes", "tca", "message"),
    [
        ({}, {"mode": "evict", "refresh": None}, r"tca\.mode='evict' must be 'index'"),
        ({}, {"refresh": None}, r"tca\.refresh=None must be set"),
        ({}, {"sinks": 0}, r"tca\.sinks=0 must be sinks = 4"),
        ({"window": 800}, {}, r"tca\.local_window=1024 must be >= band \+ window = 1056 tokens"),
        ({"max_age": None}, {}, r"max_age=None must be set with tca"),
        ({"recompute_loaded_groups": False}, {}, r"recompute_loaded_groups=False must be true with tca"),
        ({}, {"mass": 0.9}, r"tca: unknown key 'mass'"),
        ({}, {"block": 100}, r"tca: bad TcaConfig: block=100"),
    ],
    ids=["mode", "refresh", "sinks", "window", "age", "groups", "key", "value"],
)
def test_misses_by_tca_need_what_keeps_them_right(changes, tca, message):
    with pytest.raises(ConfigError, match=message):
        MacConfig.from_dict({**changes, "tca": {**TCA, **tca}})


def test_tca_must_be_an_object():
    with pytest.raises(ConfigError, match=r"tca=0\.9 must be null or an object of TcaConfig fields"):
        MacConfig.from_dict({"tca": 0.9})
