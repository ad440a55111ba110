"""The acceptance tests of a decode backend, as a class to subclass.

>>> class TestMyBackend(DecodeConformance):  # in a pytest module
...     backend = "reference"
...     device = "cpu"
...     dtypes = (torch.float32, torch.bfloat16)
"""

from __future__ import annotations

import torch  # noqa: F401 - used by the example above

from .boundaries import Boundaries
from .cases import CONFIGS, PAIRWISE_CASES, PAPER, SMALL_CASES, Case, pairwise, variant
from .chain import Decision, replay
from .invariants import Invariants
from .options import Options
from .oracle import ChainOracle
from .rows import compare_row
from .selected import Selected
from .serving import Serving
from .session import Session, StepResult

__all__ = [
    "CONFIGS",
    "PAIRWISE_CASES",
    "PAPER",
    "SMALL_CASES",
    "Case",
    "ChainOracle",
    "Decision",
    "DecodeConformance",
    "Session",
    "StepResult",
    "compare_row",
    "pairwise",
    "replay",
    "variant",
]


class DecodeConformance(Invariants, Boundaries, Serving, Options, Selected):
    """Every behavioural test of a decode backend; subclass it under a name that pytest collects.

    Set ``backend`` and ``device``; narrow or widen ``dtypes``, ``cases``, ``rules``, ``steps`` and ``chain_steps``;
    override ``make_wrapper``, ``fill_rings`` or ``capture`` where the backend needs more. Each step is driven through
    the public ``plan()`` / ``run_return_trace()`` with NaN in every unwritten place, and judged by an fp64 oracle that
    follows the backend's own decisions, while the decisions are recomputed from the ring that it saw.
    """
