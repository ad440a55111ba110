"""Replay TCA's decoding on a recorded trace with the reference functions; the prompt is read exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mac_kernels.tca import FarSet, TcaConfig, compact, importance, select_far, sparse_decode
from mac_kernels.tca.candidates import decode_keep, far_capacity
from mac_kernels.tca.config import far_blocks
from mac_kernels.tca.select import empty_far_set

from .replay import cache_of
from .traces import Trace


@torch.inference_mode()
def replay_selected(
    trace: Trace, config: TcaConfig, choices: Sequence[Sequence[int]], exact: torch.Tensor
) -> torch.Tensor:
    """Decode the steps of a trace with what TCA selects at the end of its prompt.

    Parameters
    ----------
    trace : Trace
        Its layers are the requests of one batch.
    config : TcaConfig
    choices : sequence of sequence of int
        Candidate of every kv head, for all layers of the model.
    exact : torch.Tensor, [steps, N, Hq, D]
        From :func:`.replay.full_attention`.

    Returns
    -------
    torch.Tensor, [steps, N] fp32
        Squared error that the attention of a layer brings into the residual stream, relative to its norm
        (:class:`.replay.Replayed`).
    """
    first, own = trace.q.shape[1] - trace.steps, [choices[layer] for layer in trace.layers]
    far, keep = _select(trace, config, own), [_keep(choice, config) for choice in own]
    out_proj, blocks = trace.out_proj.float(), far_blocks(trace.prompt - 1, config)
    errors = []
    for step in range(trace.steps):
        q, cache = trace.q[:, first + step], cache_of(trace, trace.prompt + step + 1)
        if far_blocks(trace.prompt + step, config) > blocks:
            blocks += 1
            for place, counts in enumerate(keep):  # what a block keeps differs from layer to layer
                part = slice(place, place + 1)
                one = FarSet(far.ids[part], far.count[part], far.far_end[part])
                compact(q[part], cache.only(place), one, counts, config=config, sm_scale=trace.sm_scale)
        out = sparse_decode(q, cache, far, sm_scale=trace.sm_scale).out
        error = (out_proj @ (out - exact[step]).flatten(1)[..., None])[..., 0].norm(dim=-1)
        errors.append((error / trace.residual[:, step]).square())
    return torch.stack(errors)


def _select(trace: Trace, config: TcaConfig, choices: Sequence[Sequence[int]]) -> FarSet:
    """What every layer keeps of the prompt, with room for what decoding adds."""
    newest = trace.q.shape[1] - trace.steps - 1
    s = importance(trace.q[:, newest], cache_of(trace, trace.prompt), sm_scale=trace.sm_scale)
    capacity = max(far_capacity(choice, trace.prompt + trace.steps, config) for choice in choices)
    capacity = max(capacity, config.sinks + far_blocks(trace.prompt - 1, config) * config.block)
    far = empty_far_set(len(choices), trace.k.shape[1], capacity, config=config, device=s.device)
    for place, choice in enumerate(choices):
        found = select_far(s[place, None], [trace.prompt], choice, config=config).far
        far.ids[place, :, : found.ids.shape[2]] = found.ids[0]
        far.count[place], far.far_end[place] = found.count[0], found.far_end[0]
    return far


def _keep(choice: Sequence[int], config: TcaConfig) -> torch.Tensor:
    return torch.tensor([decode_keep(one, config.block) for one in choice], dtype=torch.int32)
