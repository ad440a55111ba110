"""The attention backends: a method in front of SGLang's own, which does whatever the method does not."""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mac_kernels import UnsupportedError
from mac_kernels.support import Backend

from . import compat, hooks, mac_serving, serving, status, tca_serving
from .layers import LayerMap, map_layers
from .serving import Caches, DecodePlan, PrefillPass, Scales, Serving, Site

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Method:
    """A method by the name of its backend.

    ``rotated``: it has to know how a layer rotates its queries; ``budget``: the option that sets the memory it takes.
    """

    name: str
    rotated: bool
    budget: str
    start: Callable[[Site], Serving]


EAGER_PLANS = 16
"""Batch sizes whose plans are kept where no graph is: each holds buffers of its own."""
METHODS: Mapping[str, Method] = {
    "mac": Method("mac", rotated=True, budget="ring_memory_gb", start=mac_serving.start),
    "tca": Method("tca", rotated=False, budget="index_memory_gb", start=tca_serving.start),
}


def build_backend(name: str, runner: Any) -> Any:
    """Build the backend of a method for a model runner; SGLang calls it.

    Raises
    ------
    MacError
        If a step of the plugin failed, the config is wrong, or the model or a setting cannot be served. SGLang ends the
        server then.
    """
    try:
        if status.problems():
            raise compat.SGLangChanged("the plugin did not take effect: " + "; ".join(status.problems()))
        compat.check_runner(runner, name)
        return backend_class(name, str(runner.device))(runner)
    except Exception as error:
        logger.error("%s: the server cannot start: %s", name, error)
        raise


@functools.cache
def backend_class(name: str, device: str) -> type:
    """The backend of a method for a kind of device: the method in front of SGLang's exact backend."""
    exact = compat.exact_backend_class(device)
    attributes = {"__doc__": ServedAttention.__doc__, "method": METHODS[name]}
    return type(f"{name.title()}{exact.__name__}", (ServedAttention, exact), attributes)


# Every `super()` below is SGLang's backend, which backend_class() puts behind this class: mypy sees `object` there.
class ServedAttention:
    """A method in front of one of SGLang's attention backends, which stays responsible for whatever it does not do.

    Every ``super()`` is that backend: :func:`backend_class` derives from this class and it, which mypy cannot know.
    """

    method: ClassVar[Method]
    req_to_token_pool: Any

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)  # type: ignore[call-arg]  # the exact backend, see backend_class()
        self._fp8 = runner.kv_cache_dtype == torch.float8_e4m3fn
        if self._fp8:
            compat.check_fp8_writes(self)
        context_len = min(int(runner.model_config.context_len), self.req_to_token_pool.req_to_token.shape[1])
        self._layers = map_layers(
            runner.model, kv_dtype=runner.kv_cache_dtype, context_len=context_len, rotated=self.method.rotated
        )
        self._serving = _start(self.method, runner, self._layers, context_len)
        self._all_served = self._serving is not None and self._layers.complete
        self._eager: OrderedDict[int, DecodePlan] = OrderedDict()
        self._captured: list[DecodePlan] = []
        self._plan: DecodePlan | None = None
        self._prefill: PrefillPass | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepare a pass that no graph replays."""
        if forward_batch.forward_mode.is_decode_or_idle():
            if not self._all_served:
                super().init_forward_metadata(forward_batch)  # type: ignore[misc]  # the exact backend's
            if self._serving is not None:
                self._plan = self._eager_plan(self._serving, forward_batch)
                self._plan.begin()
            return
        self._prefill = None if self._serving is None else self._serving.prefill(forward_batch)
        if self._prefill is None or not (self._prefill.whole and self._all_served):
            super().init_forward_metadata(forward_batch)  # type: ignore[misc]  # the exact backend's

    def init_cuda_graph_state(self, *args: Any, **options: Any) -> None:
        """All decode graphs are about to be captured, anew after a change of the weights that asked for it."""
        super().init_cuda_graph_state(*args, **options)  # type: ignore[misc]  # the exact backend's
        self._captured.clear()  # SGLang has dropped the graphs that held their addresses

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Prepare the capture or a replay of a graph: nothing to do for the method but the plan at capture."""
        decode = forward_batch.forward_mode.is_decode_or_idle()
        if not decode or not self._all_served:
            # the exact backend's
            super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)  # type: ignore[misc]
        if self._serving is None or not decode:
            return
        if in_capture:
            # over the buffers that SGLang refills before each replay; kept, because the graph holds its addresses
            self._plan = self._new_plan(self._serving, forward_batch.req_pool_indices, forward_batch.seq_lens)
            self._captured.append(self._plan)
        else:
            self._serving.padded_entries += getattr(forward_batch, "num_padding", 0)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """What a graph records before its first layer."""
        super().init_forward_metadata_in_graph(forward_batch)  # type: ignore[misc]  # the exact backend's
        if forward_batch.forward_mode.is_decode_or_idle() and self._plan is not None:
            self._plan.begin()

    def on_after_cuda_graph_warmup(self) -> None:
        """Forget what the warm-up passes stored and counted."""
        super().on_after_cuda_graph_warmup()  # type: ignore[misc]  # the exact backend's
        if self._serving is not None:
            self._serving.reset()

    def shared_read_ends(self, mode: Any) -> Any:
        """Decode kernels read the request pool's rows themselves, until the end of the pass."""
        if self._serving is not None and mode.is_decode():
            return compat.reads_until_after_replay()
        return super().shared_read_ends(mode)  # type: ignore[misc]  # the exact backend's

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **options: Any,
    ) -> torch.Tensor:
        """Attention of one token per request."""
        served = self._layers.served.get(layer.layer_id)
        if served is None or self._serving is None:
            exact: torch.Tensor = super().forward_decode(  # type: ignore[misc]  # the exact backend's
                q, k, v, layer, forward_batch, save_kv_cache, **options
            )
            return exact
        self._check_plain(options)
        if save_kv_cache and k is not None and v is not None:
            compat.write_kv(self, layer, forward_batch, k, v)
        assert self._plan is not None  # init_forward_metadata*() came first
        queries = q.reshape(-1, layer.tp_q_head_num, layer.head_dim)
        return self._plan.run(queries, self._caches(layer), self._scales(layer), served).flatten(1)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **options: Any,
    ) -> torch.Tensor:
        """Attention of a prefill chunk: exact, but for what the method computes itself."""
        served = self._layers.served.get(layer.layer_id)
        prefill = None if served is None else self._prefill
        if prefill is not None:
            self._check_plain(options)
        out: torch.Tensor | None = None
        if prefill is None or not prefill.whole:
            out = super().forward_extend(  # type: ignore[misc]  # the exact backend's
                q, k, v, layer, forward_batch, save_kv_cache, **options
            )
        elif save_kv_cache and k is not None and v is not None:
            compat.write_kv(self, layer, forward_batch, k, v)
        if prefill is None or served is None:
            assert out is not None
            return out
        queries = q.reshape(-1, layer.tp_q_head_num, layer.head_dim)
        return prefill.run(queries, out, self._caches(layer), self._scales(layer), served)

    def _check_plain(self, options: Mapping[str, Any]) -> None:
        """Models hand over here what changes their attention, such as learned sinks."""
        asked = [name for name, value in options.items() if value is not None and value is not False]
        if asked:
            raise UnsupportedError(
                f"--attention-backend {self.method.name}",
                [f"a model whose attention takes {', '.join(asked)}"],
                "Serve it with another --attention-backend.",
            )

    def _caches(self, layer: Any) -> Caches:
        assert self._serving is not None  # a layer is served
        return self._serving.site.caches(layer.layer_id)

    def _scales(self, layer: Any) -> Scales:
        """Only an fp8 pool stores keys and values divided."""
        if not self._fp8:
            return 1.0, 1.0
        k_scale, v_scale = layer.k_scale_float, layer.v_scale_float
        return (1.0 if k_scale is None else k_scale), (1.0 if v_scale is None else v_scale)

    def _eager_plan(self, active: Serving, forward_batch: Any) -> DecodePlan:
        """A plan for each of the last batch sizes, over tensors that are refilled here."""
        rows, lengths = forward_batch.req_pool_indices, forward_batch.seq_lens
        plan = self._eager.pop(len(rows), None) or self._new_plan(active, rows.clone(), lengths.clone())
        self._eager[len(rows)] = plan
        if len(self._eager) > EAGER_PLANS:
            self._eager.popitem(last=False)
        plan.rows.copy_(rows)
        plan.lengths.copy_(lengths)
        return plan

    def _new_plan(self, active: Serving, rows: torch.Tensor, lengths: torch.Tensor) -> DecodePlan:
        with serving.naming(f"the buffers for decode steps of {len(rows)} requests", self.method.budget):
            return active.plan(rows, lengths)


def _start(method: Method, runner: Any, layers: LayerMap, context_len: int) -> Serving | None:
    backend: Backend = "reference" if torch.device(runner.device).type == "cpu" else "triton"
    against: tuple[str, ...] = ()
    active = None
    if layers.layout is not None:
        try:
            with serving.naming(f"the buffers of {method.name}", method.budget):
                active = method.start(Site(runner, layers, context_len, backend))
        except UnsupportedError as error:
            against = error.reasons
    if active is None:
        reasons = [*against, *layers.reasons()]
        logger.warning("%s: every layer runs exact attention: %s", method.name, "; ".join(reasons))
        return None
    if not status.attempt("hooks", hooks.apply):
        raise compat.SGLangChanged(status.problems()[-1])
    logger.info("mac-kernels plugin: %s", status.summary())
    for line in active.describe():
        logger.info("%s: %s", method.name, line)
    serving.activate(active)
    with serving.naming("the buffers of prefill", method.budget):
        active.compile()
    return active
