"""The matrix of servers: what counts as right, and that each thing that can be wrong is seen."""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from typing import Any

import pytest

from benchmarks import results, sglang_matrix
from benchmarks.serving import EXACT, Reference, ServerDiedError
from benchmarks.sglang_matrix import COMBINATIONS, _arguments, _examine, _rows
from mac_sglang.client import Reply

RIGHT, CLOSE, FAR = [5, 6, 7, 8], [5, 6, 9, 9], [5, 1, 1, 1]
REFERENCES = [Reference([1, 2, 3], RIGHT, [{5: 0.0}, {6: 0.0}, {7: 0.0, 9: 0.1}, {8: 0.0}])] * 2


class Server:
    """Answers exact requests and others with the given tokens, and counts as told."""

    def __init__(self, exact: list[int], **counts: float) -> None:
        self.exact, self.asked = exact, []
        self.counts = {"hits": 50, "restored": 9, "audited": 0, "error": 0.0, **counts}

    async def generate(self, prompt: list[int], *, sampling: Any = None, **fields: Any) -> Reply:
        self.asked.append((tuple(prompt), sampling))
        return Reply(0.0, self.exact if sampling == EXACT else FAR, [1.0] * 4, "", {})

    async def groups(self, server: Server) -> Counter[str]:
        done = len(self.asked)
        return Counter(HIT=done * self.counts["hits"], AGE=done * 100)

    async def counted(self, server: Server, name: str, label: str | None = None) -> Counter[str]:
        values = {"audit_groups_total": "audited", "audit_relative_error_sum_total": "error"}
        if label:
            return Counter(rows_restored=self.counts["restored"])
        return Counter({name: self.counts[values[name.removeprefix("mac_")]]})


def arguments(*more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    sglang_matrix.add_arguments(parser)
    args = parser.parse_args(["--tokens", "4", *more])
    return argparse.Namespace(**vars(args), tp=1, server_args=["--a", "--disable-prefill-cuda-graph"], command_line="")


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        (Server(RIGHT), None),
        (Server(CLOSE), None),
        (Server(FAR), "wrong tokens under exact"),
        (Server(RIGHT, hits=0), "no hits"),
        (Server(RIGHT, restored=0), "no ring was restored"),
        (Server(RIGHT, audited=10, error=1.0), None),
        (Server(RIGHT, audited=10, error=9.0), "the audit's error is out of range"),
        (Server(RIGHT, audited=10, error=float("nan")), "the audit's error is out of range"),
        (ServerDiedError("it died"), "it died"),
    ],
)
def test_what_is_wrong_is_seen(server: Any, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(server, Server):
        monkeypatch.setattr(sglang_matrix, "groups", server.groups)
        monkeypatch.setattr(sglang_matrix, "counted", server.counted)
    figures, reasons = asyncio.run(_examine(server, REFERENCES, arguments()))
    assert reasons == ([] if reason is None else [reason])
    if isinstance(server, Server):
        assert figures["answers_equal"] + figures["answers_equal_up_to_a_tie"] + figures["answers_wrong"] == 2
        turns = [prompt for prompt, sampling in server.asked if len(prompt) > 3]
        assert len(turns) == 2 and all(prompt[:3] == (1, 2, 3) for prompt in turns)


def test_every_combination_changes_the_server() -> None:
    plain = _arguments(arguments(), COMBINATIONS["plain"])
    assert "--disable-prefill-cuda-graph" in plain
    for name, one in COMBINATIONS.items():
        if name != "plain":
            assert _arguments(arguments(), one) != plain or one.serving
    assert "--disable-prefill-cuda-graph" not in _arguments(arguments(), COMBINATIONS["prefill-graphs"])


def test_rows_fit_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.serving.sglang_version", lambda: "sglang 0.5.23")
    shape = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    rows = [row for name in COMBINATIONS for row in _rows(name, {"hit_rate": 0.5}, arguments(), shape)]
    assert len({tuple(row[column] for column in results.KEY) for row in rows}) == len(COMBINATIONS)
    assert all(set(row) <= set(results.COLUMNS) for row in rows)
    assert [row["page_size"] for row in rows if row["case"].startswith("matrix-page")] == ["16", "64"]
