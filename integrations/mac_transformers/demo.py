"""The demonstration: one text, decoded token by token with full attention, with MAC and with a plain window."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import json
import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mac_kernels import InputError, MacConfig, RingPool
from mac_kernels.support import choose_backend

from .compare import Comparison, compare
from .intercept import layout_of, num_layers_of
from .outdir import OutputFolder
from .policies import Mac, Window
from .speed import decode_seconds
from .weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPORT_SCHEMA = 1
SPEED_STEPS, SPEED_WARMUP = 24, 4
FIGURE_COLUMNS = 100
_SINKS = 4
_CONTROL = "sink + window"

StageProgress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """What to decode: ``label`` names the config in the report; ``text_file`` ``None`` is the documentation text."""

    config: MacConfig
    label: str = "careful"
    text_file: Path | None = None
    prompt_tokens: int = 3600
    tokens: int = 448


def read_text(path: Path | None) -> tuple[str, str]:
    """Return a text and its name; without a path, the documentation inside Python's standard library.

    Raises
    ------
    InputError
        If the file cannot be read or is empty.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics)), "pydoc_data.topics of the standard library"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text {path} cannot be read ({error}); give a UTF-8 text file") from None
    if not text.strip():
        raise InputError(f"text {path} is empty; give a file with some thousand words")
    return text, path.name


def check_settings(settings: DemoSettings) -> tuple[str, str]:
    """Check what can be checked before weights are fetched; return the text and its name.

    Raises
    ------
    InputError
        If a count is out of range, or the text cannot be read or is empty.
    """
    for name, value, least in (("prompt_tokens", settings.prompt_tokens, 2), ("tokens", settings.tokens, 1)):
        if value < least:
            raise InputError(f"{name}={value} must be >= {least}; choose a larger number")
    return read_text(settings.text_file)


def run_demo(weights: Weights, settings: DemoSettings, *, progress: StageProgress | None = None) -> dict[str, Any]:
    """Decode the text under every policy and return the report, ready for JSON.

    Parameters
    ----------
    weights : Weights
    settings : DemoSettings
    progress : callable, optional

    Raises
    ------
    InputError
        If a count is out of range or the text is too short.
    UnsupportedError
        If the model has layers other than full attention.
    """
    show = progress or (lambda stage, done, total: None)
    text, text_name = check_settings(settings)
    show("loading the model", 0, 1)
    model, tokenizer = weights.load()
    prompt, continuation = _split(text, text_name, tokenizer, model, settings)
    result = compare(
        model,
        prompt[None],
        continuation[None],
        {settings.label: Mac(settings.config), _CONTROL: Window(sinks=_SINKS, like=settings.label)},
        progress=lambda done, total: show("decoding under every policy", done, total),
    )
    speed = _speed(model, prompt, continuation, settings, show)
    return {
        "schema": REPORT_SCHEMA,
        "model": {"name": weights.name, "source": weights.source, "dtype": str(model.dtype).removeprefix("torch.")},
        "text": {"name": text_name, "prompt_tokens": len(prompt), "decoded_tokens": result.kl.shape[0]},
        "config": {"label": settings.label, **json.loads(settings.config.to_json())["mac"]},
        "environment": _environment(model, settings.config),
        "memory": _memory(model, settings),
        "rows": [_row(result, index, speed) for index in range(len(result.policies))],
        "figure": _figure_data(result, settings.label),
        "notes": _notes(settings),
    }


def write_report(report: dict[str, Any], folder: OutputFolder) -> list[Path]:
    """Write ``report.json`` and ``report.png``; both are drawn up in memory first."""
    from .demo_figure import draw

    text = json.dumps(report, indent=1)
    image = draw(report)
    return [folder.write("report.json", text.encode()), folder.write("report.png", image)]


def _split(
    text: str,
    text_name: str,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    settings: DemoSettings,
) -> tuple[torch.Tensor, torch.Tensor]:
    wanted = settings.prompt_tokens + settings.tokens + 1  # the last token is only predicted
    longest = model.config.max_position_embeddings
    if wanted > longest:
        raise InputError(
            f"prompt_tokens={settings.prompt_tokens} + tokens={settings.tokens} + 1 = {wanted} is more than the "
            f"model's {longest} positions; ask for fewer"
        )
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < wanted:
        raise InputError(
            f"text {text_name} has {len(ids)} tokens, but prompt_tokens={settings.prompt_tokens} + "
            f"tokens={settings.tokens} + 1 = {wanted} are asked for; give a longer text or ask for fewer"
        )
    return ids[: settings.prompt_tokens], ids[settings.prompt_tokens : wanted]


def _speed(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    continuation: torch.Tensor,
    settings: DemoSettings,
    show: StageProgress,
) -> dict[str, float]:
    """Decoded tokens per second of full attention and MAC, each alone on the library's own path; median step."""
    tokens = continuation[: SPEED_WARMUP + SPEED_STEPS]
    rates = {}
    for name, config in (("full", None), (settings.label, settings.config)):
        progress = functools.partial(show, f"timing {name}")
        warmup = min(SPEED_WARMUP, len(tokens) - 1)
        seconds = decode_seconds(model, prompt, tokens, config, warmup=warmup, progress=progress)
        rates[name] = 1 / torch.tensor(seconds).median().item()
    return rates


def _row(result: Comparison, index: int, speed: dict[str, float]) -> dict[str, Any]:
    """One row of the table; ``None`` where a figure has no meaning for the policy."""
    name = result.policies[index]
    kl, nll = result.kl[:, index].flatten(), result.nll
    reuses = name not in ("full", _CONTROL)
    return {
        "policy": name,
        "head_hit_rate": result.head_hit[:, :, index].mean().item() if reuses else None,
        "group_hit_rate": result.group_hit[:, :, index].mean().item() if reuses else None,
        "kv_read_share": result.kv_read[:, :, index].mean().item(),
        "kl_mean_nats": kl.mean().item(),
        "kl_median_nats": kl.median().item(),
        "kl_p99_nats": kl.quantile(0.99).item(),
        "top1_agreement": result.top1[:, index].float().mean().item(),
        "perplexity_ratio": math.exp((nll[:, index] - nll[:, 0]).mean().item()),
        "tokens_per_second": speed.get(name),
    }


def _figure_data(result: Comparison, label: str) -> dict[str, Any]:
    """Means over equal stretches of steps, small enough for the report: figures are drawn from it alone."""
    steps = result.kl.shape[0]
    columns = min(steps, FIGURE_COLUMNS)
    edges = [round(i * steps / columns) for i in range(columns + 1)]
    mac, control = result.index(label), result.index(_CONTROL)

    def stretches(values: torch.Tensor) -> list[Any]:  # [N, ...] -> [..., columns]
        means = torch.stack([values[a:b].mean(0) for a, b in itertools.pairwise(edges)], dim=-1)
        rounded: list[Any] = [[float(f"{x:.4g}") for x in row] for row in means.reshape(-1, columns).tolist()]
        return rounded

    return {
        "step_edges": edges,
        "group_hit_by_layer": stretches(result.group_hit[:, :, mac, 0]),
        "error_by_layer": stretches(result.error[:, :, mac, 0]),
        "kl_mac": stretches(result.kl[:, mac])[0],
        "kl_control": stretches(result.kl[:, control])[0],
    }


def _memory(model: PreTrainedModel, settings: DemoSettings) -> dict[str, int]:
    layout, layers = layout_of(model), num_layers_of(model)
    tokens = settings.prompt_tokens + settings.tokens
    config = settings.config
    return {
        "ring_bytes": RingPool.bytes_per_ring(
            num_layers=layers,
            layout=layout,
            window=config.window,
            dtype=model.dtype,
            correction=config.correction,
            sketch_dim=None if config.nominees else 0,
        ),
        "kv_cache_bytes": 2 * layers * layout.num_kv_heads * layout.head_dim * tokens * model.dtype.itemsize,
    }


def _environment(model: PreTrainedModel, config: MacConfig) -> dict[str, Any]:
    return {
        "mac_kernels": importlib.metadata.version("mac-kernels"),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "backend": choose_backend(config, layout_of(model), model.device)[0],
    }


def _notes(settings: DemoSettings) -> list[str]:
    notes = [
        "tokens/s here is the reference backend on a CPU: it states what is computed, it is not built to be fast",
        "one text and one model: expect other hit rates and errors elsewhere",
    ]
    if settings.prompt_tokens + settings.tokens <= settings.config.min_context:
        notes.append(
            f"nothing could be reused: the text ends before min_context={settings.config.min_context}; "
            "ask for more tokens or set min_context lower"
        )
    return notes
