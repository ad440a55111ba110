"""The reference backend against the kit that every backend must pass."""

from typing import ClassVar

import torch

from mac_kernels import MacConfig
from mac_kernels.testing.conformance import CONFIGS, DecodeConformance, variant


class TestReference(DecodeConformance):
    backend = "reference"
    dtypes = (torch.float32, torch.bfloat16)
    rules: ClassVar[dict[str, MacConfig]] = {**CONFIGS, "scan": variant(nominees=None)}
    rule_steps = 24
    runs_paper = runs_selected = True


class TestReferenceFp16(DecodeConformance):
    backend = "reference"
    dtypes = (torch.float16,)
    rules: ClassVar[dict[str, MacConfig]] = {"head": CONFIGS["head"], "bound": CONFIGS["bound"]}
    steps, rule_steps, chain_steps = 5, 16, 60
    runs_paper = True
