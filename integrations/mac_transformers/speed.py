"""Decode speed of one policy alone, as a user would run it: the library's cache and generation path, nothing shared."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from mac_kernels import MacConfig

from .cache import MacCache


@torch.inference_mode()
def decode_seconds(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    tokens: torch.Tensor,
    config: MacConfig | None,
    *,
    attn_implementation: str = "sdpa",
    warmup: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Time every decode step, the model's other layers included.

    Parameters
    ----------
    model : PreTrainedModel
    prompt : torch.Tensor, [P] int64
        Read first, untimed.
    tokens : torch.Tensor, [N] int64
        Fed one by one.
    config : MacConfig or None
        MAC with a :class:`MacCache`; ``None`` is full attention with the library's ``DynamicCache``.
    attn_implementation : str, default "sdpa"
        The library's attention for ``config=None``.
    warmup : int, default 2
        Steps at the start that are run but not reported.
    progress : callable, optional
        Called as ``progress(done, total)`` after every step.

    Returns
    -------
    list of float, seconds
        One per step after the warm-up; on a GPU each ends with a device synchronisation.
    """
    before = model.config._attn_implementation
    cache: Cache = DynamicCache(config=model.config) if config is None else MacCache(model.config, config)
    model.set_attn_implementation(attn_implementation if config is None else "mac")
    seconds = []
    try:
        model(prompt.to(model.device)[None], past_key_values=cache, logits_to_keep=1)
        for done, token in enumerate(tokens.to(model.device), start=1):
            begin = _now(model.device)
            model(token.view(1, 1), past_key_values=cache)
            seconds.append(_now(model.device) - begin)
            if progress is not None:
                progress(done, len(tokens))
    finally:
        model.set_attn_implementation(before)
    return seconds[warmup:]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
