"""One tiny decode step per backend and device, compared with plain attention."""

from __future__ import annotations

import platform

import torch

import mac_kernels as mk
from mac_kernels.support import BACKENDS, Backend, unsupported_reasons

from .doctor import BackendReport

# fp32 accumulation over this many keys leaves errors of about 1e-6; a wrong kernel is off by orders of magnitude
TOLERANCE = 1e-4
# FlashInfer has no fp32: half a unit in the last place of bf16 for outputs below 4, twice
BF16_TOLERANCE = 3e-2
_TOKENS, _PAGE = 40, 16
_LAYOUT = mk.HeadLayout(num_qo_heads=4, num_kv_heads=2, head_dim=64)


def visible_devices() -> dict[str, str]:
    """Return the devices that torch can use here, each with a description."""
    devices = {"cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        devices[f"cuda:{index}"] = f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}"
    return devices


def probe_backends(devices: list[str]) -> list[BackendReport]:
    """Run every backend once on every device."""
    return [_probe(backend, device) for backend in BACKENDS for device in devices]


def _probe(backend: Backend, device: str) -> BackendReport:
    config = mk.MacConfig.preset("exact", window=16, band=8, sinks=2, min_context=16)
    reasons = unsupported_reasons(backend, config, _LAYOUT, torch.device(device))
    if reasons:
        return BackendReport(backend, device, works=False, problem="; ".join(reasons))
    try:
        error = _exact_step_error(backend, config, device)
    except Exception as failure:  # a broken installation fails in its own way; the report must name it
        return BackendReport(backend, device, works=False, problem=f"{type(failure).__name__}: {failure}")
    tolerance = TOLERANCE if _dtype(backend) == torch.float32 else BF16_TOLERANCE
    works = error <= tolerance
    problem = "" if works else f"an exact step is off plain attention by {error:.1e}, more than {tolerance:.0e}"
    return BackendReport(backend, device, works, problem, error)


def _dtype(backend: Backend) -> torch.dtype:
    return torch.bfloat16 if backend == "flashinfer" else torch.float32


def _exact_step_error(backend: Backend, config: mk.MacConfig, device: str) -> float:
    draw = torch.Generator().manual_seed(0)
    pages = -(-_TOKENS // _PAGE)
    shape = (pages, _PAGE, _LAYOUT.num_kv_heads, _LAYOUT.head_dim)
    k, v = (torch.randn(shape, generator=draw).to(device, _dtype(backend)) for _ in range(2))
    q = torch.randn(1, _LAYOUT.num_qo_heads, _LAYOUT.head_dim, generator=draw).to(device, _dtype(backend))
    rings = mk.RingPool(
        num_rings=1, num_layers=1, layout=_LAYOUT, window=config.window, dtype=torch.float32, device=device
    )
    rings.acquire(slot=0)
    wrapper = mk.BatchMacDecodeWithPagedKVCacheWrapper(kv_layout="NHD", backend=backend)
    wrapper.plan(
        torch.tensor([0, pages], dtype=torch.int32, device=device),
        torch.arange(pages, dtype=torch.int32, device=device),
        torch.tensor([_TOKENS - (pages - 1) * _PAGE], dtype=torch.int32, device=device),
        layout=_LAYOUT,
        page_size=_PAGE,
        config=config,
        rope=mk.Rope.from_inv_freq(torch.ones(_LAYOUT.head_dim // 2, device=device)),
    )
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    got = wrapper.run(q, (k, v), rings=rings, layer=0, slots=zero, generations=zero)
    q, k, v = q.float(), k.float(), v.float()
    keys, values = (x.flatten(0, 1)[:_TOKENS].transpose(0, 1) for x in (k, v))  # [Hkv, L, D]
    keys, values = (x.repeat_interleave(_LAYOUT.group_size, dim=0) for x in (keys, values))  # [Hq, L, D]
    want = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), keys, values)
    return (got - want.transpose(0, 1)).abs().max().item()
