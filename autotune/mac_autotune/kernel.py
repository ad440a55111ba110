"""The kernel layer: latency of the fused step in one bucket of batch and context, beside the default's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mac_kernels import BatchMacDecodeWithPagedKVCacheWrapper, HeadLayout, MacConfig, MissingError, Rope
from mac_kernels.launch import LaunchParams, default_launch
from mac_kernels.testing.scenario import PagedStore, Scenario, plant_step, random_store
from mac_kernels.testing.timing import Timing, calls_per_round, measure

from .latency import PLANTED_LAG
from .objective import Measured, Report
from .space import LaunchSpace, Suggest

HIT_RATES = (1.0, 0.9, 0.5, 0.0)
"""Cheapest first, so that a bad trial is pruned before it has read whole caches."""
# the influence bound costs the kernels one comparison; planting under it would need a cache for every hit rate
CONFIG = dataclasses.replace(MacConfig(), influence=None, break_even=None)
SLOWER = 1.02
"""No hit rate may get slower than the default by more than this factor."""
_WRONG = 1e-2  # of the output's norm: two roundings to bf16
_ROUND_US = 4_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What launch parameters are tuned for."""

    layout: HeadLayout
    batch: int
    context: int
    page_size: int = 1
    dtype: torch.dtype = torch.bfloat16

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
        A filled cache of at least this batch and context; filling one takes longer than a trial.
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
        self._store = make_store(problem, seed=seed, device=device) if store is None else store
        self._scenarios = {hit: self._plant(hit, seed) for hit in hit_rates}
        facts = torch.cuda.get_device_properties(0) if device == "cuda" else None
        sms, l2 = (facts.multi_processor_count, facts.L2_cache_size) if facts else (2, 0)
        self.default = default_launch(problem.batch * problem.layout.num_kv_heads, config, sms)
        self._flush = torch.empty(2 * l2, dtype=torch.int8, device=device)
        self._right: dict[float, torch.Tensor] = {}

    def time(self, launches: Mapping[str, LaunchParams], hit: float, *, repeats: int) -> dict[str, Timing]:
        """Time several launch parameters in turn, every call with a cold L2 cache.

        Raises
        ------
        ArithmeticError
            If one computes something else than the default.
        """
        calls = {name: self._call(launch, hit) for name, launch in launches.items()}
        if hit not in self._right:
            self._right[hit] = self._output(self._call(self.default, hit))
        for name, (run, out) in calls.items():
            got = self._output((run, out))
            error = float((got.float() - self._right[hit].float()).norm() / self._right[hit].float().norm())
            if not error <= _WRONG:
                raise ArithmeticError(f"{name} at hit rate {hit:g}: off by {error:.3g} of the output's norm")
        count = calls_per_round(next(iter(calls.values()))[0], round_us=_ROUND_US) if self._device == "cuda" else 1
        providers: dict[str, list[Callable[[], Any]]] = {
            name: [_after(self._flush, run)] * count for name, (run, _) in calls.items()
        }
        timed = measure(
            {**providers, "": [_after(self._flush, None)] * count}, device=self._device, repeats=repeats, warmup=1
        )
        idle = timed.pop("").p50_us
        return {name: Timing(t.p20_us - idle, t.p50_us - idle, t.p80_us - idle, t.n) for name, t in timed.items()}

    def run_once(self, launch: LaunchParams) -> None:
        """Run one step at the first hit rate, which compiles the kernels."""
        self._call(launch, next(iter(self._scenarios)))[0]()
        if self._device == "cuda":
            torch.cuda.synchronize()

    def _plant(self, hit: float, seed: int) -> Scenario:
        problem = self.problem
        groups = problem.batch * problem.layout.num_kv_heads
        order = torch.randperm(groups, generator=torch.Generator().manual_seed(seed))
        outcome = torch.ones(groups, dtype=torch.bool)
        outcome[order[: round((1 - hit) * groups)]] = False
        return plant_step(
            self._config,
            problem.layout,
            kv_lens=[problem.context] * problem.batch,
            hit=outcome.view(problem.batch, -1),
            rope=self._rope,
            lag=(PLANTED_LAG, PLANTED_LAG + 3),
            rows="synthetic",
            page_size=problem.page_size,
            dtype=torch.bfloat16,
            device=self._device,
            seed=seed,
            store=self._store,
        )

    def _call(self, launch: LaunchParams, hit: float) -> tuple[Callable[[], Any], torch.Tensor]:
        problem, scenario = self.problem, self._scenarios[hit]
        table: Any = scenario.kv.table
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

    def _output(self, call: tuple[Callable[[], Any], torch.Tensor]) -> torch.Tensor:
        run, out = call
        run()
        return out.clone()


class KernelObjective:
    """Latency relative to the default, geometric mean over the hit rates; both timed in turn in every trial.

    Launch parameters that do not fit on the GPU, or compute something else, break a constraint.
    """

    metrics = ("latency",)
    noisy = True

    def __init__(self, bench: Bench, *, repeats: int = 5) -> None:
        self._bench, self._repeats = bench, repeats
        self._space = LaunchSpace(bench.default)

    def params(self) -> dict[str, Any]:
        """Trial 0: what serving uses without a file."""
        return self._space.params()

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
        return Measured((mean_ratio(ratios.values()),), {"usable": 0.0, "slower": worst - SLOWER}, notes)


def make_store(problem: Problem, *, seed: int, device: str = "cuda") -> PagedStore:
    """A filled cache for the problem."""
    return random_store(
        [problem.context] * problem.batch,
        problem.layout,
        page_size=problem.page_size,
        dtype=problem.dtype,
        device=device,
        seed=seed,
    )


def mean_ratio(ratios: Any) -> float:
    """Geometric mean."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs))


def unusable(error: Exception) -> bool:
    """Whether an error says that these launch parameters cannot be used on this GPU; all other errors are ours."""
    if isinstance(error, ArithmeticError):
        return True
    name = type(error).__name__
    return name in ("OutOfResources", "PTXASError", "CompilationError") or "out of resource" in str(error)


def _after(flush: torch.Tensor, run: Callable[[], Any] | None) -> Callable[[], Any]:
    def call() -> Any:
        flush.add_(1)
        return None if run is None else run()

    return call
