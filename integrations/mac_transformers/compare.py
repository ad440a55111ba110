"""Compare attention policies on one model: rows of one batch read the same tokens, each under its own policy."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from mac_kernels import InputError

from .batch import FULL, DecodeBatch, Observer
from .intercept import AttentionHandler, intercepted, last_logits, layout_of, num_layers_of
from .policies import Mac, Policy, Tca, Window
from .replay import DecodePass

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What every policy did: ``N`` decode steps, ``R`` policies (the first is ``"full"``), ``T`` texts, ``L`` layers.

    All on the CPU. ``kl`` [N, R, T] fp32, nats, KL(full || policy) of the next-token distributions; ``top1`` [N, R, T]
    bool, same most likely token as full attention; ``nll`` [N, R, T] fp32, nats, of the true next token, NaN where it
    is not known; ``chosen`` [N + 1, R, T] int64, the most likely token before step i; ``margin`` [N, R, T] fp32, nats
    by which it is more likely than the second after step i (of ``chosen[i + 1]``). Per layer, [N, L, R, T] fp32:
    ``group_hit`` and ``head_hit`` shares in [0, 1] (0 for policies without reuse); ``kv_read`` share of the KV cache
    read, averaged over kv groups; ``error`` relative L2 distance of the attention output from full attention's (closed
    loop: inputs differ too).
    """

    policies: tuple[str, ...]
    kl: torch.Tensor
    top1: torch.Tensor
    nll: torch.Tensor
    chosen: torch.Tensor
    margin: torch.Tensor
    group_hit: torch.Tensor
    head_hit: torch.Tensor
    kv_read: torch.Tensor
    error: torch.Tensor

    def index(self, policy: str) -> int:
        """Place of a policy along the ``R`` axis."""
        return self.policies.index(policy)

    def steps(self, low: int, high: int) -> Comparison:
        """The same comparison over the decode steps ``[low, high)``."""
        per_step = ("kl", "top1", "nll", "margin", "group_hit", "head_hit", "kv_read", "error")
        return dataclasses.replace(self, **{name: getattr(self, name)[low:high] for name in per_step})


@torch.inference_mode()
def compare(
    model: PreTrainedModel,
    prompts: torch.Tensor,
    continuation: torch.Tensor,
    policies: Mapping[str, Policy],
    *,
    progress: Progress | None = None,
    seconds: float | None = None,
    observe: Observer | None = None,
) -> Comparison:
    """Decode the same tokens under full attention and under every policy, side by side.

    Each prompt is read once, exactly, and shared, and once more under every TCA policy that reads it sparsely; then all
    rows (policy x text) advance together, one model call per token.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder of full-attention layers, in eval mode, on the CPU or one GPU; computed in its own dtype (fp32 to
        measure policies and not rounding).
    prompts : torch.Tensor, [T, P] int64
        Prompts of one length.
    continuation : torch.Tensor, [T, N + 1] int64
        Tokens after the prompt; -1 takes the row's own most likely token. N steps are decoded, the last token is only
        predicted.
    policies : mapping of str to Mac, Tca, Window or Stored
        By name, besides ``"full"``, which is always measured first.
    progress : callable, optional
        Called as ``progress(done, total)``; the total counts prompts and steps.
    seconds : float, optional
        Stop decoding when this much time has passed; the result then holds fewer steps (at least one).
    observe : callable, optional
        Called after every step with a :class:`mac_transformers.block.Seen` for each call of the decode step.

    Returns
    -------
    Comparison

    Raises
    ------
    InputError
        If shapes or names disagree.
    UnsupportedError
        If the model has layers other than full attention.

    Notes
    -----
    On the CPU, policies whose configs differ only in threshold, influence and age limit share one call of the decode
    step. On a GPU, the kernels run every policy that they support, in the model's dtype; if they run all, the second
    pass over a token is recorded as a CUDA graph, which is many times faster.
    """
    _check(prompts, continuation, policies)
    begin = time.monotonic()
    device = model.device
    prompts, continuation = prompts.to(device), continuation.to(device)
    texts, steps = prompts.shape[0], continuation.shape[1] - 1
    batch = DecodeBatch(
        policies,
        layout=layout_of(model),
        num_layers=num_layers_of(model),
        texts=texts,
        prompt_length=prompts.shape[1],
        steps=steps,
        dtype=model.dtype,
        device=device,
        observe=observe,
    )
    total = texts + steps
    with intercepted(model):
        first = torch.empty(texts, dtype=torch.int64, device=device)
        for text in range(texts):
            first[text] = _read(model, prompts[text], batch.prefill(text))
            _report(progress, text + 1, total)
        chosen = [first.repeat(batch.num_policies)]
        for rows in batch.tca:
            if rows.policy.prefill == "sparse":
                for text in range(texts):
                    chosen[0][rows.rows.start + text] = _read(model, prompts[text], batch.prefill_tca(text, rows))
        given = continuation.repeat(batch.num_policies, 1)
        scores: list[torch.Tensor] = []
        one_token = DecodePass(model, batch)
        for step in range(steps):
            if scores and seconds is not None and time.monotonic() - begin > seconds:
                break
            logits = one_token(step, torch.where(given[:, step] >= 0, given[:, step], chosen[-1]))
            chosen.append(logits.argmax(-1))
            scores.append(_score(logits, given[:, step + 1], texts))
            _report(progress, texts + step + 1, total)
    return _collect(batch, scores, chosen)


def _read(model: PreTrainedModel, prompt: torch.Tensor, handler: AttentionHandler) -> torch.Tensor:
    """The most likely token after a prompt [P]."""
    position = torch.arange(len(prompt), device=prompt.device)[None]
    return last_logits(model, prompt[None], position, handler)[0].argmax(-1)


def _score(logits: torch.Tensor, target: torch.Tensor, texts: int) -> torch.Tensor:
    """KL to the full row, top-1 agreement, NLL of the target and margin of the most likely of every row, [4, rows]."""
    logp = functional.log_softmax(logits, dim=-1).view(-1, texts, logits.shape[-1])
    full = logp[0]
    kl = torch.stack([(full.exp() * (full - row)).sum(-1) for row in logp]).clamp(min=0)
    top1 = (logp.argmax(-1) == full.argmax(-1)).float()
    nll = -logp.flatten(0, 1).gather(1, target.clamp(min=0)[:, None])[:, 0]
    first, second = logp.flatten(0, 1).topk(2).values.T
    return torch.stack([kl.flatten(), top1.flatten(), torch.where(target >= 0, nll, math.nan), first - second])


def _collect(batch: DecodeBatch, scores: list[torch.Tensor], chosen: list[torch.Tensor]) -> Comparison:
    order = torch.tensor(batch.order)

    def arranged(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.cpu()
        return rows.view(*rows.shape[:-1], len(order), -1).index_select(-2, order)

    kl, top1, nll, margin = arranged(torch.stack(scores, 1))
    per_layer = {name: arranged(values[: len(scores)]) for name, values in batch.records.items()}
    return Comparison(
        policies=batch.names,
        kl=kl,
        top1=top1.bool(),
        nll=nll,
        chosen=arranged(torch.stack(chosen)),
        margin=margin,
        **per_layer,
    )


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def _check(prompts: torch.Tensor, continuation: torch.Tensor, policies: Mapping[str, Policy]) -> None:
    if prompts.dim() != 2 or prompts.shape[1] < 1:
        raise InputError(f"prompts must be [texts, tokens >= 1], got {list(prompts.shape)}")
    if continuation.dim() != 2 or continuation.shape[0] != prompts.shape[0] or continuation.shape[1] < 2:
        raise InputError(
            f"continuation must be [{prompts.shape[0]}, steps + 1 >= 2], got {list(continuation.shape)}; "
            "one row per prompt"
        )
    if FULL in policies:
        raise InputError(f"the name {FULL!r} is taken by full attention, which is always measured; rename the policy")
    for name, policy in policies.items():
        partner = policy.like if isinstance(policy, Window) else None
        if partner is not None and not isinstance(policies.get(partner), Mac | Tca):
            raise InputError(f"policy {name!r} should read as much as {partner!r}, which is no Mac or Tca policy here")
