"""Bypass: a layer whose hits do not pay for the search stops matching for a while, then tries again.

The rule is whole numbers from one end to the other, so every backend takes the same decision on the same steps.
"""

from __future__ import annotations

import torch

from .types import Reason

TRIAL_GROUPS = 256
"""Judged kv groups before a layer's hit rate is trusted."""
PAUSE_STEPS = 256
"""Decode steps without matching before the next trial."""
_HITS, _JUDGED, _PAUSE, _FIELDS = 0, 1, 2, 4  # padded to 16 bytes, so that the kernels see one alignment


class Bypass:
    """Running hit rate and remaining pause of every layer, [num_layers, 4] int32 on the device of the rings.

    After a step that searched, its hits and its judged groups (those that had a row to judge) are added. When
    ``TRIAL_GROUPS`` have been judged, either the hit rate is at least ``break_even`` and both counts are halved, so
    that old steps fade, or the layer pauses for ``PAUSE_STEPS`` steps and starts again from nothing.
    """

    def __init__(self, num_layers: int, device: torch.device | str) -> None:
        self.values = torch.zeros(num_layers, _FIELDS, dtype=torch.int32, device=device)

    def paused(self, layer: int) -> torch.Tensor:
        """Whether the layer's next step is bypassed, [] bool on the device."""
        return self.values[layer, _PAUSE] > 0

    def pause(self, steps: int) -> None:
        """Bypass the next ``steps`` steps of every layer."""
        self.values[:, _PAUSE] = steps

    def update(self, layer: int, reason: torch.Tensor, break_even: float) -> None:
        """Count one step by the reasons [B, Hkv] of its groups."""
        state = self.values[layer]
        judged = (reason == Reason.HIT) | (reason >= Reason.DISTANCE)
        hits, all_judged = state[_HITS] + (reason == Reason.HIT).sum(), state[_JUDGED] + judged.sum()
        enough = all_judged >= TRIAL_GROUPS
        poor = enough & (hits < all_judged.float() * break_even)
        fade = torch.where(enough, 2, 1)
        state[_PAUSE] = torch.where(poor, PAUSE_STEPS, (state[_PAUSE] - 1).clamp(min=0))
        state[_HITS] = torch.where(poor, 0, hits // fade)
        state[_JUDGED] = torch.where(poor, 0, all_judged // fade)
