"""Texts that every Python brings along, as tokens."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mac_kernels import InputError

PassageName = Literal["docs", "code"]
TextName = Literal["docs", "code", "greedy"]
TEXTS: tuple[TextName, ...] = ("docs", "code", "greedy")
_CODE_MODULES = ("typing", "argparse", "inspect", "subprocess", "tarfile", "decimal", "_pydecimal", "turtle", "doctest")


def docs_paragraphs() -> list[str]:
    """Paragraphs of the documentation inside the standard library (``pydoc_data.topics``), in order."""
    from pydoc_data.topics import topics

    return [paragraph for name in sorted(topics) for paragraph in topics[name].split("\n\n") if paragraph.strip()]


def docs_text() -> str:
    """The documentation inside the standard library, as one text."""
    return "\n\n".join(docs_paragraphs())


def code_text() -> str:
    """Source of large standard-library modules, one after the other."""
    specs = (importlib.util.find_spec(name) for name in _CODE_MODULES)
    sources = [Path(spec.origin).read_text(encoding="utf-8") for spec in specs if spec is not None and spec.origin]
    return "\n".join(sources)


def passages(
    tokenizer: PreTrainedTokenizerBase, name: PassageName, *, length: int, count: int = 1, seed: int = 0
) -> torch.Tensor:
    """Return ``count`` passages of ``length`` tokens that do not overlap, [count, length] int64.

    The first begins where the text does; ``seed`` moves all of them along.

    Raises
    ------
    InputError
        If the text is too short.
    """
    tokens = torch.tensor(tokenizer(docs_text() if name == "docs" else code_text()).input_ids)
    stride = (len(tokens) - length) // max(count - 1, 1) if count > 1 else 0
    if len(tokens) < length * count:
        raise InputError(
            f"text {name!r} has {len(tokens)} tokens, {count} x {length} were asked for; "
            "ask for fewer or shorter passages"
        )
    starts = [(index * stride + seed * length) % (len(tokens) - length + 1) for index in range(count)]
    return torch.stack([tokens[start : start + length] for start in starts])


def shuffled_docs(seed: int) -> Iterator[str]:
    """Paragraphs of the documentation in random order, without end."""
    paragraphs = docs_paragraphs()
    order = random.Random(seed)
    while True:
        order.shuffle(paragraphs)
        yield from paragraphs


@torch.inference_mode()
def greedy_continuation(model: PreTrainedModel, prompts: torch.Tensor, *, length: int) -> torch.Tensor:
    """The model's own greedy continuation of equally long prompts [T, P] under its own attention, [T, length] int64."""
    produced = model.generate(  # type: ignore[operator]  # typed as Tensor or Module
        prompts.to(model.device),
        attention_mask=torch.ones_like(prompts, device=model.device),
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=False,
        pad_token_id=0,
    )
    written: torch.Tensor = produced[:, prompts.shape[1] :].cpu()
    return written
