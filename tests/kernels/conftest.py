"""Triton's interpreter, where it is asked for, without work that changes no result: a quarter of its time."""

from __future__ import annotations

import dataclasses
import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime.interpreter import interpreter_builder as _builder

    # it repeats 32-bit sums and products in 64 bits to find an overflow, which nothing looks at unless `debug` is set
    _builder.options = dataclasses.replace(_builder.options, sanitize_overflow=False)
