"""TCA: the file of a model's budgets, and what is chosen from it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from mac_kernels import ConfigError
from mac_kernels.tca import TcaBudgets, TcaConfig, find_budgets, select_far
from mac_kernels.tca.budgets import CalibrationRun
from mac_kernels.tca.candidates import NUM_SPARSE, mean_keep
from mac_kernels.tuned import ModelKey

KEY = ModelKey(name="tiny", num_layers=2, num_qo_heads=4, num_kv_heads=2, head_dim=8, vocab_size=99)
CONFIG = TcaConfig(block=64, local_window=512)
RUN = CalibrationRun(
    texts=("docs",), samples=1, tokens=4096, versions={"torch": "2"}, date="2026-01-01", command="mac-kernels tca"
)
RISING = tuple((place + 1) / NUM_SPARSE for place in range(NUM_SPARSE))
FLAT = (0.5,) * NUM_SPARSE
BUDGETS = TcaBudgets(key=KEY, config=CONFIG, measure="norm", retained=((RISING, FLAT), (FLAT, RISING)), run=RUN)


def test_a_file_survives_writing_and_reading(tmp_path: Path) -> None:
    tuned = dataclasses.replace(BUDGETS, config=dataclasses.replace(CONFIG, mass_target=0.5))
    path = tmp_path / BUDGETS.file_name
    assert path.name == "tca,model=tiny.json"
    for budgets in (BUDGETS, tuned):
        budgets.save(path)
        assert TcaBudgets.load(path) == budgets


def test_the_share_that_is_read_is_that_of_what_is_selected() -> None:
    length, config = 2000, dataclasses.replace(CONFIG, mass_target=0.5)
    s = torch.rand(1, 2, length, generator=torch.Generator().manual_seed(0))
    kept = []
    for choice in BUDGETS.choices(config):
        far = select_far(s, [length], choice, config=config).far
        kept.append((far.count + length - far.far_end)[0].float().mean() / length)
    assert BUDGETS.share_read(config, length) == pytest.approx(float(sum(kept)) / 2)
    assert BUDGETS.share_read(config, 500) == 1  # nothing is far yet
    assert BUDGETS.share_read(dataclasses.replace(config, mass_target=0.9), length) > 0.7  # half of the heads are dense


def test_the_target_chooses_the_smallest_budget_of_every_head() -> None:
    at = {target: BUDGETS.choices(dataclasses.replace(CONFIG, mass_target=target)) for target in (0.5, 0.9)}
    assert at[0.5] == ((6, 0), (0, 6))
    assert at[0.9] == ((12, NUM_SPARSE), (NUM_SPARSE, 12))
    share = BUDGETS.far_share(dataclasses.replace(CONFIG, mass_target=0.5))
    assert share == pytest.approx((mean_keep(6, 64) + mean_keep(0, 64)) / 2 / 64)


@pytest.mark.parametrize(
    "changes",
    [{"block": 128}, {"local_window": 1024}, {"sinks": 0}, {"rule": "literal"}, {"rule": "literal", "alpha": 0.1}],
)
def test_another_config_than_calibrated_for_is_refused_by_name(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"tca\.{next(iter(changes))}=.*calibrate again"):
        BUDGETS.choices(TcaConfig(**{**CONFIG.to_dict(), **changes}))


def test_mode_and_alpha_of_the_rule_that_has_none_do_not_matter() -> None:
    assert BUDGETS.choices(dataclasses.replace(CONFIG, mode="evict", alpha=0.1)) == BUDGETS.choices(CONFIG)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.update(schema=2), "schema 1"),
        (lambda data: data.update(kind="policy"), "schema 1"),
        (lambda data: data["tca"].update(blok=3), "unknown key 'blok'"),
        (lambda data: data["key"].pop("head_dim"), "head_dim"),
        (lambda data: data.update(measure="mass"), "measure='mass'"),
        (lambda data: data["retained"].pop(), "layer, kv head"),
        (lambda data: data["retained"][0][1].pop(), "layer, kv head"),
        (lambda data: data["retained"][0][1].__setitem__(0, "much"), "finite"),
        (lambda data: data.update(more=1), "unknown"),
        (lambda data: data.pop("run"), "run"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(change: object, words: str) -> None:
    data = json.loads(BUDGETS.to_json())
    change(data)
    with pytest.raises(ConfigError, match=f"here.json: .*{words}"):
        TcaBudgets.from_json(json.dumps(data), source="here.json")


def test_the_strongest_place_and_the_models_own_name_win(tmp_path: Path) -> None:
    user, named = tmp_path / "user", tmp_path / "env"
    other = dataclasses.replace(BUDGETS, key=dataclasses.replace(KEY, name="another"))
    for place, files in ((user, (other, BUDGETS)), (named, (other,))):
        for file in files:
            file.save(place / file.file_name)
    assert find_budgets(KEY, environ={}, user_dir=user) == BUDGETS
    assert find_budgets(KEY, environ={"MAC_KERNELS_CONFIG": str(named)}, user_dir=user) == other
    unnamed = dataclasses.replace(KEY, name="")
    assert find_budgets(unnamed, environ={}, user_dir=user) == other
    with pytest.raises(ConfigError, match="mac-kernels tca calibrate --model tiny"):
        find_budgets(dataclasses.replace(KEY, num_layers=3), environ={}, user_dir=user)
