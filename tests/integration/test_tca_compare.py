"""TCA beside other policies on a tiny random model, and its calibration."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tca_budgets import CONFIG, budgets_for
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mac_autotune.calibrate_tca import calibrate, default_window
from mac_autotune.quality.rules import parse_rule, parse_rules
from mac_kernels import ConfigError, InputError, MacConfig
from mac_kernels.tca import TcaConfig
from mac_kernels.tca.candidates import NUM_SPARSE, decode_keep, far_count
from mac_kernels.tca.config import far_blocks
from mac_transformers.compare import Comparison, compare
from mac_transformers.policies import Mac, Tca, Window

VOCAB, PROMPT, STEPS = 61, 76, 30
CHOICES = [[0, 5], [NUM_SPARSE, 2]]
DENSE = [[NUM_SPARSE] * 2] * 2


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (3, PROMPT + STEPS + 1), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def result(model: PreTrainedModel, tokens: torch.Tensor) -> Comparison:
    sparse, none = budgets_for(model, CHOICES), budgets_for(model, DENSE)
    policies = {
        "window:tca": Window(like="tca"),
        "tca": Tca(CONFIG, sparse),
        "later": Tca(CONFIG, sparse, prefill="dense"),
        "all": Tca(CONFIG, none),
        "all later": Tca(CONFIG, none, prefill="dense"),
    }
    return compare(model, tokens[:, :PROMPT], tokens[:, PROMPT:], policies)


def test_dense_heads_change_nothing(result: Comparison) -> None:
    for name in ("all", "all later"):
        index = result.index(name)
        assert float(result.kl[:, index].max()) < 1e-5
        assert bool((result.kv_read[:, :, index] == 1).all())
        assert torch.equal(result.chosen[:, index], result.chosen[:, 0])


def test_sparse_heads_change_something_and_a_sparse_prompt_more(result: Comparison) -> None:
    later, tca = (result.kl[:, result.index(name)].mean() for name in ("later", "tca"))
    assert 1e-4 < later < tca
    # before the first decoded token they differ by the prompt alone
    assert torch.equal(result.chosen[0, result.index("later")], result.chosen[0, 0])


def test_what_is_read_is_known_from_budgets_and_lengths(result: Comparison) -> None:
    first = far_blocks(PROMPT - 1, CONFIG)
    for step in range(STEPS):
        length = PROMPT + step + 1
        last = far_blocks(length - 1, CONFIG)
        for layer, heads in enumerate(CHOICES):
            read = []
            for candidate in heads:
                kept = far_count(candidate, first, CONFIG) + (last - first) * decode_keep(candidate, CONFIG.block)
                window = length - CONFIG.sinks - last * CONFIG.block
                read.append(length if candidate == NUM_SPARSE else kept + window)
            expected = torch.full((3,), sum(read) / 2 / length)
            for name in ("tca", "later"):
                torch.testing.assert_close(result.kv_read[step, layer, result.index(name)], expected)


def test_the_window_control_reads_as_much(result: Comparison) -> None:
    window, tca = (result.kv_read[:, :, result.index(name)].mean(1) for name in ("window:tca", "tca"))
    assert bool(((window[1:] - tca[:-1]).abs() < 2 / PROMPT).all())


def test_budgets_of_another_model_are_refused(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    budgets = budgets_for(model, CHOICES)
    other = dataclasses.replace(
        budgets, key=dataclasses.replace(budgets.key, num_layers=1), retained=budgets.retained[:1]
    )
    with pytest.raises(InputError, match="1 layers of 2 kv heads"):
        compare(model, tokens[:, :PROMPT], tokens[:, PROMPT:], {"tca": Tca(CONFIG, other)})


def test_rules_name_what_they_take(model: PreTrainedModel) -> None:
    ours = budgets_for(model, CHOICES)
    literal = dataclasses.replace(ours, config=dataclasses.replace(CONFIG, rule="literal"), measure="raw")
    rules = parse_rules("tca,mass=.5 tca,rule=literal,prefill=dense window:tca,mass=.5", budgets=[ours, literal])
    first, second, window = rules.values()
    assert first == Tca(dataclasses.replace(CONFIG, mass_target=0.5), ours)
    assert second == Tca(literal.config, literal, prefill="dense")
    assert window == Window(like="tca,mass=.5")
    assert parse_rule("tca,measure=raw", budgets=[ours, literal]).budgets is literal
    for wrong in ("tca,mass=.5,measure=row", "tca,sinks=0", "tca,local_windo=8", "tca,prefill=no", "tca,mass"):
        with pytest.raises(ConfigError):
            parse_rule(wrong, budgets=[ours, literal])
    with pytest.raises(ConfigError, match="--budgets FILE"):
        parse_rule("tca")


MAC = MacConfig(window=8, band=8, sinks=2, min_context=16, threshold=-0.6, influence=None, max_age=32)
MISSES = dataclasses.replace(CONFIG, refresh=6, mass_target=0.05)  # a low target trusts nearly every selection


@pytest.fixture(scope="module")
def missed(model: PreTrainedModel, tokens: torch.Tensor) -> Comparison:
    def mac(target: float, choices: list[list[int]]) -> Mac:
        tca = dataclasses.replace(MISSES, mass_target=target)
        return Mac(dataclasses.replace(MAC, tca=tca), budgets=budgets_for(model, choices))

    policies = {
        "mac": Mac(MAC),
        "dense": mac(0.05, DENSE),
        "distrusted": mac(1.0, CHOICES),
        "mac+tca": mac(0.05, CHOICES),
        "window:mac+tca": Window(like="mac+tca"),
    }
    return compare(model, tokens[:, :PROMPT], tokens[:, PROMPT:], policies)


def test_misses_by_tca_are_mac_where_nothing_is_left_out(missed: Comparison) -> None:
    """Dense heads, and selections that are never trusted; the reading of keys to select is what it costs."""
    mac = missed.index("mac")
    anew = (torch.arange(STEPS) % (MISSES.refresh + 1) == MISSES.refresh).float() / 2
    assert bool((missed.group_hit[:, :, mac].mean((0, 2)) > 0.1).all())
    for name in ("dense", "distrusted"):
        place = missed.index(name)
        torch.testing.assert_close(missed.kl[:, place], missed.kl[:, mac], atol=1e-5, rtol=1e-3)
        assert torch.equal(missed.group_hit[:, :, place], missed.group_hit[:, :, mac])
        more = missed.kv_read[:, :, place] - missed.kv_read[:, :, mac]
        torch.testing.assert_close(more, anew[:, None, None].expand_as(more))


def test_misses_by_tca_read_less_and_cost_something(missed: Comparison) -> None:
    both, mac, window = (missed.index(name) for name in ("mac+tca", "mac", "window:mac+tca"))
    selected = torch.arange(STEPS) % (MISSES.refresh + 1) == MISSES.refresh
    less = (missed.kv_read[:, :, mac] - missed.kv_read[:, :, both])[~selected].mean((0, 2))
    # the second layer's first head is dense, the other three keep few tokens of the far blocks
    assert float(less[0]) > 1.5 * float(less[1]) > 0.1
    assert float(missed.kl[:, both].mean()) > float(missed.kl[:, mac].mean())
    shares = (missed.kv_read[:, :, place].mean(1) for place in (window, both))
    ours, theirs = next(shares)[1:], next(shares)[:-1].clamp(max=1)  # a step that selects reads keys twice
    assert bool(((ours - theirs).abs() < 2 / PROMPT).all())


def test_rules_of_misses_by_tca(model: PreTrainedModel) -> None:
    ours = budgets_for(model, CHOICES)
    rule = "fast+tca,W=8,S=8,F=2,context=16,tca.mass=.5"
    policy = parse_rule(rule, budgets=[ours])
    tca = dataclasses.replace(CONFIG, mass_target=0.5, refresh=CONFIG.block)
    config = MacConfig.preset("fast", window=8, band=8, sinks=2, min_context=16, tca=tca)
    assert policy == Mac(config, budgets=ours)
    assert parse_rule(rule + ",tca.refresh=3,rows=int8", budgets=[ours]).config.tca.refresh == 3
    for wrong, why in (
        ("fast+tca,W=8,S=8,F=2,context=16,tca.sinks=2", "--budgets FILE"),
        ("fast+lsh", "unknown method 'lsh'"),
        ("fast+tca,W=9,S=8,F=2,context=16", r"tca\.local_window=16 must be >= band \+ window = 17"),
        ("fast,tca=on", "unknown key 'tca'"),
        ("fast+tca,tca.mas=.5", "unknown key 'mas'"),
    ):
        with pytest.raises(ConfigError, match=why):
            parse_rule(wrong, budgets=[] if "FILE" in why else [ours])
    with pytest.raises(InputError, match="both or neither"):
        Mac(config)


def test_calibration_reads_each_passage_and_averages(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    seen: list[tuple[int, int]] = []
    both = calibrate(model, list(tokens[:2]), config=CONFIG, progress=lambda *at: seen.append(at))
    apart = [calibrate(model, [one], config=CONFIG) for one in tokens[:2]]
    assert seen == [(place + 1, 4) for place in range(4)]
    for measure, table in both.items():
        assert torch.tensor(table).shape == (2, 2, NUM_SPARSE)
        mean = (torch.tensor(apart[0][measure]) + torch.tensor(apart[1][measure])) / 2
        torch.testing.assert_close(torch.tensor(table), mean, atol=1e-4, rtol=0)
    assert torch.tensor(both["norm"]).amax() <= 1 and torch.tensor(both["row"]).amin() >= 0
    with pytest.raises(InputError, match="at least 27 tokens"):
        calibrate(model, [tokens[0, :26]], config=CONFIG)


def test_the_default_window_grows_with_the_context_up_to_the_published_one() -> None:
    assert [default_window(context, 128) for context in (1024, 8192, 32768, 131072)] == [128, 512, 2048, 4096]
    assert TcaConfig().local_window == 4096
