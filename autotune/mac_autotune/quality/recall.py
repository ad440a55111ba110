"""How well sketch kinds nominate: measured on recorded queries, all kinds on the same ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from mac_kernels import InputError, Rope
from mac_transformers.intercept import intercepted, layout_of
from mac_transformers.rope import ModelRope

from .sketches import FittedSketch, SketchKind

_POSITIONS_PER_BLOCK = 32  # bounds the distances that are held at once


@dataclass(frozen=True, slots=True)
class Nomination:
    """What a sketch kind with ``count`` nominees found, over layers, positions and heads.

    ``recall``: share of heads whose nearest row was nominated; ``near_recall``: the same over heads whose nearest row
    is within the distance cap; ``group_hit``: share of kv groups whose heads all have a nominated row within the cap;
    ``group_hit_loss``: what the exact scan has more; ``nbytes`` per row and kv head.
    """

    kind: str
    nbytes: int
    count: int
    threshold: float
    recall: float
    near_recall: float
    group_hit: float
    group_hit_loss: float


@torch.inference_mode()
def record_queries(model: PreTrainedModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Queries before RoPE of every layer for one text [N], each [N, Hq, D] fp32 on the model's device."""
    recorder = _Recorder()
    with intercepted(model):
        model(
            input_ids=tokens[None].to(model.device),
            position_ids=torch.arange(len(tokens), device=model.device)[None],
            use_cache=False,
            logits_to_keep=1,
            attention_handler=recorder,
        )
    return recorder.queries


class _Recorder:
    def __init__(self) -> None:
        self.queries: list[torch.Tensor] = []
        self._rope: Rope | None = None

    def attend(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float
    ) -> torch.Tensor:
        length = q.shape[2]
        rope = ModelRope(module, q.dtype).at(length)
        self.queries.append(rope.unrotate(q[0].transpose(0, 1), torch.arange(length, device=q.device)))
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=sm_scale).transpose(1, 2)


def nominations(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    kinds: Sequence[SketchKind],
    *,
    prompt_tokens: int,
    window: int,
    counts: Sequence[int],
    thresholds: Sequence[float],
    progress: Callable[[int, int], None],
) -> list[Nomination]:
    """Replay the match of every token after the prompt with every kind, count and threshold.

    ``tokens`` [N]: the first ``prompt_tokens`` may teach PCA and centring, the others are matched against the
    ``window - 1`` queries before them.

    Raises
    ------
    InputError
        If the prompt is shorter than the window or nothing follows it.
    """
    if prompt_tokens < window or len(tokens) <= prompt_tokens:
        raise InputError(
            f"{len(tokens)} tokens with a prompt of {prompt_tokens} leave nothing to match in a window of {window}; "
            "take a prompt at least as long as the window and some tokens after it"
        )
    layout = layout_of(model)
    queries = record_queries(model, tokens)
    sums: dict[tuple[SketchKind, int, float], torch.Tensor] = {}
    for layer, q in enumerate(queries):
        learn = q[max(0, prompt_tokens - window) : prompt_tokens]
        fitted = {kind: FittedSketch(kind, layout, learn) for kind in kinds}
        images = {kind: sketch.image(q) for kind, sketch in fitted.items()}
        for low in range(prompt_tokens, len(q), _POSITIONS_PER_BLOCK):
            now = torch.arange(low, min(low + _POSITIONS_PER_BLOCK, len(q)), device=q.device)
            row = now[:, None] - torch.arange(1, window, device=q.device)
            distance = (q[row] - q[now][:, None]).square().sum(-1).sqrt()  # [N, W - 1, Hq]
            nearest = distance.amin(1)
            for kind, sketch in fitted.items():
                image = (images[kind][row] - images[kind][now][:, None]).square().sum(-1)
                for count in counts:
                    elected = sketch.elect(image, count).repeat_interleave(layout.group_size, dim=2)
                    best = torch.where(elected, distance, torch.inf).amin(1)
                    for threshold in thresholds:
                        cap = math.sqrt(2 * layout.head_dim) * (1 - threshold)
                        key = kind, count, threshold
                        sums[key] = sums.get(key, 0.0) + _tally(nearest, best, cap, layout.group_size)
        progress(layer + 1, len(queries))
    return [_nomination(kind, kind.nbytes(layout), count, tau, total) for (kind, count, tau), total in sums.items()]


def _tally(nearest: torch.Tensor, best: torch.Tensor, cap: float, group: int) -> torch.Tensor:
    found, near, passed = best <= nearest, nearest < cap, best < cap

    def groups(heads: torch.Tensor) -> torch.Tensor:
        count: torch.Tensor = heads.view(len(heads), -1, group).all(-1).sum()
        return count

    return torch.stack(
        [found.sum(), torch.tensor(found.numel(), device=found.device), (found & near).sum(), near.sum(),
         groups(passed), groups(near), torch.tensor(found.numel() // group, device=found.device)]
    ).double()  # fmt: skip


def _nomination(kind: SketchKind, nbytes: int, count: int, threshold: float, total: torch.Tensor) -> Nomination:
    found, heads, found_near, near, passed, exact, groups = total.tolist()
    return Nomination(
        kind=kind.name,
        nbytes=nbytes,
        count=count,
        threshold=threshold,
        recall=found / heads,
        near_recall=found_near / max(near, 1),
        group_hit=passed / groups,
        group_hit_loss=(exact - passed) / groups,
    )
