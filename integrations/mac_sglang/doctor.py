"""What ``mac-kernels doctor --sglang`` asks: does each step of the plugin take effect with this machine's SGLang."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from importlib.util import find_spec

from . import compat, hooks, plugin, status
from .compat import SGLangChanged

GROUP = "sglang.srt.plugins"


def examine() -> tuple[status.Step, ...]:
    """Go through the steps of a server's start, as far as they need no model; imports SGLang, which takes a while."""
    if not status.attempt("SGLang is installed", _installed):
        return status.steps()
    status.attempt("SGLang finds the plugin", _found)
    plugin.register()
    status.attempt("`mac` and `tca` are choices of --attention-backend", _chosen)
    status.attempt("hooks", hooks.apply)
    return status.steps()


def _installed() -> None:
    if find_spec("sglang") is None:
        raise SGLangChanged('SGLang is not installed; run: pip install "mac-kernels[sglang]"')


def _found() -> None:
    names = [point.name for point in entry_points(group=GROUP) if point.value == "mac_sglang.plugin:register"]
    if not names:
        raise SGLangChanged(f"the entry point group {GROUP} has no mac; install mac-kernels with pip")
    allowed = os.environ.get("SGLANG_PLUGINS", "")
    if allowed and plugin.NAME not in [name.strip() for name in allowed.split(",")]:
        raise SGLangChanged(f"SGLANG_PLUGINS={allowed} leaves mac out; add it")


def _chosen() -> None:
    from .backend import METHODS

    missing = [name for name in METHODS if not compat.is_attention_backend(name)]
    if missing:
        raise SGLangChanged(f"{', '.join(missing)} was not added; see the step `attention backend`")
