"""``python -m mac_autotune.quality``: the same verbs as ``mac-kernels eval``."""

from .cli import eval_command

eval_command(prog_name="mac-kernels eval")
