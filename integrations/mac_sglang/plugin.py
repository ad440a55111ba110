"""The entry point that SGLang calls in every one of its processes (group ``sglang.srt.plugins``)."""

from __future__ import annotations

import functools
import logging

from . import compat, status

NAME = "mac"
"""Of the plugin, and of the radix cache backend."""

logger = logging.getLogger(__name__)
_registered = False


def register() -> None:
    """Register the attention backends and the radix cache backend; a second call does nothing.

    The radix cache backend need not be named: with ``--attention-backend mac``, snapshots of rings are kept beside
    whatever prefix cache the server uses.

    Nothing of SGLang is changed here: hooks are applied when the backend is built, so a server with another attention
    backend runs as if this package were not installed. A step that fails ends a server that asks for ``mac`` or
    ``tca``, with the reason, when it builds the backend.
    """
    global _registered
    if _registered:
        return
    _registered = True
    status.attempt("supported SGLang", compat.check_version)
    status.attempt("attention backend", _register_attention)
    status.attempt("radix cache backend", _register_radix)
    if status.problems():  # a server that uses the backend logs all steps when it builds it
        logger.error("mac-kernels plugin: %s", status.summary())


def _register_attention() -> None:
    from .backend import METHODS, build_backend

    for name in METHODS:
        compat.register_attention_backend(name, functools.partial(build_backend, name))


def _register_radix() -> None:
    # SGLang's own cache: a hook watches whatever cache a server with this attention backend builds
    compat.register_radix_backend(NAME, compat.default_radix_cache)
