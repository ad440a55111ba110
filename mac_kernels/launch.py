"""Launch parameters of the fused step: safe defaults by batch, never chosen by timing inside serving."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .config import MacConfig

_NUMBERS_PER_THREAD = 64  # of nominated rows
_SMALLEST_TILE = 16 * 1024
_BESIDE_TILES = 12 * 1024  # what else the rest keeps in shared memory, at most
_LONG_PAGES = 16  # tokens; measured beside 1 and 4, whose tiles wait for more look-ups and so must be larger


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchParams:
    """Launch parameters of the kernels; the defaults are safe on every GPU that the backend supports.

    Triton's scout: ``splits`` programs per kv group scan the ring, ``block_rows`` rows at a time, and as many attend to
    band and sinks. Decide: one program per kv group. Rest: ``programs_per_sm``. Both attend to ``..._tile_bytes`` of
    keys and values at once. Complete: ``complete_splits`` programs (a power of two) share a head's dims,
    ``block_parts`` parts merged at once. Warps and stages as in Triton.

    Where the CUDA kernels can serve, those of Triton and their fields have no effect, but for the rest of heads too
    wide for the CUDA one. The front has ``cluster_size`` blocks (1, 2, 4 or 8) of ``front_warps`` warps (4 or 8) per kv
    group; rest and complete go by the shape alone. With a ``cluster_size`` of 0, also where a call or a file leaves it
    out, no CUDA kernel is used; :func:`default_launch` asks for them.
    """

    splits: int = 1
    scout_tile_bytes: int = 32 * 1024
    scout_warps: int = 4
    scout_stages: int = 2
    block_rows: int = 64
    decide_warps: int = 4
    programs_per_sm: int = 2
    rest_tile_bytes: int = 32 * 1024
    rest_warps: int = 4
    rest_stages: int = 5
    block_parts: int = 8
    complete_splits: int = 1
    complete_warps: int = 2
    cluster_size: int = 0
    front_warps: int = 8


def is_small(num_groups: int, num_sms: int) -> bool:
    """Whether the kernels of a batch leave most SMs idle, so that a step takes the time of its longest programs."""
    return num_groups * 4 <= num_sms


def default_launch(num_groups: int, config: MacConfig, num_sms: int, page_size: int) -> LaunchParams:
    """Choose for a batch by its number of kv groups; measured on an H100 with D 128 and bf16.

    The first launch gets up to three programs per SM, at least 32 band tokens each. With few groups a miss is cut into
    many parts: then one program per SM leaves fewer to merge, more of them are merged at once, and several programs
    share a head's dims.
    The front gets as large clusters as still run all at once, with room left for the SMs that a cluster cannot use.
    """
    most = max(1, min(8, config.band // 32))
    splits = 1
    while splits * 2 <= most and num_groups * splits * 4 <= 3 * num_sms:
        splits *= 2
    cluster_size = next(
        (size for size in (8, 4) if num_groups * size * 2 <= num_sms), 2 if num_groups * 2 <= num_sms else 1
    )
    if is_small(num_groups, num_sms):
        return LaunchParams(
            cluster_size=cluster_size,
            splits=splits,
            scout_stages=1,
            programs_per_sm=1,
            rest_tile_bytes=(64 if page_size < _LONG_PAGES else 32) * 1024,
            rest_warps=8,
            block_parts=64,
            complete_splits=4,
        )
    if num_groups >= num_sms:
        return LaunchParams(
            cluster_size=cluster_size,
            splits=splits,
            scout_stages=3,
            block_rows=128,
            block_parts=4,
            complete_warps=1,
        )
    return LaunchParams(cluster_size=cluster_size, splits=splits, block_parts=16, complete_splits=2)


def fitting(launch: LaunchParams, shared_bytes: int) -> LaunchParams:
    """The same with tiles of the rest that fit into a block's shared memory; larger ones are an H100's."""
    tiles = (launch.rest_stages - 1) // 2  # at once: a stage of keys and values, one of their pages
    tile = launch.rest_tile_bytes
    while tile > _SMALLEST_TILE and tiles * tile + _BESIDE_TILES > shared_bytes:
        tile //= 2
    return dataclasses.replace(launch, rest_tile_bytes=tile)


def block_n(tile_bytes: int, block_d: int, itemsize: int, most: int = 128) -> int:
    """Keys per tile: the power of two that fits, at least the tensor cores' 16."""
    fitting = max(1, tile_bytes // (2 * block_d * itemsize))
    return max(16, min(most, 1 << (fitting.bit_length() - 1)))


def chunk_d(splits: int, block_d: int) -> int:
    """Dims of a head per program where so many are to share them, at least 16."""
    return max(16, block_d // splits)


def nominees_at_once(config: MacConfig, warps: int, numbers: int) -> int:
    """Nominated rows of ``numbers`` numbers each that so many warps judge at once, a power of two."""
    fitting = max(1, _NUMBERS_PER_THREAD * 32 * warps // numbers)
    return min(_power_of_two(config.nominees or 1), 1 << (fitting.bit_length() - 1))


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
