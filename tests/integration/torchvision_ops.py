"""Import this before transformers where SGLang is installed: so is torchvision, built for CUDA, without its operators.

Its Python code refers to operators that its library would define; importing this module declares them.
"""

from __future__ import annotations

import contextlib

import torch

for _name in ("nms", "qnms"):
    with contextlib.suppress(RuntimeError):  # a torchvision that works has declared it already
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
