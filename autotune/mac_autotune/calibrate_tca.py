"""Calibrate TCA: one exact forward pass per passage tells how much mass every budget retains, head by head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from mac_kernels import InputError
from mac_kernels.tca import TcaConfig
from mac_kernels.tca.budgets import RetainedMass
from mac_kernels.tca.calibrate import MEASURES, Measure, column_sums, retained
from mac_kernels.tca.config import far_blocks
from mac_transformers.intercept import intercepted, num_layers_of

_DIGITS = 4
_CONTEXT_PER_WINDOW = 16


def default_window(context: int, block: int) -> int:
    """The published window of 4096 tokens, but at most a sixteenth of a model's context, in whole blocks."""
    most = TcaConfig().local_window
    return max(min(most, context // _CONTEXT_PER_WINDOW // block * block), block)


@torch.inference_mode()
def calibrate(
    model: PreTrainedModel,
    tokens: Sequence[torch.Tensor],
    *,
    config: TcaConfig,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Measure, RetainedMass]:
    """Measure the retained mass of every layer, kv head and sparse candidate, under each of the three measures.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder of full-attention layers in eval mode, on the CPU or one GPU.
    tokens : sequence of torch.Tensor, [L] int64
        Passages, longer than the local window; each is read in one exact forward pass.
    config : TcaConfig
        Block, window, sinks and rule to calibrate for.
    progress : callable, optional
        Called as ``progress(done, total)`` after every layer of every passage.

    Raises
    ------
    InputError
        If there is no passage, or one is too short for a far region.
    UnsupportedError
        If the model has layers other than full attention.
    """
    least = config.sinks + config.local_window + config.block + 1
    if not tokens or any(far_blocks(len(passage) - 1, config) == 0 for passage in tokens):
        raise InputError(
            f"calibration needs passages of at least {least} tokens (sinks, local window and a block), better several "
            f"windows; got {[len(passage) for passage in tokens]}; take longer ones or a smaller local window"
        )
    found = _Found(config, num_layers_of(model), len(tokens), progress)
    with intercepted(model):
        for passage in tokens:
            place = torch.arange(len(passage), device=model.device)[None]
            model(
                input_ids=passage.to(model.device)[None],
                position_ids=place,
                use_cache=False,
                logits_to_keep=1,
                attention_handler=found,
            )
    return {measure: _table(found.mass[measure]) for measure in MEASURES}


@dataclass
class _Found:
    """Attention handler that sums up retained masses while the model reads passages exactly."""

    config: TcaConfig
    layers: int
    passages: int
    progress: Callable[[int, int], None] | None

    def __post_init__(self) -> None:
        self.mass: dict[Measure, dict[int, torch.Tensor]] = {measure: {} for measure in MEASURES}
        self._done = 0

    def attend(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float
    ) -> torch.Tensor:
        layer = int(module.layer_idx)  # type: ignore[arg-type]  # an int; torch types every attribute as Tensor | Module
        sums = column_sums(q[0], k[0], config=self.config, sm_scale=sm_scale)
        for measure, mass in retained(sums, self.config).items():
            by_layer = self.mass[measure]
            by_layer[layer] = by_layer.get(layer, 0) + mass / self.passages
        self._done += 1
        if self.progress is not None:
            self.progress(self._done, self.layers * self.passages)
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=sm_scale).transpose(1, 2)


def _table(by_layer: dict[int, torch.Tensor]) -> RetainedMass:
    return tuple(
        tuple(tuple(round(mass, _DIGITS) for mass in head) for head in by_layer[layer].tolist())
        for layer in sorted(by_layer)
    )
