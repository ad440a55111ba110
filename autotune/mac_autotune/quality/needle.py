"""Retrieval tasks in the manner of RULER (arXiv 2404.06654): facts hidden in a long text, asked for at its end."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from mac_kernels import InputError

from .texts import shuffled_docs

Mode = Literal["asked", "decoded", "generated"]
MODES: tuple[Mode, ...] = ("asked", "decoded", "generated")
"""``asked``: the question is part of the prompt, only the answer is decoded. ``decoded``: the prompt ends before the
question, whose tokens are then decoded under the policy too. ``generated``: before the question the policy also writes
``GENERATED`` tokens of its own."""
GENERATED = 512  # a whole ring: no row is left that the prompt filled

_NAMES = [
    "amber", "anchor", "basil", "beacon", "bishop", "bronze", "candle", "canyon", "cedar", "cobalt", "copper",
    "coral", "cotton", "cricket", "crystal", "desert", "ember", "falcon", "fennel", "forest", "garnet", "ginger",
    "glacier", "harbor", "hazel", "indigo", "island", "ivory", "jasmine", "juniper", "lantern", "lemon", "linen",
    "lotus", "magnet", "maple", "marble", "meadow", "mirror", "nectar", "oasis", "olive", "onyx", "opal", "orchid",
    "oyster", "pebble", "pepper", "pigeon", "planet", "prairie", "quartz", "raven", "ribbon", "saddle", "saffron",
    "silver", "sparrow", "spruce", "summit", "sunset", "tiger", "timber", "topaz", "tulip", "velvet", "violet",
    "walnut", "willow", "winter", "zebra", "zephyr",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Puzzle:
    """Sentences to hide, the question, the beginning of the answer and the strings that the answer must contain."""

    hidden: tuple[str, ...]
    question: str
    prefix: str
    expected: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Trial:
    """A prompt of exactly the asked length, the tokens fed after it, and what the free continuation must contain.

    A token of -1 in ``forced`` is the policy's own choice.
    """

    task: str
    prompt: torch.Tensor
    forced: tuple[int, ...]
    expected: tuple[str, ...]

    def recall(self, answer: str) -> float:
        """Share of the expected strings that occur in the answer, upper and lower case being the same."""
        return sum(text.lower() in answer.lower() for text in self.expected) / len(self.expected)


def _number(rng: random.Random) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))


def _magic(name: str, number: str) -> str:
    return f"One of the special magic numbers for {name} is: {number}."


def _keys(rng: random.Random, count: int) -> Puzzle:
    names = rng.sample(_NAMES, count)
    numbers = [_number(rng) for _ in names]
    return Puzzle(
        tuple(map(_magic, names, numbers)),
        f"What is the special magic number for {names[0]} mentioned in the text above?",
        f"One of the special magic numbers for {names[0]} is:",
        (numbers[0],),
    )


def single(rng: random.Random) -> Puzzle:
    """One number for one word."""
    return _keys(rng, 1)


def multi_key(rng: random.Random) -> Puzzle:
    """Four words with a number each; one of them is asked for."""
    return _keys(rng, 4)


def multi_value(rng: random.Random) -> Puzzle:
    """Two numbers for one word; both are asked for."""
    name = rng.choice(_NAMES)
    numbers = [_number(rng) for _ in range(2)]
    return Puzzle(
        tuple(_magic(name, number) for number in numbers),
        f"What are all the special magic numbers for {name} mentioned in the text above?",
        f"The special magic numbers for {name} are:",
        tuple(numbers),
    )


def variable_tracking(rng: random.Random) -> Puzzle:
    """A value handed on from variable to variable; the last one's value is asked for."""
    names = rng.sample(_NAMES, 3)  # words: letters at random are several tokens each, which small models mix up
    value = str(rng.randrange(10_000, 100_000))
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))]
    return Puzzle(
        tuple(chain),
        f"Find all variables that are assigned the value {value} in the text above.",
        f"The {len(names)} variables that are assigned the value {value} are: {names[0]},",
        tuple(names[1:]),
    )


def common_words(rng: random.Random) -> Puzzle:
    """A word repeated far more often than the others; it is asked for."""
    words = rng.sample(_NAMES, 12)
    days = [words[0]] * 10 + words[1:]
    rng.shuffle(days)
    return Puzzle(
        tuple(f"The word of the day is {word}." for word in days),
        "Which word is the word of the day most often in the text above?",
        "The word of the day most often is",
        (words[0],),
    )


TASKS: dict[str, Callable[[random.Random], Puzzle]] = {
    "single": single,
    "multi_key": multi_key,
    "multi_value": multi_value,
    "variable_tracking": variable_tracking,
    "common_words": common_words,
}


def make_trial(tokenizer: PreTrainedTokenizerBase, task: str, *, length: int, mode: Mode, seed: int) -> Trial:
    """Build one trial whose prompt has exactly ``length`` tokens.

    The hidden sentences lie at random depths between paragraphs of the documentation, in order.

    Raises
    ------
    InputError
        If the task is unknown or ``length`` leaves no room for a text.
    """
    if task not in TASKS:
        raise InputError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    rng = random.Random(f"{task}-{seed}")
    puzzle = TASKS[task](rng)
    # no chat template: small models answer an unfinished sentence far better than a question
    tail = _tokens(tokenizer, f"\n{puzzle.question}\n{puzzle.prefix}")
    asked = tail if mode == "asked" else []
    hidden = [_tokens(tokenizer, f"\n{sentence}\n\n") for sentence in puzzle.hidden]
    room = length - len(asked) - sum(map(len, hidden))
    if room < 64:
        raise InputError(f"length={length} leaves {room} tokens of text around the needles; take at least 1024")
    pieces, boundaries = _haystack(tokenizer, room, seed)
    for place, sentence in zip(
        sorted(rng.choices(boundaries, k=len(hidden)), reverse=True), reversed(hidden), strict=True
    ):
        pieces[place:place] = sentence
    prompt = torch.tensor([*pieces, *asked])
    assert len(prompt) == length
    forced = () if mode == "asked" else tuple(tail)
    return Trial(task, prompt, (-1,) * GENERATED + forced if mode == "generated" else forced, puzzle.expected)


def answered_trial(
    tokenizer: PreTrainedTokenizerBase, task: str, *, length: int, seed: int
) -> tuple[torch.Tensor, int]:
    """A trial with its question and the right answer, [length] int64, and how many tokens the answer has."""
    trial = make_trial(tokenizer, task, length=length, mode="decoded", seed=seed)
    answer = _tokens(tokenizer, f" {', '.join(trial.expected)}.")
    end = [*trial.forced, *answer]
    trial = make_trial(tokenizer, task, length=length - len(end), mode="decoded", seed=seed)
    return torch.cat((trial.prompt, torch.tensor(end))), len(answer)


def _haystack(tokenizer: PreTrainedTokenizerBase, room: int, seed: int) -> tuple[list[int], list[int]]:
    """``room`` tokens of text and the places between its paragraphs."""
    tokens: list[int] = []
    boundaries = []
    for paragraph in shuffled_docs(seed):
        if len(tokens) >= room:
            break
        boundaries.append(len(tokens))
        tokens += _tokens(tokenizer, f"{paragraph}\n\n")
    return tokens[:room], boundaries


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def continuations(trials: Sequence[Trial], *, answer_tokens: int) -> torch.Tensor:
    """Tokens to feed after the prompts, [T, N + 1] int64: the forced ones, then -1 (free) to the common end."""
    width = max(len(trial.forced) for trial in trials) + answer_tokens
    result = torch.full((len(trials), width), -1)
    for row, trial in enumerate(trials):
        result[row, : len(trial.forced)] = torch.tensor(trial.forced, dtype=torch.int64)
    return result


def answers(
    tokenizer: PreTrainedTokenizerBase, trials: Sequence[Trial], chosen: torch.Tensor, *, answer_tokens: int
) -> list[list[str]]:
    """Text of the free tokens in ``chosen`` [N + 1, R, T]: per policy, per trial."""
    return [
        [
            str(tokenizer.decode(chosen[len(trial.forced) :, policy, row][:answer_tokens], skip_special_tokens=True))
            for row, trial in enumerate(trials)
        ]
        for policy in range(chosen.shape[1])
    ]
