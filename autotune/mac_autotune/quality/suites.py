"""The quality suites: each runs several rules over a shared prompt and yields rows of the table as cells finish."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mac_transformers.batch import FULL
from mac_transformers.compare import Comparison, compare
from mac_transformers.policies import Policy

from . import metrics, needle, texts

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)``."""
ANSWER_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Cell:
    """One rule on one task: what was reused, and the metrics with their intervals."""

    suite: Literal["kl", "needle"]
    task: str
    text: str
    config: str
    context: int
    tokens: int
    reuse: metrics.Reuse
    metrics: Mapping[str, metrics.Estimate]


@dataclass(frozen=True, slots=True)
class Bench:
    """A model, its tokenizer, and how progress is told."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    progress: Progress

    def step(self, what: str) -> Callable[[int, int], None]:
        """The progress of one comparison."""
        return lambda done, total: self.progress(what, done, total)


def kl_suite(
    bench: Bench,
    rules: Mapping[str, Policy],
    *,
    names: Sequence[texts.TextName],
    prompt_tokens: int,
    tokens: int,
    passages: int,
    seconds: float | None = None,
) -> list[Cell]:
    """Teacher-forced divergence from full attention.

    All texts and rules advance together. ``tokens`` per text are spread over ``passages`` that do not overlap;
    ``greedy`` is the model's own continuation of other passages of the documentation. ``seconds`` ends the decoding
    early, with fewer tokens.
    """
    steps = tokens // passages
    whole = [_text(bench, name, prompt_tokens, steps + 1, passages) for name in names]
    batch = torch.cat(whole)
    result = compare(
        bench.model,
        batch[:, :prompt_tokens],
        batch[:, prompt_tokens:],
        rules,
        progress=bench.step("kl"),
        seconds=seconds,
    )
    cells = []
    for index, name in enumerate(names):
        rows = slice(index * passages, (index + 1) * passages)
        for rule in rules:
            shares, found = metrics.reuse(result, rule, rows), metrics.divergence(result, rule, rows)
            done = len(result.kl) * passages
            cells.append(Cell("kl", "teacher_forced", name, rule, prompt_tokens, done, shares, found))
    return cells


def needle_suite(
    bench: Bench,
    rules: Mapping[str, Policy],
    *,
    tasks: Sequence[str],
    modes: Sequence[needle.Mode],
    prompt_tokens: int,
    trials: int,
    rows: int,
    seconds: float | None = None,
) -> Iterator[list[Cell]]:
    """Retrieval against full attention, one task and mode after the other.

    Trials are drawn until ``trials`` are found in which full attention finds something (at most four times as many are
    drawn); only those are run under the rules. The metric ``recall`` of a rule is the share of full attention's recall
    that it keeps; of ``full`` it is its recall over all trials drawn, so that a hard cell is seen. ``rows`` bounds how
    many sequences are decoded at once; ``seconds`` is the time after which no further cell is begun.
    """
    begin = time.monotonic()
    for task in tasks:
        for mode in modes:
            if seconds is not None and time.monotonic() - begin > seconds:
                return
            yield _needle_cell(bench, rules, task, mode, prompt_tokens, trials, rows)


def _needle_cell(
    bench: Bench,
    rules: Mapping[str, Policy],
    task: str,
    mode: needle.Mode,
    prompt_tokens: int,
    trials: int,
    rows: int,
) -> list[Cell]:
    name = f"{task}/{mode}"
    drawn: list[tuple[needle.Trial, float]] = []
    for low in range(0, 4 * trials, trials):
        fresh = [
            needle.make_trial(bench.tokenizer, task, length=prompt_tokens, mode=mode, seed=seed)
            for seed in range(low, low + trials)
        ]
        for some in _chunks(fresh, rows):
            recall, _ = _ask(bench, some, {}, f"{name} full")
            drawn += zip(some, recall[0].tolist(), strict=True)
        if sum(found > 0 for _, found in drawn) >= trials:
            break
    everything = np.array([found for _, found in drawn])
    full = metrics.estimate(everything, lambda x: float(x.mean()), block=1)
    nothing = metrics.Reuse(0.0, 0.0, 1.0)
    cells = [Cell("needle", name, "docs", FULL, prompt_tokens, ANSWER_TOKENS, nothing, {"recall": full})]
    scored = [trial for trial, found in drawn if found > 0][:trials]
    kept, results = [], []
    for some in _chunks(scored, max(1, rows // (len(rules) + 1))):
        recall, result = _ask(bench, some, rules, name)
        kept.append(recall[1:] / np.maximum(recall[:1], 1e-9))
        results.append((result, len(some)))
    for index, rule in enumerate(rules if scored else ()):
        share = np.minimum(np.concatenate([part[index] for part in kept]), 1.0)
        found = metrics.estimate(share, lambda x: float(x.mean()), block=1)
        reuse = _mean_reuse([(metrics.reuse(result, rule, slice(None)), count) for result, count in results])
        cells.append(Cell("needle", name, "docs", rule, prompt_tokens, ANSWER_TOKENS, reuse, {"recall": found}))
    return cells


def _ask(
    bench: Bench, trials: Sequence[needle.Trial], rules: Mapping[str, Policy], what: str
) -> tuple[np.ndarray, Comparison]:
    """Recall of full attention and of every rule, [1 + rules, trials]."""
    result = compare(
        bench.model,
        torch.stack([trial.prompt for trial in trials]),
        needle.continuations(trials, answer_tokens=ANSWER_TOKENS),
        rules,
        progress=bench.step(what),
    )
    answers = needle.answers(bench.tokenizer, trials, result.chosen, answer_tokens=ANSWER_TOKENS)
    recall = [[trial.recall(text) for trial, text in zip(trials, row, strict=True)] for row in answers]
    return np.array(recall), result


def _text(bench: Bench, name: texts.TextName, prompt: int, steps: int, passages: int) -> torch.Tensor:
    if name != "greedy":
        return texts.passages(bench.tokenizer, name, length=prompt + steps, count=passages)
    prompts = texts.passages(bench.tokenizer, "docs", length=prompt, count=passages, seed=1)
    return torch.cat((prompts, texts.greedy_continuation(bench.model, prompts, length=steps)), dim=1)


def _mean_reuse(parts: Sequence[tuple[metrics.Reuse, int]]) -> metrics.Reuse:
    weight = np.array([count for _, count in parts], dtype=float)
    values = np.array([(part.group_hit, part.head_hit, part.kv_read) for part, _ in parts])
    return metrics.Reuse(*(values * weight[:, None] / weight.sum()).sum(0).tolist())


def _chunks(items: Sequence[needle.Trial], size: int) -> Iterator[list[needle.Trial]]:
    for low in range(0, len(items), max(size, 1)):
        yield list(items[low : low + size])
