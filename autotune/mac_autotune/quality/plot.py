"""The frontier: what a rule reads against what it costs, from a table of results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mac_kernels import PRESETS, InputError

from .csv import Row

_BETA = re.compile(r",beta=([^,]+)")
_CONTROLS = {"window": "s", "newest": "v", "paper": "X"}


def plot_frontier(rows: Sequence[Row], path: Path) -> None:
    """Draw KL against the share of KV read, one panel per text.

    Rules that differ only in their influence bound are joined, the presets with their threshold's; controls have shapes
    of their own. Of each text the measurement over most tokens is drawn (others read other tokens, which are not
    comparable with it), and the controls that are not in it.

    Raises
    ------
    InputError
        If the rows hold no divergence.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row.suite == "kl" and row.metric == "kl"]
    texts = sorted({row.text for row in rows})
    if not texts:
        raise InputError("the table has no KL; measure it first with mac-kernels eval kl")
    figure, panels = pyplot.subplots(1, len(texts), figsize=(5.5 * len(texts), 5), sharey=True, squeeze=False)
    longest = {text: max(row.tokens for row in rows if row.text == text) for text in texts}
    own = {place: max(row.tokens for row in rows if place == (row.text, row.config)) for place in _places(rows)}
    rows = [
        row
        for row in rows
        if row.tokens == longest[row.text] or (row.config in _CONTROLS and row.tokens == own[row.text, row.config])
    ]
    families = list(dict.fromkeys(_family(row.config) for row in sorted(rows, key=lambda row: row.kv_read)))
    for panel, text in zip(panels[0], texts, strict=True):
        for index, family in enumerate(families):
            points = sorted(
                (row for row in rows if row.text == text and _family(row.config) == family), key=lambda row: row.kv_read
            )
            if not points:
                continue
            read, kl = [row.kv_read for row in points], [row.value for row in points]
            error = [[max(r.value - r.ci_low, 0) for r in points], [max(r.ci_high - r.value, 0) for r in points]]
            marker = _CONTROLS.get(family, "o")
            line = "--" if family in _CONTROLS else "-"
            panel.errorbar(
                read, kl, yerr=error, marker=marker, ls=line, ms=4, lw=1, capsize=2, color=f"C{index}", label=family
            )
            for row in points:
                place = row.kv_read, row.value
                panel.annotate(_point(row.config), place, fontsize=6, xytext=(3, 3), textcoords="offset points")
        title = f"{rows[0].model}, {text}, {longest[text]} tokens"
        panel.set(title=title, xlabel="share of KV cache read", yscale="log")
    panels[0][0].set_ylabel("KL(full || rule), nats per token")
    panels[0][-1].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _places(rows: Sequence[Row]) -> set[tuple[str, str]]:
    return {(row.text, row.config) for row in rows}


def _family(config: str) -> str:
    """What a rule shares with those that differ from it in the influence bound alone."""
    if config.startswith("window"):
        return "window"
    preset, comma, options = config.partition(",")
    if preset in PRESETS and PRESETS[preset].influence is not None:
        return f"tau={PRESETS[preset].threshold:g}".replace("=0.", "=.") + comma + options
    return _BETA.sub("", config)


def _point(config: str) -> str:
    """A rule's place within its family."""
    bound = _BETA.search(config)
    return bound.group(1) if bound else config.rpartition(":")[2].partition(",")[0]
