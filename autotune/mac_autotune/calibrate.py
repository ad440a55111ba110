"""Calibrate ``influence_scale``: how much a reused head's error does to the residual stream, head by head.

The influence bound judges weight x distance, in units that are the same for every head; what such a step does to the
model is not. One exact forward pass tells it: at some positions of a passage every head's nearest row is reused on
paper, and the error that reaches the residual stream is compared with what the bound saw.

A head that fetches a fact from far back hardly shows in ordinary text: the old query did not look for the fact, so the
stored weight is small, the step looks harmless, and the fact is lost. Passages that end in the answer to a question
about something far back show it, and raise the factors of such heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from mac_kernels import AttnState, InputError, MacConfig, Rope
from mac_kernels.attend.reference import shared_attention
from mac_kernels.complete.reference import correct, merge_state
from mac_kernels.config import HeadTable
from mac_kernels.match.accept import distance_cap
from mac_kernels.types import covered_end
from mac_transformers.intercept import intercepted, num_layers_of, residual_norms
from mac_transformers.rope import ModelRope

CALIBRATED_THRESHOLD = 0.3
"""Distance cap of calibrated configs: looser than the presets', since the scale knows which heads fetch facts."""
CALIBRATED_INFLUENCE = {"careful": 0.05, "balanced": 0.1, "fast": 0.15}
"""Influence bound by preset: of these rules divergence and needles were measured (``match/README.md``)."""
_FEWEST_NEAR = 16  # samples within the distance cap below which all samples of a head are taken
_DIGITS = 4


def calibrated(preset: str, scale: HeadTable) -> MacConfig:
    """What a preset becomes with a calibrated scale: it reads less, and finds as much in long contexts.

    Raises
    ------
    InputError
        If the preset has no influence bound that could be scaled.
    """
    if preset not in CALIBRATED_INFLUENCE:
        raise InputError(f"preset {preset!r} takes no scale; calibrate for careful, balanced or fast")
    return MacConfig.preset(
        preset,
        threshold=CALIBRATED_THRESHOLD,
        influence=CALIBRATED_INFLUENCE[preset],
        influence_scale=scale,
    )


@torch.inference_mode()
def calibrate(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    *,
    config: MacConfig | None = None,
    positions: int = 64,
    answered: Sequence[tuple[torch.Tensor, int]] = (),
    progress: Callable[[int, int], None] | None = None,
) -> HeadTable:
    """Measure the ``influence_scale`` of every layer and query head.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder of full-attention layers whose attention ends in ``o_proj``, in eval mode, on the CPU or one GPU.
    tokens : torch.Tensor, [T, L] int64
        Passages of the kind that the model will serve; each is read in one exact forward pass.
    config : MacConfig, optional
        Window, band, sinks, threshold and correction that the scale is for. Default: the preset ``careful``.
    positions : int, default 64
        Queries per passage at which reuse is tried, spread over the passage's second half.
    answered : sequence of ([L] int64, int), optional
        Passages that end in the answer to a question about something far back, and how many of their newest tokens
        that is; reuse is tried there. They raise the factors of heads whose error is larger there, relative to what
        the bound sees, than the usual head's; they lower none.
    progress : callable, optional
        Called as ``progress(done, total)`` after every layer of every passage.

    Returns
    -------
    tuple of tuple of float
        By layer and query head, ``> 0``, geometric mean 1: root mean square of (error in the residual stream relative
        to its norm) over that of (weight x distance), times the excess in ``answered``, if any.

    Raises
    ------
    InputError
        If the passages are too short for the window, or reuse changes nothing.
    UnsupportedError
        If the model's attention does not end in ``o_proj``.
    """
    config = MacConfig() if config is None else config
    least = 2 * config.window + config.band + config.sinks
    shortest = min([tokens.shape[-1], *(len(passage) for passage, _ in answered)])
    if tokens.dim() != 2 or shortest < least or positions < 1:
        raise InputError(
            f"calibration needs passages of at least {least} tokens (two windows, band and sinks) and positions >= 1, "
            f"got {list(tokens.shape)}, the shortest of {shortest}, and {positions}; take longer passages"
        )
    length = tokens.shape[1]
    spread = torch.linspace(length // 2, length - 1, positions).long()
    usual = [(passage, spread) for passage in tokens]
    asked = [(passage, torch.arange(len(passage) - count - 1, len(passage))) for passage, count in answered]
    layers = num_layers_of(model)
    tell = functools.partial(_tell, progress, layers, len(usual) + len(asked))
    scale = _ratios(model, usual, config, functools.partial(tell, 0))
    known = scale[scale.isfinite() & (scale > 0)]
    if not len(known):
        raise InputError("reuse changed nothing in any layer; does the model attend at all? Take other passages")
    # a head without samples is treated as the average one
    scale = torch.where(scale.isfinite() & (scale > 0), scale, known.log().mean().exp())
    if asked:
        excess = _ratios(model, asked, config, functools.partial(tell, len(usual))) / scale
        scale *= (excess / excess.nanmedian()).nan_to_num(1.0).clamp(min=1.0)
    scale /= scale.log().mean().exp()
    return tuple(tuple(round(value, _DIGITS) for value in row) for row in scale.tolist())


def _tell(progress: Callable[[int, int], None] | None, layers: int, passages: int, before: int, done: int) -> None:
    if progress is not None:
        progress(before * layers + done, passages * layers)


def _ratios(
    model: PreTrainedModel,
    passages: Sequence[tuple[torch.Tensor, torch.Tensor]],
    config: MacConfig,
    progress: Callable[[int], None],
) -> torch.Tensor:
    """Error per influence of every layer and head, [layers, Hq], over passages and the places to look at in them."""
    layers = num_layers_of(model)
    with intercepted(model), residual_norms(model, range(layers)) as norms:
        samples = _Samples(norms, config, progress)
        for passage, place in passages:
            samples.place = place.to(model.device)
            model(
                input_ids=passage[None].to(model.device),
                position_ids=torch.arange(len(passage), device=model.device)[None],
                use_cache=False,
                logits_to_keep=1,
                attention_handler=samples,
            )
    return torch.stack([samples.scale(layer) for layer in range(layers)])


@dataclass(frozen=True, slots=True)
class _Layer:
    """Squared (weight x distance) and squared error of every sample, and whether its row was near: each [N, Hq]."""

    influence: torch.Tensor
    error: torch.Tensor
    near: torch.Tensor


class _Samples:
    """Attention handler that collects samples while the model reads passages exactly."""

    def __init__(self, norms: Mapping[int, torch.Tensor], config: MacConfig, progress: Callable[[int], None]) -> None:
        self.place = torch.empty(0, dtype=torch.int64)  # of the queries to sample in the passage that is read
        self._norms, self._config, self._progress = norms, config, progress
        self._found: dict[int, list[_Layer]] = {}
        self._done = 0

    def attend(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float
    ) -> torch.Tensor:
        layer = int(module.layer_idx)  # type: ignore[arg-type]  # an int; torch types every attribute as Tensor | Module
        self._found.setdefault(layer, []).append(self._sample(module, layer, q[0], k[0], v[0], sm_scale))
        self._done += 1
        self._progress(self._done)
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=sm_scale).transpose(1, 2)

    def scale(self, layer: int) -> torch.Tensor:
        """Root mean square error per root mean square influence, [Hq]; NaN for a head without samples."""
        influence, error, near = (
            torch.cat([getattr(one, name) for one in self._found[layer]]) for name in ("influence", "error", "near")
        )
        use = torch.where(near.sum(0) >= _FEWEST_NEAR, near, influence.isfinite())
        return (torch.where(use, error, 0.0).sum(0) / torch.where(use, influence, 0.0).sum(0)).sqrt().cpu()

    def _sample(
        self, module: nn.Module, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float
    ) -> _Layer:
        config, length, device = self._config, q.shape[1], q.device
        place = self.place
        rope = _rope_of(module, length, device)
        q = q.float().transpose(0, 1)  # [L, Hq, D]
        q_pre = rope.unrotate(q, torch.arange(length, device=device))
        distance, matched = _nearest(q_pre, place, config)
        head = torch.arange(q.shape[1], device=device)
        states = functools.partial(_states, k=k.float(), v=v.float(), sm_scale=sm_scale)
        ones = torch.ones_like(matched)
        end, old_end = (covered_end(x, band=config.band, sinks=config.sinks) for x in (place[:, None] * ones, matched))
        new = q[place]
        reused = states(q[matched, head], config.sinks * ones, old_end, return_kbar=config.correction)
        if reused.kbar is not None:
            reused = reused._replace(kbar=_pulled_back(rope, reused.kbar, matched))
        reused = correct(reused, q_pre[place], q_pre[matched, head], sm_scale=sm_scale)._replace(kbar=None)
        always = merge_state(states(new, end, place[:, None] + ones), states(new, 0 * ones, config.sinks * ones))
        weight = torch.exp2(reused.lse2 - merge_state(reused, always).lse2)
        got = merge_state(merge_state(reused, states(new, old_end, end)), always).out
        exact = merge_state(states(new, config.sinks * ones, end), always).out
        change = torch.einsum("nhd,ohd->nho", got - exact, _output_heads(module, q.shape[1])).square().sum(-1)
        known = distance.isfinite() & reused.lse2.isfinite()
        return _Layer(
            torch.where(known, (weight * distance).square() / (2 * q.shape[2]), math.inf),
            change / self._norms[layer][place, None].square(),
            known & (distance < distance_cap(config, q.shape[2])),
        )


def _rope_of(module: nn.Module, length: int, device: torch.device) -> Rope:
    rope = ModelRope(module, next(module.parameters()).dtype).at(length)
    table = torch.cat(rope.cos_sin(torch.arange(length)), dim=-1).to(device)
    return Rope.from_cos_sin_cache(table, interleaved=rope.interleaved)


def _nearest(q_pre: torch.Tensor, place: torch.Tensor, config: MacConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance to and position of every head's nearest eligible query, [N, Hq] each; ``inf`` where there is none."""
    position = torch.arange(len(q_pre), device=q_pre.device)
    eligible = (position < place[:, None]) & (position > place[:, None] - config.window)
    eligible &= position + 1 - config.band > config.sinks
    gap = torch.cdist(q_pre[place].transpose(0, 1), q_pre.transpose(0, 1))  # [Hq, N, L]
    best = torch.where(eligible, gap, math.inf).min(-1)
    return best.values.T, best.indices.T


def _states(
    q: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    *,
    k: torch.Tensor,
    v: torch.Tensor,
    sm_scale: float,
    return_kbar: bool = False,
) -> AttnState:
    """States of queries [N, Hq, D], every head over its own ``[start, stop)`` [N, Hq], with keys [Hkv, L, D]."""
    position = torch.arange(k.shape[1], device=k.device)
    mask = (position >= start[..., None]) & (position < stop[..., None])
    keys, values = (x.transpose(0, 1)[None] for x in (k, v))
    return shared_attention(q, keys, values, mask, sm_scale=sm_scale, return_kbar=return_kbar)


def _pulled_back(rope: Rope, kbar: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Mean keys [N, Hq, D] in the pre-RoPE frame of positions [N, Hq]."""
    return rope.pull_back(kbar[:, :, None], position)[:, :, 0]


def _output_heads(module: nn.Module, heads: int) -> torch.Tensor:
    """Output projection by head, [hidden, Hq, D]."""
    # a Linear, as residual_norms() made sure; torch types every attribute of a module as Tensor | Module
    weight: torch.Tensor = module.o_proj.weight.float()  # type: ignore[union-attr,assignment]
    return weight.view(len(weight), heads, -1)
