"""Un-rotation: recover the pre-RoPE query from the rotated one, so that no model has to be hooked."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .errors import InputError
from .handles import register

CosSin = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Rope:
    """The model's own rotation ``R_t``, as a table over positions or as inverse frequencies.

    Rotary embeddings are orthogonal up to a magnitude ``c`` (YaRN's and LongRoPE's attention factor), so
    ``R^-1 = R^T / c^2``. Only the first ``rotary_dim`` dimensions are rotated; the others pass through.

    Parameters
    ----------
    cos_sin : callable
        Maps positions [...] int64 to ``(cos, sin)``, each [..., rotary_dim // 2] fp32.
    rotary_dim : int
        Rotated dimensions, even, ``>= 2``.
    interleaved : bool, default False
        ``False``: NeoX halves ``(x1, x2)``; ``True``: GPT-J pairs ``(x[0::2], x[1::2])``.
    max_position : int, optional
        Positions that ``cos_sin`` knows; default: every one.

    Raises
    ------
    InputError
        If ``rotary_dim`` is odd or smaller than 2.
    """

    def __init__(
        self, cos_sin: CosSin, rotary_dim: int, *, interleaved: bool = False, max_position: int | None = None
    ) -> None:
        if rotary_dim < 2 or rotary_dim % 2:
            raise InputError(f"rotary_dim={rotary_dim} must be even and >= 2; take it from the model config")
        self.rotary_dim = rotary_dim
        self.interleaved = interleaved
        self.max_position = max_position
        self.number = register(self)
        self._cos_sin = cos_sin
        self._table: torch.Tensor | None = None

    @staticmethod
    def from_inv_freq(inv_freq: torch.Tensor, *, attention_scaling: float = 1.0, interleaved: bool = False) -> Rope:
        """Rotation by ``position * inv_freq`` ([rotary_dim // 2] fp32), cos and sin scaled by ``attention_scaling``.

        The product is formed in fp32, as models do, so that a rotation at a large position is undone with the same
        rounding.
        """
        freq = inv_freq.detach().float()

        def cos_sin(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            angle = positions.float().unsqueeze(-1) * freq.to(positions.device)
            return angle.cos() * attention_scaling, angle.sin() * attention_scaling

        return Rope(cos_sin, 2 * freq.numel(), interleaved=interleaved)

    @staticmethod
    def from_cos_sin_cache(cos_sin_cache: torch.Tensor, *, interleaved: bool = False) -> Rope:
        """Rotation read from a table [max_position, rotary_dim], ``cat(cos, sin)`` along the last dim (SGLang, vLLM).

        Raises
        ------
        InputError
            If the table is not two-dimensional.
        """
        if cos_sin_cache.dim() != 2:
            raise InputError(f"cos_sin_cache must be [max_position, rotary_dim], got {list(cos_sin_cache.shape)}")
        half = cos_sin_cache.shape[1] // 2

        def cos_sin(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            rows = cos_sin_cache[positions.clamp(0, cos_sin_cache.shape[0] - 1)].float()
            return rows[..., :half], rows[..., half:]

        rope = Rope(cos_sin, cos_sin_cache.shape[1], interleaved=interleaved, max_position=cos_sin_cache.shape[0])
        if cos_sin_cache.dtype == torch.float32 and cos_sin_cache.is_contiguous():
            rope._table = cos_sin_cache  # 64 MB of a model of 128K positions are not held twice
        return rope

    def cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``(cos, sin)`` [..., rotary_dim // 2] fp32 at ``positions`` [...], magnitude included."""
        return self._cos_sin(positions)

    def cos_sin_cache(self, max_position: int, device: torch.device | str) -> torch.Tensor:
        """Return the table ``cat(cos, sin)`` [>= max_position, rotary_dim] fp32 that the kernels read, built once."""
        cached = self._table
        if cached is None or cached.shape[0] < max_position or cached.device != torch.device(device):
            rows = max(4096, 1 << (max_position - 1).bit_length())
            cos, sin = self.cos_sin(torch.arange(rows, device=device))
            cached = self._table = torch.cat((cos, sin), dim=-1).contiguous()
        return cached

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Apply ``R_t`` to ``x`` [..., H, D] at ``positions`` [...]; returns fp32."""
        cos, sin = self.cos_sin(positions)
        return self._turn(x, cos, sin)

    def pull_back(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Apply the transpose ``R_t^T`` (a rotated key seen from the pre-RoPE frame of ``t``); returns fp32."""
        cos, sin = self.cos_sin(positions)
        return self._turn(x, cos, -sin)

    def unrotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Apply the inverse ``R_t^-1`` to ``x`` [..., H, D] at ``positions`` [...]; returns fp32."""
        cos, sin = self.cos_sin(positions)
        square = cos.square() + sin.square()
        return self._turn(x, cos / square, -sin / square)

    def _turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x.float()
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # one head axis
        turned, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        else:
            a, b = turned.chunk(2, dim=-1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return torch.cat((turned, rest), dim=-1)
