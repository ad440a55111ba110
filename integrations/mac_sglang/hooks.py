"""Where SGLang's scheduler process tells us what happens: new requests, new passes, flushes, the prefix cache."""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any

from . import compat, serving
from .requests import EXACT_NAMESPACE, SCRATCH_ROW, BatchRow, in_exact_namespace

logger = logging.getLogger(__name__)

CUSTOM_PARAM = "mac"
"""Key of a request's ``custom_params``, for mac-kernels with any method; its only value is ``"exact"``."""


def apply() -> None:
    """Apply every hook to this process; a second call does nothing.

    Raises
    ------
    SGLangChanged
        If SGLang has no such function, or refuses a hook.
    """
    global _applied
    if _applied:
        return
    compat.after(compat.REQUEST_CREATED, _request_created)
    compat.after(compat.BATCH_BEGINS, _batch_begins)
    compat.around(compat.RADIX_CACHE_BUILT, _radix_cache_built)
    compat.around(compat.RESULTS_PROCESSED, _results_processed)
    for target in compat.state_changes():
        compat.after(target, _drop_after(target.rsplit(".", 1)[-1]))
    compat.fence_reads_after_replay()
    _applied = True


_applied = False


def wants_exact(request: Any) -> str:
    """Why a request runs exactly: it asked for it (or for the KV of such requests), or is a beam search; else empty."""
    params = request.sampling_params
    custom = params.custom_params
    if in_exact_namespace(request.extra_key) or (isinstance(custom, dict) and custom.get(CUSTOM_PARAM) == "exact"):
        return "asked for exact"
    return "beam search" if (getattr(params, "beam_width", None) or 1) > 1 else ""


def _request_created(result: None, request: Any, *args: Any, **kwargs: Any) -> None:
    del result, args, kwargs
    if wants_exact(request) == "asked for exact":
        if not in_exact_namespace(request.extra_key):
            request.extra_key = f"{request.extra_key or ''}|{EXACT_NAMESPACE}"
        return
    custom = request.sampling_params.custom_params
    if isinstance(custom, dict) and CUSTOM_PARAM in custom:
        _warn_of(repr(custom[CUSTOM_PARAM])[:80])


@functools.lru_cache(maxsize=64)
def _warn_of(value: str) -> None:
    logger.warning(
        "mac: a request's custom_params has %r: %s, which means nothing; the only value is 'exact'. It runs as the "
        "server is configured",
        CUSTOM_PARAM,
        value,
    )


def _batch_begins(result: Any, cls: type, batch: Any, model_runner: Any, **kwargs: Any) -> None:
    del cls, kwargs
    active = serving.current()
    if active is not None and active.site.runner is model_runner:
        slots = [SCRATCH_ROW if (row := compat.row_of(request)) is None else row for request in batch.reqs]
        extend = result.forward_mode.is_extend()
        active.begin(slots, functools.partial(batch_rows, result, batch.reqs, slots, extend=extend), extend=extend)


def batch_rows(batch: Any, requests: list[Any], slots: list[int], *, extend: bool) -> list[BatchRow]:
    """The requests of a forward pass, in the words of :class:`BatchRow`."""
    rows = []
    for index, (request, slot) in enumerate(zip(requests, slots, strict=True)):
        tokens = len(request.origin_input_ids) + len(request.output_ids)
        prefix = batch.extend_prefix_lens_cpu[index] if extend else tokens - 1
        end = prefix + (batch.extend_seq_lens_cpu[index] if extend else 1)
        rows.append(BatchRow(slot, request.rid, tokens, end, prefix, extend, wants_exact(request)))
    return rows


def _radix_cache_built(original: Any, context: Any) -> Any:
    tree = original(context)
    active = serving.current()
    if active is None or active.snapshots is None:
        return tree
    from .radix import watch

    return watch(tree, active.snapshots)


def _results_processed(original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    notices = getattr(scheduler.tree_cache, "ring_notices", None)
    with contextlib.nullcontext() if notices is None else notices.postponed():
        result = original(scheduler, *args, **kwargs)
    active = serving.current()
    if active is not None:
        active.end()
    return result


def _drop_after(what: str) -> Any:
    def hook(result: Any, *args: Any, **kwargs: Any) -> None:
        del result, args, kwargs
        active = serving.current()
        if active is not None:
            active.drop_all(what)

    return hook
