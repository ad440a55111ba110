"""The scaling model: it meets the committed tables, and more ranks take from a step what they share."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.scaling import compare, main, step
from benchmarks.sglang_latency import LLAMA_8B, LLAMA_70B

H200 = 4.3e6


def test_it_meets_what_one_and_two_gpus_measured() -> None:
    pairs = [
        pair
        for path in results.RESULTS.glob("*/sglang.csv")
        for row in results.read(path)
        if int(row["tp"]) <= 2
        if (pair := compare(row)) is not None
    ]
    assert len(pairs) >= 10
    for predicted, measured in pairs:
        assert predicted == pytest.approx(measured, rel=0.15)


def test_the_docs_show_what_the_model_says() -> None:
    text = (Path(__file__).parents[2] / "integrations/mac_sglang/tensor_parallel.md").read_text(encoding="utf-8")
    shown = re.findall(
        r"^\| (8|70)B, N = (\d), batch (\d+) \|(?:.*measured.*\n\| \|)? model \|(.*)\|$", text, re.MULTILINE
    )
    assert len(shown) == 8
    for size, ranks, batch, cells in shown:
        shape = {"8": LLAMA_8B, "70": LLAMA_70B}[size]
        one = step(shape, tp=int(ranks), batch=int(batch), context=122_880, bytes_per_us=H200)
        speeds = [int(batch) / one.total(config) * 1e6 for config in ("full", "always-hit", "never-hit")]
        assert [float(cell.split()[0]) for cell in cells.split("|")] == pytest.approx(speeds, rel=0.006)
        ratios = [float(ratio) for ratio in re.findall(r"\(([\d.]+)x\)", cells)]
        assert ratios == pytest.approx([speed / speeds[0] for speed in speeds[1:]], abs=0.006)


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_ranks_share_reading_and_nothing_else(batch: int) -> None:
    one, two, four = (step(LLAMA_70B, tp=tp, batch=batch, context=122_880, bytes_per_us=H200) for tp in (1, 2, 4))
    assert two.weights == one.weights / 2 and four.weights == one.weights / 4
    assert one.full > two.full > one.full / 2  # a layer's fixed part stays
    assert four.exchange == two.exchange > one.exchange == 0
    for size in (one, two, four):
        assert size.total("always-hit") < size.total("full")
    # what does not hit shrinks with the ranks, what hits hardly does: reuse is worth less per step on more ranks
    gains = [size.total("full") / size.total("always-hit") for size in (one, two, four)]
    assert gains[0] > gains[1] > gains[2] > 1


def test_other_rows_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    row = dict.fromkeys(results.COLUMNS, "")
    row |= {"metric": "throughput", "case": "latency", "gpu": "NVIDIA H200", "hq": "32", "batch": "1", "tp": "2"}
    row |= {"context": "1000", "config": "full", "p50": "100"}
    assert compare(row) is not None
    for change in ({"gpu": "none"}, {"metric": "ttft"}, {"case": "smollm2-distinct"}, {"hq": "9"}):
        assert compare({**row, **change}) is None
    assert main([]) == 0 and "always-hit" in capsys.readouterr().out
    assert LLAMA_8B["num_attention_heads"] == 32
