"""The model's rotation, rebuilt from its config, so that queries can be un-rotated without touching a layer."""

from __future__ import annotations

import functools
import inspect
import sys
from types import ModuleType
from typing import Any

import torch
from torch import nn

from mac_kernels import Rope, UnsupportedError

_HINT = "The layer runs exact attention."
_FARTHEST_PROBE = 1000


class ModelRope:
    """The rotation of one attention layer of a transformers model.

    A fresh instance of the model's own rotary class is built from the config, so every RoPE kind of the library has the
    frequencies, the magnitude and the rounding that the model uses.

    Parameters
    ----------
    module : torch.nn.Module
        The attention layer; its class and config are used, its state is not.
    dtype : torch.dtype
        Of the model: cos and sin are rounded to it, as the model does before rotating.
    rotated : bool, default True
        ``False``: a layer of the model that does not rotate its queries.

    Raises
    ------
    UnsupportedError
        If the model has no rotary embedding that can be rebuilt from its config.

    Notes
    -----
    Load a model with ``dtype=``: ``model.to(torch.bfloat16)`` and ``model.half()`` round the frequencies inside the
    model itself, which the config does not tell.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, *, rotated: bool = True) -> None:
        modeling = sys.modules[type(module).__module__]
        self._rotary: Any = _build_rotary(modeling, module)
        self._dtype, self._rotated = dtype, rotated
        self._layer_type = _layer_type(module) if hasattr(self._rotary, "layer_types") else None
        prefix = f"{self._layer_type}_" if self._layer_type else ""
        self._freq_name, self._scaling_name = f"{prefix}inv_freq", f"{prefix}attention_scaling"
        kind: Any = self._rotary.rope_type
        self._kind = str(kind[self._layer_type] if self._layer_type else kind)
        self._interleaved = _is_interleaved(modeling, self.embeddings(torch.tensor([[1]])), self._inv_freq().numel())
        self._rope: tuple[int, Rope] | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for layers of one model that share their rotation."""
        return type(self._rotary), self._layer_type, self._rotated

    def epoch(self, seq_len: int) -> int:
        """Name of the frequencies in effect while the longest position of the batch is ``seq_len - 1``.

        Ring rows of one epoch must not be matched in another.
        """
        if "dynamic" in self._kind:
            return seq_len if seq_len >= self._rotary.original_max_seq_len else 0
        if self._kind == "longrope":
            return int(seq_len > self._original_length())
        return 0

    def at(self, seq_len: int) -> Rope:
        """The rotation in effect at this sequence length."""
        epoch = self.epoch(seq_len)
        if self._rope is None or self._rope[0] != epoch:
            self.embeddings(torch.tensor([[seq_len - 1]]))  # brings the frequencies of the rotary class up to date
            self._rope = epoch, self._current()
        return self._rope[1]

    def embeddings(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(cos, sin)`` as the model hands them to its layers, for position_ids [B, N]."""
        layer_type = (self._layer_type,) if self._layer_type else ()
        cos, sin = self._rotary(torch.zeros(1, dtype=self._dtype), position_ids, *layer_type)
        return cos, sin

    def _current(self) -> Rope:
        inv_freq, dtype = self._inv_freq().clone(), self._dtype
        scaling = float(getattr(self._rotary, self._scaling_name, 1.0))

        @functools.cache
        def freq_on(device: torch.device) -> torch.Tensor:
            return inv_freq.to(device)

        def cos_sin(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            angle = positions.float().unsqueeze(-1) * freq_on(positions.device)
            return (angle.cos() * scaling).to(dtype).float(), (angle.sin() * scaling).to(dtype).float()

        def identity(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            one = torch.ones(*positions.shape, 1, device=positions.device)
            return one, torch.zeros_like(one)

        if not self._rotated:
            return Rope(identity, 2)
        return Rope(cos_sin, 2 * inv_freq.numel(), interleaved=self._interleaved)

    def _inv_freq(self) -> torch.Tensor:
        freq: torch.Tensor = getattr(self._rotary, self._freq_name)
        return freq.detach().float()

    def _original_length(self) -> int:
        parameters = self._rotary.config.rope_parameters
        parameters = parameters[self._layer_type] if self._layer_type else parameters
        return int(parameters["original_max_position_embeddings"])


def rope_of_layer(module: nn.Module, query: torch.Tensor) -> ModelRope:
    """The rotation of a layer that gave ``query`` [B, Hq, N, D], checked by asking the layer itself.

    The layer is called once with one hidden state at two positions: its un-rotated queries must agree. So a layer that
    does not rotate, or rotates in another way than the model's rotary class says, is found out.

    Raises
    ------
    UnsupportedError
        If the rotation cannot be rebuilt, or the layer's queries do not follow it.
    """
    limit = int(getattr(module.config, "max_position_embeddings", None) or _FARTHEST_PROBE)
    positions = torch.tensor([1, max(2, min(limit // 2, _FARTHEST_PROBE))], device=query.device)
    try:
        rope = ModelRope(module, query.dtype)
        asked = _ask(module, query, positions[None], rope.embeddings(positions[None].cpu()))
    except UnsupportedError:
        raise
    except Exception as error:  # a layer of unknown making may refuse the question in any way
        raise UnsupportedError(f"MAC on {type(module).__name__}", [f"it cannot be probed ({error})"], _HINT) from error
    tolerance = max(8 * torch.finfo(query.dtype).eps, 1e-4)
    for rotated in (True, False):
        candidate = rope if rotated else ModelRope(module, query.dtype, rotated=False)
        near, far = candidate.at(int(positions.max()) + 1).unrotate(asked, positions)
        if float((near - far).norm() / near.norm()) < tolerance:
            return candidate
    raise UnsupportedError(
        f"MAC on {type(module).__name__}", ["its queries are not rotated as its rotary class says"], _HINT
    )


def _ask(
    module: Any, query: torch.Tensor, position_ids: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Queries [2, Hq, D] of one hidden state at two positions; the attention function hands them to ``mac_probe``."""
    size = module.config.hidden_size
    hidden = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(query).expand(1, 2, size)
    embeddings = tuple(x.to(query.device) for x in cos_sin)
    queries: list[torch.Tensor] = []
    with torch.no_grad():
        module(
            hidden_states=hidden,
            position_embeddings=embeddings,
            attention_mask=None,
            position_ids=position_ids,
            mac_probe=queries,
        )
    return queries[0][0].transpose(0, 1)


def _layer_type(module: Any) -> str:
    return str(module.config.layer_types[module.layer_idx])


def _build_rotary(modeling: ModuleType, module: nn.Module) -> nn.Module:
    found = [
        value
        for name, value in vars(modeling).items()
        if name.endswith("RotaryEmbedding") and isinstance(value, type) and "Vision" not in name
    ]
    config = getattr(module, "config", None)
    parameters = getattr(config, "rope_parameters", None)
    problem = None
    if len(found) != 1:
        problem = f"its model has {len(found) or 'no'} rotary embedding classes, not one"
    elif not parameters:
        problem = "its config has no rope_parameters"
    elif "mrope_section" in parameters:
        problem = "its rotary positions have several dimensions"
    if problem is not None:
        raise UnsupportedError(f"MAC on {type(module).__name__}", [problem], _HINT)
    with torch.device("cpu"):
        rotary: nn.Module = found[0](config)
    return rotary


def _is_interleaved(modeling: ModuleType, cos_sin: tuple[torch.Tensor, torch.Tensor], half: int) -> bool:
    """Rotate a unit vector with the model's own function: its partner is the next dim, or the one half way on."""
    unit = torch.zeros(1, 1, 1, 2 * half)
    unit[..., 0] = 1
    rotate = modeling.apply_rotary_pos_emb
    together = "k" in inspect.signature(rotate).parameters  # some models rotate query and key one by one
    turned = rotate(unit, unit, *cos_sin)[0].flatten() if together else rotate(unit, *cos_sin).flatten()
    return half > 1 and bool(turned[1] != 0)
