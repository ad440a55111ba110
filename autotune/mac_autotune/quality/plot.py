"""The frontier: what a rule reads against what it costs, from a table of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mac_kernels import InputError

from .csv import Row

_MARKERS = {"window": "s", "newest": "v", "paper": "X"}


def plot_frontier(rows: Sequence[Row], path: Path) -> None:
    """Draw KL against the share of KV read, one panel per text, controls marked by their own shapes.

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
    figure, panels = pyplot.subplots(1, len(texts), figsize=(5 * len(texts), 4.5), sharey=True, squeeze=False)
    for panel, text in zip(panels[0], texts, strict=True):
        for row in (row for row in rows if row.text == text):
            kind = next((kind for kind in _MARKERS if row.config.startswith(kind)), "MAC")
            error = [[max(row.value - row.ci_low, 0)], [max(row.ci_high - row.value, 0)]]
            colour = "C3" if kind in _MARKERS else "C0"
            panel.errorbar(row.kv_read, row.value, yerr=error, fmt=_MARKERS.get(kind, "o"), color=colour, capsize=2)
            panel.annotate(row.config, (row.kv_read, row.value), fontsize=6, xytext=(3, 3), textcoords="offset points")
        panel.set(title=f"{rows[0].model}, {text}", xlabel="share of KV cache read", yscale="log", xlim=(0, 1))
    panels[0][0].set_ylabel("KL(full || rule), nats per token")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
