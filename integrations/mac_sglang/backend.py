"""The attention backend: SGLang's own for prefill and every layer that MAC does not serve, MAC for decode."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from mac_kernels import resolve_config
from mac_kernels.support import Backend, unsupported_reasons

from . import compat, hooks, status
from .layers import LayerMap, map_layers
from .options import read_options
from .plan import Fill, Plan, compile_fill
from .serving import Serving, describe, start

logger = logging.getLogger(__name__)


def build_backend(runner: Any) -> Any:
    """Build the backend for a model runner; SGLang calls it by the name ``mac``.

    Raises
    ------
    MacError
        If a step of the plugin failed, the config is wrong, or the model or a setting cannot be served. SGLang ends the
        server then.
    """
    try:
        if status.problems():
            raise compat.SGLangChanged("the plugin did not take effect: " + "; ".join(status.problems()))
        compat.check_runner(runner)
        return backend_class(str(runner.device))(runner)
    except Exception as error:
        logger.error("mac: the server cannot start: %s", error)
        raise


@functools.cache
def backend_class(device: str) -> type:
    """The backend for a kind of device: MAC in front of SGLang's exact backend."""
    exact = compat.exact_backend_class(device)
    return type(f"Mac{exact.__name__}", (MacAttention, exact), {"__doc__": MacAttention.__doc__})


# Every `super()` below is SGLang's backend, which backend_class() puts behind this class: mypy sees `object` there.
class MacAttention:
    """MAC in front of one of SGLang's attention backends, which stays responsible for whatever MAC does not do."""

    req_to_token_pool: Any
    token_to_kv_pool: Any
    forward_metadata: Any

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)  # type: ignore[call-arg]  # the exact backend, see backend_class()
        self._fp8 = runner.kv_cache_dtype == torch.float8_e4m3fn
        context_len = min(int(runner.model_config.context_len), self.req_to_token_pool.req_to_token.shape[1])
        self._layers = map_layers(runner.model, kv_dtype=runner.kv_cache_dtype, context_len=context_len)
        self._serving: Serving | None = _start(runner, self._layers, context_len)
        self._all_served = self._serving is not None and self._layers.complete
        self._eager: dict[int, Plan] = {}
        self._captured: list[Plan] = []
        self._plan: Plan | None = None
        self._fill: Fill | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepare a pass that no graph replays."""
        decode = forward_batch.forward_mode.is_decode_or_idle()
        if not decode or not self._all_served:
            super().init_forward_metadata(forward_batch)  # type: ignore[misc]
        if self._serving is None:
            return
        if decode:
            self._plan = self._eager_plan(self._serving, forward_batch)
            self._begin_audit()
        else:
            self._fill = Fill.of(forward_batch, self._serving) if self._serving.fill else None

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Prepare the capture or a replay of a graph: nothing to do for MAC but the plan at capture."""
        decode = forward_batch.forward_mode.is_decode_or_idle()
        if not decode or not self._all_served:
            super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)  # type: ignore[misc]
        if self._serving is None or not decode:
            return
        if in_capture:
            # over the buffers that SGLang refills before each replay; kept, because the graph holds its addresses
            self._plan = Plan(self._serving, forward_batch.req_pool_indices, forward_batch.seq_lens)
            self._captured.append(self._plan)
        else:
            padding = getattr(forward_batch, "num_padding", 0)
            self._serving.padded_groups += padding * len(self._layers.served) * self._serving.rings.layout.num_kv_heads

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """What a graph records before its first layer."""
        super().init_forward_metadata_in_graph(forward_batch)  # type: ignore[misc]
        if forward_batch.forward_mode.is_decode_or_idle():
            self._begin_audit()

    def on_after_cuda_graph_warmup(self) -> None:
        """Forget what the warm-up passes stored and counted."""
        super().on_after_cuda_graph_warmup()  # type: ignore[misc]
        if self._serving is not None:
            self._serving.drop_all("the warm-up of CUDA graphs")
            self._serving.rings.counters.values.zero_()
            if self._serving.auditor is not None:
                self._serving.auditor.reset()

    def shared_read_ends(self, mode: Any) -> Any:
        """Decode kernels read the request pool's rows themselves, until the end of the pass."""
        if self._serving is not None and mode.is_decode():
            return compat.reads_until_after_replay()
        return super().shared_read_ends(mode)  # type: ignore[misc]

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
            exact: torch.Tensor = super().forward_decode(  # type: ignore[misc]
                q, k, v, layer, forward_batch, save_kv_cache, **options
            )
            return exact
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
        """Exact attention of a prefill chunk; its last queries are stored for decode."""
        out: torch.Tensor = super().forward_extend(  # type: ignore[misc]
            q, k, v, layer, forward_batch, save_kv_cache, **options
        )
        served = self._layers.served.get(layer.layer_id)
        if served is not None and self._fill is not None:
            queries = q.reshape(-1, layer.tp_q_head_num, layer.head_dim)
            self._fill.run(queries, self._caches(layer), self._scales(layer), served)
        return out

    def _caches(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The pool's keys and values of a layer as pages of one token, [slots, 1, Hkv, D]."""
        k_cache, v_cache = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        return k_cache.unsqueeze(1), v_cache.unsqueeze(1)

    def _scales(self, layer: Any) -> tuple[float, float]:
        """What the layer's stored keys and values are to be multiplied with: only an fp8 pool stores them divided."""
        if not self._fp8:
            return 1.0, 1.0
        k_scale, v_scale = layer.k_scale_float, layer.v_scale_float
        return (1.0 if k_scale is None else k_scale), (1.0 if v_scale is None else v_scale)

    def _begin_audit(self) -> None:
        if self._serving is not None and self._serving.auditor is not None and self._plan is not None:
            self._serving.auditor.begin(self._plan.rows, self._plan.lengths)

    def _eager_plan(self, serving: Serving, forward_batch: Any) -> Plan:
        """A plan per batch size, over tensors that are refilled here."""
        rows, lengths = forward_batch.req_pool_indices, forward_batch.seq_lens
        if len(rows) not in self._eager:
            self._eager[len(rows)] = Plan(serving, rows.clone(), lengths.clone())
        plan = self._eager[len(rows)]
        plan.rows.copy_(rows)
        plan.lengths.copy_(lengths)
        return plan


def _start(runner: Any, layers: LayerMap, context_len: int) -> Serving | None:
    resolved = resolve_config(model=compat.model_key(runner))
    options = read_options(resolved.files)
    device = torch.device(runner.device)
    backend: Backend = "reference" if device.type == "cpu" else "triton"
    against = () if layers.layout is None else unsupported_reasons(backend, resolved.config, layers.layout, device)
    if layers.layout is None or against:
        reasons = [*against, *layers.reasons()]
        logger.warning("mac: every layer runs exact attention: %s", "; ".join(reasons))
        return None
    if not status.attempt("hooks", hooks.apply):
        raise compat.SGLangChanged(status.problems()[-1])
    logger.info("mac-kernels plugin: %s", status.summary())
    serving = start(runner, layers, resolved, options, context_len, backend)
    for sentence in resolved.why:
        logger.info("mac: %s", sentence)
    logger.info("%s", describe(serving, resolved))
    compile_fill(serving)
    return serving
