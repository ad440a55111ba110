"""Sparse prefill and decode, the specification, in fp32 on any device."""

from __future__ import annotations

import torch

from ..attend.reference import masked_attention, shared_attention
from ..errors import InputError
from ..paged import PagedKV
from ..types import AttnState
from .config import TcaConfig, far_blocks_at
from .select import FarSet, Selection


def sparse_prefill(
    q: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv: PagedKV,
    selection: Selection,
    *,
    config: TcaConfig,
    sm_scale: float,
    logits_soft_cap: float = 0.0,
) -> AttnState:
    """Attend every query of a prefill chunk to the selected tokens before its window, and to its window.

    Parameters
    ----------
    q : torch.Tensor, [nnz_q, Hq, D]
        Queries after RoPE, requests one after the other.
    qo_indptr : torch.Tensor, [B + 1] int32
        Where each request's queries begin; its last query is at position ``kv_len - 1``.
    kv : PagedKV
        Keys and values, those of the chunk included.
    selection : Selection
        Of :func:`mac_kernels.tca.select_far`, at the last position of every request.
    config : TcaConfig
        The one that selected.
    sm_scale : float
        Scale of the logits, usually ``1 / sqrt(D)``.
    logits_soft_cap : float, default 0.0
        ``cap * tanh(logit / cap)``; 0 turns it off.

    Returns
    -------
    AttnState
        fp32, [nnz_q, Hq, D] and [nnz_q, Hq]: one softmax over both parts. Query ``i`` of a head that is not dense reads
        ``ids[:prefix[m]]`` and ``[sinks + m * block, i]``, ``m`` being its far blocks.
    """
    kv_len = kv.table.kv_len()
    parts = []
    for request, (begin, end) in enumerate(zip(qo_indptr[:-1].tolist(), qo_indptr[1:].tolist(), strict=True)):
        length = int(kv_len[request])
        k, v = kv.only(request).gather(kv_len.new_zeros(1), length)
        far = _of_request(selection.far, request)
        for low in range(begin, end, config.block):  # bounds the logits that are held at once
            position = length - end + torch.arange(low, min(low + config.block, end), device=q.device)
            mask = prefill_mask(position, far, selection.prefix[request], length, config)
            mask = mask.repeat_interleave(kv.layout.group_size, dim=1)
            queries = q[low : low + len(position)]
            parts.append(shared_attention(queries, k, v, mask, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap))
    if not parts:
        return AttnState(q.float(), q.new_empty(q.shape[:2], dtype=torch.float32))
    return AttnState(torch.cat([part.out for part in parts]), torch.cat([part.lse2 for part in parts]))


def sparse_decode(
    q: torch.Tensor, kv: PagedKV, far: FarSet, *, sm_scale: float, logits_soft_cap: float = 0.0
) -> AttnState:
    """Attend ``q`` [B, Hq, D], at the last position of every request, to its far set and its window.

    Returns
    -------
    AttnState
        fp32, [B, Hq, D] and [B, Hq], over ``ids[:count]`` and ``[far_end, kv_len)`` of the head's kv group.
    """
    kv_len = kv.table.kv_len()
    length = int(kv_len.max())
    k, v = kv.gather(torch.zeros_like(kv_len), length)
    mask = kept_mask(far.of_batch(), kv_len, length).repeat_interleave(kv.layout.group_size, dim=1)
    return masked_attention(q, k, v, mask, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap)


def compact(
    q: torch.Tensor,
    kv: PagedKV,
    far: FarSet,
    keep: torch.Tensor,
    *,
    config: TcaConfig,
    sm_scale: float,
    logits_soft_cap: float = 0.0,
) -> None:
    """Where a block has just left the window, move its best tokens to the far set; call it before every decode step.

    A token's score is its attention by ``q`` within the block, averaged over the heads of the kv group.

    Parameters
    ----------
    q : torch.Tensor, [B, Hq, D]
        Queries of the step after RoPE; they are at position ``kv_len - 1``.
    kv : PagedKV
        Keys and values, those of the step included.
    far : FarSet
        Changed in place.
    keep : torch.Tensor, [Hkv] int32
        Tokens that a head keeps of a block, :func:`mac_kernels.tca.candidates.decode_keep`; 0 for a dense head.
    config : TcaConfig
        Block, window and sinks.
    sm_scale, logits_soft_cap : float
        As for :func:`sparse_decode`.

    Raises
    ------
    InputError
        If a far set has no room left, or more than one block is due: then the request was not selected after its
        prompt.
    """
    held, at = far.of_batch(), torch.arange(len(q), device=q.device) if far.sets is None else far.sets
    due = torch.where(keep > 0, far_blocks_at(kv.table.kv_len() - 1, config)[:, None] - held_blocks(held, config), 0)
    due = torch.where(at[:, None] >= 0, due, 0)
    if int(due.max()) > 1:
        raise InputError(f"{int(due.max())} blocks left the window at once; select the prompt before decoding")
    if not bool((due > 0).any()):
        return
    first = torch.where(held.far_end > 0, held.far_end, config.sinks).amax(1).long()  # alike for all sparse heads
    k, _ = kv.gather(first, config.block)
    grouped = q.float().view(len(q), kv.layout.num_kv_heads, kv.layout.group_size, -1)
    logits = torch.einsum("bhgd,blhd->bhgl", grouped, k) * sm_scale
    if logits_soft_cap > 0:
        logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
    order = logits.softmax(-1).mean(2).argsort(dim=-1, descending=True, stable=True)  # [B, Hkv, block]
    for request, head in (due > 0).nonzero().tolist():
        wanted, own = int(keep[head]), int(at[request])
        have = max(int(held.count[request, head]), config.sinks)
        if have + wanted > far.ids.shape[2]:
            raise InputError(f"the far set has room for {far.ids.shape[2]} tokens, {have + wanted} are to be kept")
        best = order[request, head, :wanted].sort().values
        far.ids[own, head, have : have + wanted] = (first[request] + best).int()
        far.count[own, head] = have + wanted
        far.far_end[own, head] = first[request] + config.block


def held_blocks(far: FarSet, config: TcaConfig) -> torch.Tensor:
    """Blocks that every far set covers, [B, Hkv]."""
    return torch.where(far.far_end > 0, (far.far_end - config.sinks) // config.block, 0)


def kept_mask(far: FarSet, kv_len: torch.Tensor, length: int) -> torch.Tensor:
    """Which of the first ``length`` tokens the last query of every request attends, [B, Hkv, length] bool."""
    token = torch.arange(length, device=kv_len.device)
    window = (token >= far.far_end[:, :, None]) & (token < kv_len[:, None, None])
    return window | _far_mask(far, far.count[:, :, None], length)


def _of_request(far: FarSet, request: int) -> FarSet:
    return FarSet(far.ids[request], far.count[request], far.far_end[request])


def _far_mask(far: FarSet, count: torch.Tensor, length: int) -> torch.Tensor:
    """Which of the first ``length`` tokens are among the first ``count`` [..., 1] ids, [..., length] bool."""
    used = torch.arange(far.ids.shape[-1], device=count.device) < count
    mask = torch.zeros(*used.shape[:-1], length + 1, dtype=torch.bool, device=count.device)
    place = torch.where(used, far.ids, length).long()  # what is not used goes to a column of its own
    return mask.scatter_(-1, place, True)[..., :length]


def prefill_mask(
    position: torch.Tensor, far: FarSet, prefix: torch.Tensor, length: int, config: TcaConfig
) -> torch.Tensor:
    """Which tokens the queries of one request at ``position`` [N] attend, [N, Hkv, length] bool."""
    blocks = torch.where(far.count > 0, far_blocks_at(position, config)[:, None], 0)  # [N, Hkv]
    begin = torch.where(blocks > 0, config.sinks + blocks * config.block, 0)
    token = torch.arange(length, device=position.device)
    window = (token >= begin[..., None]) & (token <= position[:, None, None])
    count = prefix.T.gather(0, blocks)[..., None]  # [N, Hkv, 1]
    every = FarSet(far.ids.expand(len(position), -1, -1), far.count, far.far_end)
    return window | _far_mask(every, count, length)
