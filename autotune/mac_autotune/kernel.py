"""The kernel layer: latency of the fused step in one bucket of batch and context, beside the default's."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mac_kernels import BatchMacDecodeWithPagedKVCacheWrapper, HeadLayout, MacConfig, MissingError, PagedKV, Rope
from mac_kernels.cuda import compiler
from mac_kernels.cuda.front import unsupported_front
from mac_kernels.cuda.rest import serves_rest
from mac_kernels.launch import LaunchParams, default_launch
from mac_kernels.testing.scenario import PagedStore, Scenario, plant_step, random_store
from mac_kernels.testing.timing import Timing
from mac_kernels.tuned import planted_share

from .latency import PLANTED_LAG
from .objective import Measured, Report
from .rounds import Round, Rounds, gpu_turn
from .space import TRITON, LaunchSpace, Suggest

HIT_RATES = (1.0, 0.9, 0.5, 0.0)
"""Cheapest first, so that a bad trial is pruned before it has read whole caches."""
# the influence bound costs the kernels one comparison; planting under it would need a cache for every hit rate
CONFIG = dataclasses.replace(MacConfig(), influence=None, break_even=None)
SHORTEST = CONFIG.min_context + 1
"""Tokens that a planted step needs at least."""
SLOWER_IN_TRIAL = 1.05
"""No hit rate may get slower by more than this factor: the limit of the export, and what a few samples may be off."""
_WRONG = 1e-2  # of the output's norm: two roundings to bf16
_ROUND_US = 500.0
_MOST_CALLS = 8
_KEPT = 12  # launch parameters whose rounds are kept: the default, and all that are measured again together


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What launch parameters are tuned for."""

    layout: HeadLayout
    batch: int
    context: int
    page_size: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def cache_bytes(self) -> int:
        """Size of the KV cache."""
        layout = self.layout
        return self.batch * self.context * 2 * layout.num_kv_heads * layout.head_dim * self.dtype.itemsize

    def __str__(self) -> str:
        layout = self.layout
        heads = f"hq{layout.num_qo_heads}-hkv{layout.num_kv_heads}-d{layout.head_dim}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{heads}-{dtype}-p{self.page_size}/B{self.batch}-L{self.context}"


class Bench:
    """The planted steps of a problem, one per hit rate, and their timing.

    Parameters
    ----------
    problem : Problem
    seed : int
        Of queries, keys and outcomes.
    store : PagedStore, optional
        A filled cache of at least as many tokens; filling one takes longer than a trial.
    hit_rates : sequence of float
    config : MacConfig
        Without an influence bound.
    device : str, default "cuda"
        ``"cpu"`` under the Triton interpreter, to try things out.

    Raises
    ------
    MissingError
        Without the device.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        seed: int = 0,
        store: PagedStore | None = None,
        hit_rates: Sequence[float] = HIT_RATES,
        config: MacConfig = CONFIG,
        device: str = "cuda",
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise MissingError("launch parameters are tuned on the GPU that they are for, and there is none here")
        self.problem, self._config, self._device = problem, config, device
        half = problem.layout.head_dim // 2
        self._rope = Rope.from_inv_freq(10000.0 ** (-torch.arange(half, device=device) / half))
        whole = make_store(problem, seed=seed, device=device) if store is None else store
        self._store = _regrouped(whole, problem)
        self._table: Any = self._store.table([problem.context] * problem.batch)
        with gpu_turn(device == "cuda"):
            self._scenarios = {hit: self._plant(hit, seed) for hit in hit_rates}
        self.default = default_launch(
            problem.batch * problem.layout.num_kv_heads, config, num_sms(device), problem.page_size
        )
        self.space = LaunchSpace(self.default, tuned_kernels(next(iter(self._scenarios.values()))))
        self._rounds, self._made = Rounds(device), dict[tuple[LaunchParams, float], Round]()
        self._steps: dict[LaunchParams, BatchMacDecodeWithPagedKVCacheWrapper] = {}
        self._right: dict[float, torch.Tensor] = {}
        self._counts: dict[float, int] = {}

    def time(self, launches: Mapping[str, LaunchParams], hit: float, *, repeats: int) -> dict[str, Timing]:
        """Time several launch parameters in turn, every call with a cold L2 cache.

        Raises
        ------
        ArithmeticError
            If one computes something else than the default.
        """
        rounds = {name: self._round(launch, hit, name) for name, launch in launches.items()}
        return self._rounds.time(rounds, repeats=repeats)

    def _round(self, launch: LaunchParams, hit: float, name: str) -> Round:
        """A round of this step, made the first time it is asked for; what it computes is checked then."""
        if (launch, hit) in self._made:
            return self._made[launch, hit]
        if hit not in self._right and launch != self.default:
            self._round(self.default, hit, "default")
        run, out = self._call(launch, hit)
        with gpu_turn(self._device == "cuda"):
            run()
            right = self._right.setdefault(hit, out.clone())
            error = float((out.float() - right.float()).norm() / right.float().norm())
            if not error <= _WRONG:
                raise ArithmeticError(f"{name} at hit rate {hit:g}: off by {error:.3g} of the output's norm")
            if hit not in self._counts:
                alone_us = self._rounds.alone_us(run)
                self._counts[hit] = max(1, min(_MOST_CALLS, round(_ROUND_US / alone_us)))
        self._made[launch, hit] = self._rounds.make(run, self._counts[hit])
        return self._made[launch, hit]

    def _step(self, launch: LaunchParams) -> BatchMacDecodeWithPagedKVCacheWrapper:
        """The planned step of some launch parameters; all hit rates share one page table."""
        if launch not in self._steps:
            others = [one for one in self._steps if one != self.default]
            for old in others[: max(0, len(others) + 2 - _KEPT)]:
                del self._steps[old]
                self._made = {key: made for key, made in self._made.items() if key[0] != old}
            problem, table = self.problem, self._table
            mac = BatchMacDecodeWithPagedKVCacheWrapper("NHD", backend="triton")
            mac.plan(
                table.indptr,
                table.indices,
                table.last_page_len,
                layout=problem.layout,
                page_size=problem.page_size,
                config=self._config,
                rope=self._rope,
                kv_data_type=problem.dtype,
                launch=launch,
            )
            self._steps[launch] = mac
        return self._steps[launch]

    def _plant(self, hit: float, seed: int) -> Scenario:
        problem = self.problem
        groups = problem.batch * problem.layout.num_kv_heads
        order = torch.randperm(groups, generator=torch.Generator().manual_seed(seed))
        outcome = torch.ones(groups, dtype=torch.bool)
        outcome[order[round(planted_share(hit, groups) * groups) :]] = False
        return plant_step(
            self._config,
            problem.layout,
            kv_lens=[problem.context] * problem.batch,
            hit=outcome.view(problem.batch, -1),
            rope=self._rope,
            lag=(PLANTED_LAG, PLANTED_LAG + 3),
            rows="synthetic",
            page_size=problem.page_size,
            dtype=problem.dtype,
            device=self._device,
            seed=seed,
            store=self._store,
        )

    def _call(self, launch: LaunchParams, hit: float) -> tuple[Callable[[], Any], torch.Tensor]:
        scenario, mac = self._scenarios[hit], self._step(launch)
        out = torch.full_like(scenario.q, torch.nan)
        cache = (scenario.kv.k_cache, scenario.kv.v_cache)

        def run() -> Any:
            return mac.run(
                scenario.q,
                cache,
                rings=scenario.rings,
                layer=0,
                slots=scenario.slots,
                generations=scenario.generations,
                out=out,
            )

        return run, out


class KernelObjective:
    """Latency relative to the default, geometric mean over the hit rates; both timed in turn in every trial.

    Launch parameters that do not fit on the GPU, or compute something else, break a constraint.
    """

    metrics = ("latency",)
    noisy = True

    def __init__(self, bench: Bench, *, repeats: int = 3) -> None:
        self._bench, self._repeats = bench, repeats
        self._space = bench.space

    def first(self) -> list[dict[str, Any]]:
        """Trial 0: what serving uses without a file; then all of a small space."""
        return self._space.first()

    def suggest(self, trial: Suggest) -> LaunchParams:
        """Let a trial choose."""
        return self._space.suggest(trial)

    def measure(self, point: LaunchParams, report: Report) -> Measured:
        """Time a point beside the default at every hit rate."""
        ratios: dict[float, float] = {}
        for step, hit in enumerate(HIT_RATES):
            try:
                timed = self._bench.time({"default": self._bench.default, "trial": point}, hit, repeats=self._repeats)
            except Exception as error:
                if not unusable(error):
                    raise
                return Measured((10.0,), {"usable": 1.0, "slower": 1.0}, {"error": str(error).splitlines()[0]})
            ratios[hit] = timed["trial"].p50_us / timed["default"].p50_us
            report(mean_ratio(ratios.values()), step)
        worst = max(ratios.values())
        notes = {"ratio": {f"{hit:g}": round(ratio, 4) for hit, ratio in ratios.items()}}
        return Measured((mean_ratio(ratios.values()),), {"usable": 0.0, "slower": worst - SLOWER_IN_TRIAL}, notes)


def make_store(problem: Problem, *, seed: int, device: str = "cuda") -> PagedStore:
    """A filled cache for the problem."""
    with gpu_turn(device == "cuda"):
        return random_store(
            [problem.context] * problem.batch,
            problem.layout,
            page_size=problem.page_size,
            dtype=problem.dtype,
            device=device,
            seed=seed,
        )


def _regrouped(store: PagedStore, problem: Problem) -> PagedStore:
    """The same cache with its pages dealt out to the requests of a problem."""
    pages = -(-problem.context // problem.page_size)
    other = copy.copy(store)
    other.pages = store.pages.flatten()[: problem.batch * pages].view(problem.batch, pages)
    return other


def num_sms(device: str) -> int:
    """Streaming multiprocessors; 2 without a GPU."""
    return torch.cuda.get_device_properties(0).multi_processor_count if device == "cuda" else 2


def tuned_kernels(scenario: Scenario) -> tuple[str, ...]:
    """The kernels that serve a step and have launch parameters: Triton's, or the front and what it leaves to them."""
    kv: PagedKV = scenario.kv
    against = unsupported_front(scenario.q, kv, scenario.rings, scenario.config, scenario.q)
    if against is not None or compiler.missing() is not None:
        return TRITON
    narrow = serves_rest(kv.layout.head_dim, kv.layout.group_size, kbar=scenario.rings.correction)
    return ("front",) if narrow else ("front", "rest")


def mean_ratio(ratios: Any) -> float:
    """Geometric mean."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs))


def unusable(error: Exception) -> bool:
    """Whether an error says that these launch parameters cannot be used on this GPU; all other errors are ours."""
    if isinstance(error, ArithmeticError):
        return True
    name = type(error).__name__
    names = ("OutOfResources", "PTXASError", "CompilationError", "CudaError")
    return name in names or "out of resource" in str(error)
