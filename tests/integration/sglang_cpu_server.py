"""A real SGLang HTTP server on the CPU: ``python sglang_cpu_server.py --model-path ... --port ...``."""

from __future__ import annotations

import sys

import sglang_cpu  # works around what keeps SGLang from a CPU, here and in the processes that it spawns

sglang_cpu.pin_nothing()

if __name__ == "__main__":
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    run_server(prepare_server_args(sys.argv[1:]))
