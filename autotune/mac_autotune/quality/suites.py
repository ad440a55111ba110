"""The quality suites: each runs several rules over a shared prompt and yields rows of the table as cells finish."""

from __future__ import annotations

import math
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

from . import drift, metrics, needle, texts

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)``."""
ANSWER_TOKENS = 24
_HOPELESS = 0.1  # share of useful trials below which a needle cell is not worth its time


@dataclass(frozen=True, slots=True)
class Cell:
    """One rule on one task: what was reused, and the metrics with their intervals."""

    suite: Literal["kl", "needle", "freerun", "drift"]
    task: str
    text: str
    config: str
    context: int
    tokens: int
    reuse: metrics.Reuse
    metrics: Mapping[str, metrics.Estimate]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one rule answered in one needle trial.

    ``apart``: the first token of the answer that full attention did not give, and ``margin``, the nats by which full
    attention preferred its own there; ``None`` where they agree.
    """

    task: str
    context: int
    trial: int
    config: str
    recall: float
    text: str
    apart: int | None
    margin: float | None


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
    curve: Sequence[str] = (),
    seconds: float | None = None,
) -> list[Cell]:
    """Teacher-forced divergence from full attention.

    All texts and rules advance together. ``tokens`` per text are spread over ``passages`` that do not overlap;
    ``greedy`` is the model's own continuation of other passages of the documentation. ``curve`` names rules that all
    others are compared with where they read as much (``kl_ratio``). ``seconds`` ends the decoding early, with fewer
    tokens.
    """
    begin, steps = time.monotonic(), tokens // passages
    whole = [_text(bench, name, prompt_tokens, steps + 1, passages) for name in names]
    batch = torch.cat(whole)
    result = compare(
        bench.model,
        batch[:, :prompt_tokens],
        batch[:, prompt_tokens:],
        rules,
        progress=bench.step("kl"),
        seconds=None if seconds is None else seconds - (time.monotonic() - begin),
    )
    cells = []
    for index, name in enumerate(names):
        rows = slice(index * passages, (index + 1) * passages)
        for rule in rules:
            shares, found = metrics.reuse(result, rule, rows), metrics.divergence(result, rule, rows)
            ratio = None if rule in curve else metrics.equal_read_ratio(result, rule, curve, rows)
            if ratio is not None:
                found["kl_ratio"] = ratio
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
    told: Callable[[Sequence[Answer]], None] = lambda answers: None,
) -> Iterator[list[Cell]]:
    """Retrieval against full attention, one task and mode after the other; every batch of trials gives the cell anew.

    Trials are drawn until ``trials`` are found in which full attention finds something (at most four times as many are
    drawn; the rules are left out once the first ``trials`` show that full attention fails). Metrics of a rule:
    ``recall``, the share of full attention's recall that it keeps where full attention finds something; ``found``, its
    recall over all trials, to be compared with the same of ``full``; ``lost`` and ``won``, the shares of all trials in
    which it finds less and more than full attention. Choosing trials by what full attention finds is unfair to all
    others on trials that could go either way; the last three are not. ``rows`` bounds how many sequences are decoded at
    once; after ``seconds`` no further cell is begun and a cell ends with the trials that it has. ``told`` is called
    with the answers of every batch of trials.
    """
    begin = time.monotonic()
    for task in tasks:
        for mode in modes:
            left = math.inf if seconds is None else begin + seconds - time.monotonic()
            if left <= 0:
                return
            yield from _needle_cell(bench, rules, task, mode, prompt_tokens, trials, rows, left, told)


def freerun_suite(
    bench: Bench, rules: Mapping[str, Policy], *, prompt_tokens: int, tokens: int, passages: int, seconds: float | None
) -> list[Cell]:
    """Every rule writes its own greedy continuation of the same prompts from the documentation.

    Metrics, by passage: ``agreement``, tokens until the first that full attention did not write; ``repetition``, share
    of the 4-grams written that were written before (``full`` has a row of its own to compare with).
    """
    prompts = texts.passages(bench.tokenizer, "docs", length=prompt_tokens, count=passages, seed=2)
    own = torch.full((passages, tokens + 1), -1)
    result = compare(bench.model, prompts, own, rules, progress=bench.step("freerun"), seconds=seconds)
    written = result.chosen.permute(1, 2, 0)  # [rules, passages, tokens]
    cells = []
    for index, rule in enumerate(result.policies):
        apart = (written[index] != written[0]).int()
        until = torch.where(apart.any(1), apart.argmax(1), apart.shape[1])
        repeated = [metrics.repetition(row.tolist()) for row in written[index]]
        found = {
            name: metrics.estimate(np.array(values, dtype=float), lambda x: float(x.mean()), block=1)
            for name, values in (("agreement", until.tolist()), ("repetition", repeated))
        }
        shares = metrics.reuse(result, rule, slice(None))
        cells.append(Cell("freerun", "greedy", "docs", rule, prompt_tokens, len(result.kl), shares, found))
    return cells


def drift_suite(
    bench: Bench, rules: Mapping[str, Policy], *, prompt_tokens: int, tokens: int, passages: int, seconds: float | None
) -> list[Cell]:
    """Decode long passages of the documentation, teacher-forced, to see whether the error grows.

    Tasks: ``steps A-B``, divergence from full attention in a stretch of the passages; ``age A-B`` and ``hops A-B``,
    relative L2 error (``rel_l2``) of reused groups against exact attention of the same query over the same cache, by
    the distance to their anchor and by how often their state was handed on.
    """
    whole = texts.passages(bench.tokenizer, "docs", length=prompt_tokens + tokens + 1, count=passages)
    watch = drift.Watch()
    result = compare(
        bench.model,
        whole[:, :prompt_tokens],
        whole[:, prompt_tokens:],
        rules,
        progress=bench.step("drift"),
        seconds=seconds,
        observe=watch,
    )
    steps, cells = len(result.kl), []
    for rule in rules:
        for low in range(0, steps, drift.STRETCH):
            part = result.steps(low, low + drift.STRETCH)
            task = f"steps {low}-{min(low + drift.STRETCH, steps)}"
            shares, found = metrics.reuse(part, rule, slice(None)), metrics.divergence(part, rule, slice(None))
            cells.append(Cell("drift", task, "docs", rule, prompt_tokens, steps, shares, found))
        shares = metrics.reuse(result, rule, slice(None))
        for task, errors in watch.bins(rule):
            mean = {"rel_l2": metrics.estimate(errors, lambda x: float(x.mean()), block=metrics.BLOCK)}
            cells.append(Cell("drift", task, "docs", rule, prompt_tokens, steps, shares, mean))
    return cells


def _needle_cell(
    bench: Bench,
    rules: Mapping[str, Policy],
    task: str,
    mode: needle.Mode,
    prompt_tokens: int,
    trials: int,
    rows: int,
    seconds: float,
    told: Callable[[Sequence[Answer]], None],
) -> Iterator[list[Cell]]:
    name, begin = f"{task}/{mode}", time.monotonic()
    recalls: list[np.ndarray] = []
    results: list[tuple[Comparison, int]] = []
    size = max(1, rows // (len(rules) + 1))
    scored = 0
    for low in range(0, 4 * trials, size):
        seeds = range(low, min(low + size, 4 * trials))
        some = [needle.make_trial(bench.tokenizer, task, length=prompt_tokens, mode=mode, seed=seed) for seed in seeds]
        hopeless = low >= trials and scored < trials * _HOPELESS
        given, result = _ask(bench, some, {} if hopeless else rules, name, seeds)
        told(given)
        recall = np.array([answer.recall for answer in given]).reshape(-1, len(some))
        scored += int((recall[0] > 0).sum())
        if hopeless:
            recall = np.concatenate((recall, np.full((len(rules), len(some)), math.nan)))
        else:
            results.append((result, len(some)))
        recalls.append(recall)
        yield _needle_cells(name, rules, prompt_tokens, np.concatenate(recalls, axis=1), results)
        if scored >= trials or time.monotonic() - begin > seconds:
            return


def _needle_cells(
    name: str,
    rules: Mapping[str, Policy],
    prompt_tokens: int,
    recall: np.ndarray,
    results: Sequence[tuple[Comparison, int]],
) -> list[Cell]:
    """Cells of full attention and of every rule from ``recall`` [1 + rules, trials], NaN where a rule did not run."""

    def mean(values: np.ndarray) -> metrics.Estimate:
        return metrics.estimate(values, lambda x: float(x.mean()), block=1)

    cells = []
    for index, rule in enumerate((FULL, *rules)):
        ran = ~np.isnan(recall[index])
        useful = ran & (recall[0] > 0)
        found = {"found": mean(recall[index, ran])}
        gain = recall[index, ran] - recall[0, ran]
        if index == 0:
            reuse = metrics.Reuse(0.0, 0.0, 1.0)
        else:
            reuse = _mean_reuse([(metrics.reuse(result, rule, slice(None)), count) for result, count in results])
            if useful.any():
                found["recall"] = mean(np.minimum(recall[index, useful] / recall[0, useful], 1.0))
            found |= {"lost": mean((gain < 0).astype(float)), "won": mean((gain > 0).astype(float))}
        cells.append(Cell("needle", name, "docs", rule, prompt_tokens, ANSWER_TOKENS, reuse, found))
    return cells


def _ask(
    bench: Bench, trials: Sequence[needle.Trial], rules: Mapping[str, Policy], what: str, seeds: Sequence[int]
) -> tuple[list[Answer], Comparison]:
    """What full attention and every rule answer, trials innermost."""
    result = compare(
        bench.model,
        torch.stack([trial.prompt for trial in trials]),
        needle.continuations(trials, answer_tokens=ANSWER_TOKENS),
        rules,
        progress=bench.step(what),
    )
    answers = needle.answers(bench.tokenizer, trials, result.chosen, answer_tokens=ANSWER_TOKENS)
    given = []
    for policy, texts_of in enumerate(answers):
        for row, (trial, text) in enumerate(zip(trials, texts_of, strict=True)):
            free = slice(len(trial.forced), len(trial.forced) + ANSWER_TOKENS)
            apart = (result.chosen[free, policy, row] != result.chosen[free, 0, row]).nonzero()
            first = int(apart[0]) if len(apart) else None
            # the first token after an asked question is the exact prompt's: no rule can differ there
            margin = None if first is None else result.margin[free.start + first - 1, 0, row].item()
            config = result.policies[policy]
            given.append(Answer(what, len(trial.prompt), seeds[row], config, trial.recall(text), text, first, margin))
    return given, result


def _text(bench: Bench, name: texts.TextName, prompt: int, steps: int, passages: int) -> torch.Tensor:
    if name != "greedy":
        return texts.passages(bench.tokenizer, name, length=prompt + steps, count=passages)
    prompts = texts.passages(bench.tokenizer, "docs", length=prompt, count=passages, seed=1)
    return torch.cat((prompts, texts.greedy_continuation(bench.model, prompts, length=steps)), dim=1)


def _mean_reuse(parts: Sequence[tuple[metrics.Reuse, int]]) -> metrics.Reuse:
    weight = np.array([count for _, count in parts], dtype=float)
    values = np.array([(part.group_hit, part.head_hit, part.kv_read) for part, _ in parts])
    return metrics.Reuse(*(values * weight[:, None] / weight.sum()).sum(0).tolist())
