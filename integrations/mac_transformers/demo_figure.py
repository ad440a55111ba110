"""The demonstration's picture, drawn from its report alone."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _MUTED = "#22262e", "#6b7280"
_MAC, _CONTROL = "#0f766e", "#d97706"
_LOWEST_KL = 1e-6


def draw(report: dict[str, Any]) -> bytes:
    """Return a PNG: hit rate and error of every layer over the decode steps, and the KL beside the control's."""
    from matplotlib.figure import Figure

    data, rows = report["figure"], {row["policy"]: row for row in report["rows"]}
    mac = rows[report["config"]["label"]]
    figure = Figure(figsize=(10, 7.2), dpi=110, layout="constrained", facecolor="white")
    hits, errors, kl = figure.subplots(3, 1, sharex=True, height_ratios=[1.15, 1.15, 1])
    _layers(
        figure, hits, data, "group_hit_by_layer", label="share of kv groups reused", cmap="viridis", vmin=0.0, vmax=1.0
    )
    _title(
        hits, f"Reuse by layer: {mac['group_hit_rate']:.0%} of the kv groups, {mac['kv_read_share']:.0%} of the KV read"
    )
    _layers(figure, errors, data, "error_by_layer", label="relative error of the output", cmap="magma", vmin=0.0)
    _title(errors, "Deviation of each layer's attention output from full attention")
    _divergence(kl, data, mac, rows["sink + window"])
    text = report["text"]
    kl.set_xlabel(f"decode step after a prompt of {text['prompt_tokens']:,} tokens")
    figure.suptitle(f"MAC-Attention, preset {report['config']['label']}, on {report['model']['name']}", color=_INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _layers(figure: Figure, axes: Axes, data: dict[str, Any], field: str, *, label: str, **colours: Any) -> None:
    layers = len(data[field])
    edges = [layer - 0.5 for layer in range(layers + 1)]
    mesh = axes.pcolormesh(data["step_edges"], edges, data[field], rasterized=True, **colours)
    axes.set_ylabel("layer", color=_INK)
    bar = figure.colorbar(mesh, ax=axes, pad=0.01)
    bar.set_label(label, color=_MUTED)
    bar.outline.set_visible(False)
    _plain(axes)


def _divergence(axes: Axes, data: dict[str, Any], mac: dict[str, Any], control: dict[str, Any]) -> None:
    for field, row, colour in (("kl_mac", mac, _MAC), ("kl_control", control, _CONTROL)):
        name = f"{row['policy']}: reads {row['kv_read_share']:.0%} of the KV"
        values = [max(value, _LOWEST_KL) for value in data[field]]
        axes.stairs(values, data["step_edges"], color=colour, label=name, linewidth=1.6, baseline=None)
    axes.set_yscale("log")
    axes.set_ylabel("KL to full attention, nats", color=_INK)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.6)
    _title(axes, "Divergence of the next-token distribution")
    axes.legend(frameon=False, ncols=2, loc="upper right")
    axes.margins(y=0.25)
    _plain(axes)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11, color=_INK)


def _plain(axes: Axes) -> None:
    axes.tick_params(colors=_MUTED)
    for spine in axes.spines.values():
        spine.set_visible(False)
