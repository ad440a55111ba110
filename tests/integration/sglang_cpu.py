"""Runs a script of requests through a real SGLang engine on the CPU: ``python sglang_cpu.py script.json result.json``.

SGLang is not meant to run on a machine without a GPU unless its own CPU kernels are installed. What stands in the way
is worked around below and in torchvision_ops.py, for tests only. The processes that SGLang spawns import this file as
their main module, so all of them get the same.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torchvision_ops  # noqa: F401  # imported for what it registers


def _work_around() -> None:
    from sglang.srt.layers.rotary_embedding import base
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    base._is_cpu = True  # or it imports kernels of another project
    # 0.5.17 decides by the backend's name whether its Triton helpers can run
    HookRegistry.register("sglang.srt.utils.common.support_triton", lambda original, name: False, HookType.AROUND)
    HookRegistry.apply_hooks()


def pin_nothing() -> None:
    """For LoRA, whose layers pin what they copy to a GPU; only in a server, as other libraries would see it, too."""
    import torch

    torch.Tensor.pin_memory = lambda tensor, device=None: tensor
    torch.tensor, torch.zeros = _unpinned(torch.tensor), _unpinned(torch.zeros)


def _unpinned(create: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create)
    def call(*args: Any, pin_memory: bool = False, **options: Any) -> Any:
        del pin_memory
        return create(*args, **options)

    return call


def _count_into(path: Path) -> None:
    """Let the scheduler process write what was counted to a file."""
    from mac_sglang import compat, serving
    from mac_sglang.mac_serving import MacServing

    activate = serving.activate

    def activated(active: Any) -> None:
        counts = _counts if isinstance(active, MacServing) else _tca_counts
        activate(active)
        if compat.tensor_rank() == 0:
            active.on_results.append(lambda: _replace(path, json.dumps(counts(active))))

    serving.activate = activated


def _replace(path: Path, text: str) -> None:
    """Write a file at once: who waits for an answer reads it while the scheduler goes on."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def _counts(active: Any) -> dict[str, Any]:
    from mac_kernels import Reason

    totals = active.rings.counters.values.sum(0).tolist()
    snapshots = {} if active.snapshots is None else {
        name: getattr(active.snapshots.stats, name) for name in ("saves", "hits", "rows_restored", "evictions")
    }  # fmt: skip
    return {
        "groups": {reason.name: totals[reason] for reason in Reason},
        "fallbacks": dict(active.fallbacks),
        "free_rings": active.rings.free_rings,
        "rings": active.rings.num_rings,
        "snapshots": snapshots,
    }


def _tca_counts(active: Any) -> dict[str, Any]:
    read, total = active.kv_tokens.tolist()
    return {
        "read": read,
        "total": total,
        "prefill_tokens": active.prefill_tokens,
        "fallbacks": dict(active.fallbacks),
        "sets_in_use": active.pool.num_sets - active.pool.slots.free,
    }


def _sampling(request: dict[str, Any]) -> dict[str, Any]:
    extra = {"custom_params": request["custom_params"]} if "custom_params" in request else {}
    return {"temperature": 0.0, "max_new_tokens": request["tokens"], "ignore_eos": True, **extra}


async def _one(engine: Any, request: dict[str, Any]) -> list[int]:
    stream = await engine.async_generate(
        input_ids=request["prompt"], sampling_params=_sampling(request), stream=True, rid=request.get("rid")
    )
    tokens: list[int] = []
    async for part in stream:
        tokens = part["output_ids"]
        if len(tokens) >= request.get("abort_after", sys.maxsize):
            engine.tokenizer_manager.abort_request(rid=request["rid"])
            break
    return tokens


async def _together(engine: Any, requests: list[dict[str, Any]]) -> list[list[int]]:
    return list(await asyncio.gather(*(_one(engine, request) for request in requests)))


def main(script_path: Path, result_path: Path) -> None:
    """Run the steps of a script: each is a list of requests that are sent together, or ``"flush"``."""
    import sglang

    script = json.loads(script_path.read_text())
    engine = sglang.Engine(**script["engine"])
    atexit.register(engine.shutdown)
    loop = engine.loop if hasattr(engine, "loop") else asyncio.get_event_loop()
    outputs = []
    for step in script["steps"]:
        if step == "flush":
            engine.flush_cache()
        else:
            outputs.append(loop.run_until_complete(_together(engine, step)))
    counters = script_path.with_suffix(".counters")
    counts = json.loads(counters.read_text()) if counters.exists() else None
    result_path.write_text(json.dumps({"outputs": outputs, "counts": counts}))


_work_around()
if len(sys.argv) > 1 and Path(sys.argv[1]).suffix == ".json":
    _count_into(Path(sys.argv[1]).with_suffix(".counters"))

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
