"""Recorded queries, keys and values of a model reading one text: recorded once, replayed under any policy."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from mac_kernels import HeadLayout, InputError, Rope
from mac_kernels.files import write_whole
from mac_kernels.settings import cache_dir
from mac_transformers.intercept import intercepted, layout_of, num_layers_of, residual_norms
from mac_transformers.rope import ModelRope

from .quality import texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .quality.suites import Bench

_FORMAT = 2
MAX_WINDOW = 1024
"""Queries recorded before the first decoded token: no larger window can be replayed."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Some layers of a model that read ``prompt + steps`` tokens under full attention; ``N`` layers.

    ``k``, ``v`` [N, Hkv, prompt + steps, D], ``q`` [N, rows, Hq, D] after RoPE, of the last ``rows`` tokens;
    ``cos_sin`` [prompt + steps, rotary_dim]; ``out_proj`` [N, hidden, Hq * D] and ``residual`` [N, steps], the norm of
    the residual stream before the layer, tell what an error of the attention does to the model. All fp32, ``out_proj``
    bf16. ``layers``: their numbers; ``scale``: the calibrated ``influence_scale`` of all layers, ``None`` without.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cos_sin: torch.Tensor
    interleaved: bool
    sm_scale: float
    prompt: int
    layers: list[int]
    out_proj: torch.Tensor
    residual: torch.Tensor
    scale: list[list[float]] | None = None

    @property
    def layout(self) -> HeadLayout:
        """Heads of the layers."""
        return HeadLayout(self.q.shape[2], self.k.shape[1], self.q.shape[3])

    @property
    def rope(self) -> Rope:
        """The rotation that the queries carry."""
        return Rope.from_cos_sin_cache(self.cos_sin, interleaved=self.interleaved)

    @property
    def steps(self) -> int:
        """Decoded tokens."""
        return self.k.shape[2] - self.prompt


class _Recorder:
    """Plain causal attention that keeps what it sees of the wanted layers."""

    def __init__(self, layers: list[int], rows: int) -> None:
        self.seen: dict[int, tuple[torch.Tensor, ...]] = {}
        self.out_proj: dict[int, torch.Tensor] = {}
        self.rope: tuple[torch.Tensor, bool] | None = None
        self.sm_scale = 0.0
        self._layers, self._rows = set(layers), rows

    def attend(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float
    ) -> torch.Tensor:
        # torch types every attribute of a module as Tensor | Module; these are an int and a Linear
        layer, length = int(module.layer_idx), q.shape[2]  # type: ignore[arg-type]
        if layer in self._layers:
            newest = q[:, :, -self._rows :].transpose(1, 2)
            self.seen[layer] = tuple(x[0].float().cpu().contiguous() for x in (newest, k, v))
            # a Linear; torch types every attribute as Tensor | Module
            self.out_proj[layer] = module.o_proj.weight.detach().to("cpu", torch.bfloat16)  # type: ignore[union-attr,operator]
            if self.rope is None:
                rope = ModelRope(module, q.dtype).at(length)
                self.rope = torch.cat(rope.cos_sin(torch.arange(length)), dim=-1), rope.interleaved
                self.sm_scale = sm_scale
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=sm_scale).transpose(1, 2)


@torch.inference_mode()
def record(model: PreTrainedModel, tokens: torch.Tensor, *, prompt: int, max_layers: int) -> Trace:
    """Read ``tokens`` [L] in one pass and keep queries, keys and values of up to ``max_layers`` evenly spread layers.

    Raises
    ------
    InputError
        If the prompt is not shorter than the text.
    UnsupportedError
        If the model is not built of decoder layers whose attention ends in ``o_proj``.
    """
    if not 1 <= prompt < len(tokens):
        raise InputError(f"prompt={prompt} must be in [1, {len(tokens) - 1}], shorter than the text of {len(tokens)}")
    count = num_layers_of(model)
    wanted = min(max_layers, count)
    layers = sorted({round(index * (count - 1) / max(wanted - 1, 1)) for index in range(wanted)})
    recorder, steps = _Recorder(layers, MAX_WINDOW + len(tokens) - prompt), len(tokens) - prompt
    with intercepted(model), residual_norms(model, layers) as residual:
        model(
            input_ids=tokens[None].to(model.device),
            position_ids=torch.arange(len(tokens), device=model.device)[None],
            use_cache=False,
            logits_to_keep=1,
            attention_handler=recorder,
        )
    q, k, v = (torch.stack([recorder.seen[layer][part] for layer in layers]) for part in range(3))
    assert recorder.rope is not None and layout_of(model) == HeadLayout(q.shape[2], k.shape[1], q.shape[3])
    out_proj = torch.stack([recorder.out_proj[layer] for layer in layers])
    norms = torch.stack([residual[layer][-steps:].cpu() for layer in layers])
    return Trace(q, k, v, *recorder.rope, recorder.sm_scale, prompt, layers, out_proj, norms)


def trace_of_text(
    bench: Bench,
    name: texts.PassageName,
    purpose: str,
    *,
    prompt: int,
    steps: int,
    max_layers: int,
    say: Callable[[str], None],
    scale: Callable[[torch.Tensor], Sequence[Sequence[float]]] | None = None,
) -> Trace:
    """The trace of the end of a text, from the cache folder or recorded now.

    Parameters
    ----------
    bench : Bench
        The model.
    name : str
        The text.
    purpose : str
        The model and what the trace is for: traces of one purpose and text and of equal sizes are the same.
    prompt, steps, max_layers : int
        As :func:`record` takes them; ``steps`` tokens follow the prompt.
    say : callable
        Takes a line of progress.
    scale : callable, optional
        Measures the ``influence_scale`` of all layers on the prompt [1, P].
    """
    path = trace_path(f"{purpose} {name} {prompt}+{steps} {max_layers}")
    if path.is_file():
        say(f"trace of {name}: {path}")
        return load_trace(path)
    say(f"recording {name}: {prompt} + {steps} tokens")
    tokens = texts.passages(bench.tokenizer, name, length=prompt + steps, count=2)[1]
    trace = record(bench.model, tokens, prompt=prompt, max_layers=max_layers)
    if scale is not None:
        measured = scale(tokens[None, :prompt].to(bench.model.device))
        trace = dataclasses.replace(trace, scale=[list(row) for row in measured])
    save_trace(trace, path)
    return trace


def trace_path(what: str) -> Path:
    """Where the trace of ``what`` (model, text and sizes in words) is kept."""
    return cache_dir() / "traces" / f"{hashlib.sha256(f'{_FORMAT} {what}'.encode()).hexdigest()[:16]}.pt"


def save_trace(trace: Trace, path: Path) -> None:
    """Write a trace, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {field.name: getattr(trace, field.name) for field in dataclasses.fields(trace)}
    content = io.BytesIO()
    torch.save(values, content)
    write_whole(path, content.getvalue())


def load_trace(path: Path) -> Trace:
    """Read a trace that :func:`save_trace` wrote.

    Raises
    ------
    InputError
        If it cannot be read; delete it to record it again.
    """
    try:
        return Trace(**torch.load(path, weights_only=True))
    except (OSError, RuntimeError, TypeError, ValueError, EOFError) as error:
        raise InputError(f"trace {path} cannot be read ({error}); delete it, it is recorded again") from None
