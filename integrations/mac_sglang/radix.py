"""SGLang's prefix cache, made to tell the snapshot store what happens; what the tree does stays as it is."""

from __future__ import annotations

import contextlib
import functools
import logging
from array import array
from collections.abc import Callable, Hashable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from . import compat
from .chain import TokenChain
from .requests import in_exact_namespace
from .store import SnapshotService

logger = logging.getLogger(__name__)


class Notices:
    """Turns what a tree does into calls of the store.

    Parameters
    ----------
    service : SnapshotService
        Where the rings of requests are saved.
    """

    def __init__(self, service: SnapshotService) -> None:
        self.service = service
        self._chains: WeakKeyDictionary[Any, TokenChain] = WeakKeyDictionary()
        self._postponed: list[Callable[[], object]] | None = None

    def matched(self, key: Any, request: Any) -> None:
        """A request was looked up: these are its tokens."""
        # an empty key stands for a request that must not share its KV
        if len(key.token_ids) == 0 or in_exact_namespace(key.extra_key):
            return
        namespace = (key.extra_key, compat.cache_salt_of(key), request.lora_id)
        chain = self._chains.get(request)
        if chain is None or chain.namespace != namespace:
            self.service.forget(request.rid)
            chain = self._chains[request] = TokenChain(namespace, key.token_ids)
        chain.extend(key.token_ids)
        self.service.note(request.rid, chain)

    def computed(self, request: Any, up_to: int, *, finished: bool) -> None:
        """The KV of a request's first ``up_to`` tokens is in the tree."""
        known = len(request.origin_input_ids) + len(request.output_ids)
        # a chunk of a prompt that goes on: its rows are not the prompt's last, and no other request ends there
        if not finished and up_to < known - 1:
            return
        chain, row = self._chains.get(request), compat.row_of(request)
        if chain is None or row is None:
            return
        chain.extend(_tokens(request, up_to))
        node = _handle(request.last_node)
        self._do(functools.partial(self.service.save, request.rid, row, up_to, node=node))

    def released(self, request: Any) -> None:
        """The request gave its row back."""
        self._do(functools.partial(self.service.forget, request.rid))

    @contextlib.contextmanager
    def postponed(self) -> Iterator[None]:
        """Save no ring inside, but at the end: SGLang sends the tokens of a pass after it has told the tree of them.

        The rows are where they were until the next pass begins.
        """
        waiting: list[Callable[[], object]] = []
        self._postponed = waiting
        try:
            yield
        finally:
            self._postponed = None
            for action in waiting:
                self.attempt(action)

    def attempt(self, notice: Callable[..., object], *args: Any, **options: Any) -> None:
        """Give notice; a failure is counted, logged once and never reaches the tree."""
        try:
            notice(*args, **options)
        except Exception:
            if self.service.notice_failed() == 1:
                logger.exception("a ring snapshot failed; requests go on with empty rings, later failures are counted")

    def _do(self, action: Callable[[], object]) -> None:
        if self._postponed is None:
            action()
        else:
            self._postponed.append(action)


def watch(tree: Any, service: SnapshotService) -> Any:
    """Let a prefix cache of SGLang tell the store what happens, and return it.

    Methods of this one object are wrapped, so it does not matter which tree SGLang selected (0.5.17: ``RadixCache`` and
    its relatives; later ``UnifiedRadixCache`` with either tree core) nor how it is derived. Watching a tree again
    replaces the store; a tree that shares no prefixes (``--disable-radix-cache``) is left alone. Failures
    are counted by the store.
    """
    if not compat.shares_prefixes(tree):
        return tree
    watched = hasattr(tree, "ring_notices")
    tree.ring_notices = Notices(service)
    for name, notice in _NOTICES.items():
        if not watched and hasattr(tree, name):
            setattr(tree, name, _followed_by(notice, tree, getattr(tree, name)))
    return tree


def _followed_by(notice: Callable[..., None], tree: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        result = method(*args, **options)
        tree.ring_notices.attempt(notice, tree, *args, **options)
        return result

    return call


def _match_prefix(tree: Any, params: Any) -> None:
    if params.req is not None:
        tree.ring_notices.matched(params.key, params.req)


def _checkpoint(tree: Any, req: Any, *, up_to: int, **options: Any) -> None:
    del options
    tree.ring_notices.computed(req, up_to, finished=req.finished())


def _on_release(tree: Any, req: Any, **options: Any) -> None:
    del options
    tree.ring_notices.released(req)


def _cache_unfinished_req(tree: Any, req: Any, *args: Any, **options: Any) -> None:
    del args, options
    tree.ring_notices.computed(req, len(req.get_fill_ids()), finished=False)


def _cache_finished_req(tree: Any, req: Any, is_insert: bool = True, *, kv_len_to_handle: int, **options: Any) -> None:
    del options
    try:
        if is_insert:
            tree.ring_notices.computed(req, kv_len_to_handle, finished=True)
    finally:
        tree.ring_notices.released(req)


def _leaf_evicted(tree: Any, node: Any, *args: Any) -> None:
    del args
    if not compat.keeps_evicted_kv(tree):
        tree.ring_notices.service.drop(_handle(node))


def _reset(tree: Any) -> None:
    tree.ring_notices.service.clear()


_NOTICES: dict[str, Callable[..., None]] = {
    "match_prefix": _match_prefix,
    "checkpoint": _checkpoint,
    "on_release": _on_release,
    "cache_unfinished_req": _cache_unfinished_req,
    "cache_finished_req": _cache_finished_req,
    "_delete_leaf": _leaf_evicted,
    "_evict_device_leaf": _leaf_evicted,
    "reset": _reset,
}
"""What follows a call, by the method; a tree has those of its version."""


def _handle(node: Any) -> Hashable:
    """A node's number: the trees of 0.5.17 hand out nodes, later ones numbers."""
    number: Hashable = getattr(node, "id", node)
    return number


def _tokens(request: Any, up_to: int) -> array[int]:
    """Tokens of a request, at least ``up_to``; SGLang's own array lags behind the outputs."""
    fills: array[int] = request.full_untruncated_fill_ids
    return fills if len(fills) >= up_to else request.origin_input_ids + request.output_ids
