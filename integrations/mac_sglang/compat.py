"""Everything that touches SGLang's interface, and every difference between its versions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mac_kernels.errors import MacError, UnsupportedError
from mac_kernels.paged import KV_DTYPES
from mac_kernels.rope import Rope
from mac_kernels.tuned import ModelKey

OLDEST, NEWEST = (0, 5, 17), (0, 5, 23)
_HINT = "Change the setting, or serve with --attention-backend flashinfer."
_KV_DTYPE_NAMES = ("auto", "bf16", "bfloat16", "fp8_e4m3")
_WEIGHTS = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"

REQUEST_CREATED = "sglang.srt.managers.schedule_batch.Req.__init__"
BATCH_BEGINS = "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new"
RADIX_CACHE_BUILT = "sglang.srt.mem_cache.registry.create_tree_cache"
RESULTS_PROCESSED = "sglang.srt.managers.scheduler.Scheduler.process_batch_result"
CACHE_FLUSHED = "sglang.srt.managers.scheduler.Scheduler.flush_cache"
GRAPH_REPLAYED = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.execute"

_ROTATED_WHERE: Mapping[str, Callable[[Any], Any]] = {
    "AfmoeAttention": lambda owner: owner.is_local_attention,
    "Cohere2MoeAttention": lambda owner: owner.is_sliding or owner.force_rope,
    "CohereAttention": lambda owner: owner.v1 or owner.sliding_window_size > 0,
    "Exaone4Attention": lambda owner: not owner.sliding_window_pattern or owner.is_sliding,
    "ExaoneMoEAttention": lambda owner: owner.sliding_window or owner.apply_rope_all_layers,
}
"""When attention modules of SGLang's models use the rotary embedding that they have in every layer."""


class SGLangChanged(MacError, RuntimeError):
    """SGLang's interface is not the one that this package was written for."""


def version() -> tuple[int, int, int]:
    """Return the installed SGLang's version, without suffixes such as ``.post1``.

    Raises
    ------
    SGLangChanged
        If the version has no three numbers.
    """
    from sglang.version import __version__ as text

    match = re.match(r"(\d+)\.(\d+)\.(\d+)", text)
    if match is None:
        raise SGLangChanged(f"SGLang's version {text!r} cannot be read; install SGLang {_range()}")
    major, minor, patch = (int(part) for part in match.groups())
    return major, minor, patch


def check_version() -> None:
    """Check that the installed SGLang is one that this package was written for.

    Raises
    ------
    SGLangChanged
        If it is older or newer; the message names the range.
    """
    found = version()
    if not OLDEST <= found <= NEWEST:
        raise SGLangChanged(
            f"SGLang {'.'.join(map(str, found))} is outside the supported range {_range()}; install a version in it"
        )


def _range() -> str:
    return " to ".join(".".join(map(str, bound)) for bound in (OLDEST, NEWEST))


def register_attention_backend(name: str, build: Callable[[Any], Any]) -> None:
    """Make ``--attention-backend NAME`` a valid choice that is built by ``build(model_runner)``."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.layers.attention.attention_registry import register_attention_backend as registered
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    if name not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([name])
    if name not in ATTENTION_BACKENDS:
        registered(name)(build)


def is_attention_backend(name: str) -> bool:
    """Whether ``--attention-backend NAME`` is a valid choice that can be built."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES

    return name in ATTENTION_BACKENDS and name in ATTENTION_BACKEND_CHOICES


def register_radix_backend(name: str, factory: Callable[[Any], Any]) -> None:
    """Make ``--radix-cache-backend NAME`` a valid choice."""
    from sglang.srt.mem_cache.registry import register_radix_cache_backend, registered_radix_cache_backends

    if name not in registered_radix_cache_backends():
        register_radix_cache_backend(name, factory)


def default_radix_cache(context: Any) -> Any:
    """Build the prefix cache that SGLang would choose itself."""
    from sglang.srt.mem_cache.registry import default_radix_cache_factory

    return default_radix_cache_factory(context)


def after(target: str, hook: Callable[..., Any]) -> None:
    """Call ``hook(result, *args, **kwargs)`` after a function of SGLang; a ``None`` keeps its result."""
    _hook(target, hook, "AFTER")


def around(target: str, hook: Callable[..., Any]) -> None:
    """Call ``hook(original, *args, **kwargs)`` in place of a function of SGLang."""
    _hook(target, hook, "AROUND")


def _hook(target: str, hook: Callable[..., Any], kind: str) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    try:
        # not through register() and apply_hooks(): they only log a hook that fails, and leave a function alone that
        # another plugin has hooked before
        HookRegistry._apply_target(target, [(HookType[kind], hook, None)])
    except Exception as error:
        raise SGLangChanged(f"{target} cannot be hooked ({error}); install SGLang {_range()}") from error


def state_changes() -> tuple[str, ...]:
    """Functions of SGLang after which nothing that was stored of a request may be used.

    Raises
    ------
    SGLangChanged
        If one of them is gone.
    """
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    # 0.5.18 and later receive the weights first and load them into several runners
    split = hasattr(WeightUpdater, "load_weights_from_distributed")
    loads = (
        "update_weights_from_disk",
        "load_weights_from_distributed" if split else "update_weights_from_distributed",
        "update_weights_from_tensor",
        "update_weights_from_ipc",
    )
    adapters = ("load_lora_adapter", "load_lora_adapter_from_tensors", "unload_lora_adapter")
    return (CACHE_FLUSHED, *(f"{_WEIGHTS}.{name}" for name in loads), *(f"{_RUNNER}.{name}" for name in adapters))


def fence_reads_after_replay() -> None:
    """Let the scheduler wait for the end of a decode graph before it changes token slots that the graph may read.

    Later versions ask the backend (``shared_read_ends``). 0.5.17 takes it for granted that every backend has copied the
    slots before the replay, and publishes an event that says so; a later one takes its place.
    """
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

    if hasattr(AttentionBackend, "shared_read_ends"):
        return

    def hook(result: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
        del result, args, kwargs
        read_done = runner.device_module.Event()
        read_done.record()
        runner.model_runner.war_fastpath_read_done_event = read_done

    after(GRAPH_REPLAYED, hook)


def reads_until_after_replay() -> Any:
    """What ``shared_read_ends`` has to answer for a backend that reads the request pool inside its kernels."""
    from sglang.srt.layers.attention import base_attn_backend

    return base_attn_backend.SharedReadEnds.POST_REPLAY


def attention_layer_class() -> type:
    """The class of SGLang's attention layers."""
    from sglang.srt.layers.radix_attention import RadixAttention

    kind: type = RadixAttention
    return kind


def is_decoder_layer(layer: Any) -> bool:
    """Whether an attention layer is causal self-attention."""
    from sglang.srt.layers.radix_attention import AttentionType

    return bool(layer.attn_type == AttentionType.DECODER)


def is_plain_rope(rotary: Any) -> bool:
    """Whether a rotary embedding is one table over positions that are one number per token."""
    from sglang.srt.layers.rotary_embedding import MRotaryEmbedding, RotaryEmbedding

    table = getattr(rotary, "cos_sin_cache", None)
    return (
        isinstance(rotary, RotaryEmbedding)
        and not isinstance(rotary, MRotaryEmbedding)
        and isinstance(table, torch.Tensor)
        and table.dim() == 2
        and table.shape[1] == rotary.rotary_dim
    )


def is_rotated(owner: Any) -> bool:
    """Whether a layer whose module has a rotary embedding rotates its queries with it."""
    rotates = _ROTATED_WHERE.get(type(owner).__name__)
    return bool(getattr(owner, "use_rope", True) and (rotates is None or rotates(owner)))


def rope_of(rotary: Any, context_len: int) -> Rope:
    """The rotation of a layer, from its own table of cosines and sines, long enough for the context."""
    if rotary.cos_sin_cache.shape[0] < context_len:
        rotary._ensure_cos_sin_cache_length(context_len - 1)
    return Rope.from_cos_sin_cache(rotary.cos_sin_cache, interleaved=not rotary.is_neox_style)


def row_of(request: Any) -> int | None:
    """Row of a request in the request pool; it moved into a record of its own after 0.5.17."""
    row = request.req_pool_idx if hasattr(request, "req_pool_idx") else request.kv.req_pool_idx
    return None if row is None else int(row)


def cache_salt_of(key: Any) -> str | None:
    """Salt of a radix key; 0.5.17 has none but in the extra key."""
    salt: str | None = getattr(key, "cache_salt", None)
    return salt


def shares_prefixes(tree: Any) -> bool:
    """Whether a prefix cache gives the KV of one request to another."""
    if hasattr(tree, "supports_prefix_sharing"):
        return bool(tree.supports_prefix_sharing())
    return not tree.is_chunk_cache() and not tree.disable


def keeps_evicted_kv(tree: Any) -> bool:
    """Whether what a tree evicts from the device may come back, from host memory or an external store."""
    return any(getattr(tree, name, None) is not None for name in ("cache_controller", "linker"))


def write_kv(backend: Any, layer: Any, forward_batch: Any, k: torch.Tensor, v: torch.Tensor) -> None:
    """Store the keys and values of a pass in the pool, as the exact backend would."""
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    scales = backend._kv_write_scales(layer) if hasattr(backend, "_kv_write_scales") else ()
    backend.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v, *scales)


def check_fp8_writes(backend: Any) -> None:
    """Check that the exact backend tells with which scales :func:`write_kv` has to store keys and values in fp8.

    Raises
    ------
    SGLangChanged
        If it does not: they would be stored as they are, and read as if divided.
    """
    if not hasattr(backend, "_kv_write_scales"):
        raise SGLangChanged(
            f"{type(backend).__name__} has no _kv_write_scales, by which an fp8 KV cache is written; install SGLang "
            f"{_range()} on a GPU, or leave out --kv-cache-dtype"
        )


def exact_backend_class(device: str) -> type:
    """SGLang's backend that serves whatever a method does not: FlashInfer, on a CPU plain torch."""
    if device == "cpu":
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend as Exact
    else:
        from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend as Exact
    kind: type = Exact
    return kind


def _backend_names(runner: Any) -> tuple[str, str]:
    if hasattr(runner, "prefill_attention_backend_str"):
        return runner.prefill_attention_backend_str, runner.decode_attention_backend_str
    prefill, decode = runner.server_args.get_attention_backends()  # until 0.5.17
    return prefill, decode


def _stores_kv_outside(args: Any) -> bool:
    """Whether keys and values go to a store that need not tell the namespaces of the prefix cache apart."""
    switches = ("enable_lmcache", "enable_flexkv", "enable_unified_cache_external_linker")  # the last: after 0.5.17
    stored = args.hicache_storage_backend is not None or args.radix_cache_backend == "flexkv"
    return stored or any(getattr(args, name, False) for name in switches)


def model_key(runner: Any) -> ModelKey:
    """What a tuned policy depends on, from the config of the model; heads of all ranks."""
    config = runner.model_config
    return ModelKey(
        name=str(runner.server_args.model_path),
        num_layers=int(config.num_hidden_layers),
        num_qo_heads=int(config.num_attention_heads),
        num_kv_heads=int(config.get_total_num_kv_heads()),
        head_dim=int(config.head_dim),
        vocab_size=int(config.vocab_size),
    )


def tensor_rank() -> int:
    """Tensor-parallel rank of this process."""
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().tp_rank)


def tensor_ranks() -> int:
    """Number of tensor-parallel ranks."""
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().tp_size)


def rank_labels(runner: Any) -> dict[str, str]:
    """What tells the metrics of this process from those of the server's others, as in SGLang's own metrics."""
    from sglang.srt.runtime_context import get_parallel

    # which of several replicas (--dp-size); 0.5.17 keeps it in a record of the runner
    replica = getattr(getattr(runner, "ps", None) or get_parallel(), "dp_rank", None)
    return {"tp_rank": str(tensor_rank()), **({} if replica is None else {"dp_rank": str(replica)})}


def check_runner(runner: Any, name: str) -> None:
    """Refuse what the attention backend ``name`` cannot serve, with every reason and the setting to change.

    Raises
    ------
    UnsupportedError
        If the model or a setting of the server is one of them.
    """
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, check_cuda_graph_backend
    from sglang.srt.runtime_context import get_parallel

    args, parallel = runner.server_args, get_parallel()
    full = any(check_cuda_graph_backend(Phase.PREFILL, kind) for kind in (Backend.FULL, Backend.TC_PIECEWISE))
    checks = (
        (runner.use_mla_backend, "a model with multi-head latent attention (MLA)"),
        (not runner.spec_algorithm.is_none(), "speculative decoding (leave out --speculative-algorithm)"),
        (
            args.kv_cache_dtype not in _KV_DTYPE_NAMES or runner.kv_cache_dtype not in KV_DTYPES,
            f"a KV cache of {runner.kv_cache_dtype} (--kv-cache-dtype auto, bf16 or fp8_e4m3)",
        ),
        (
            len(set(_backend_names(runner))) > 1,
            "another backend for prefill or decode (leave out --prefill- and --decode-attention-backend)",
        ),
        (parallel.attn_dp_size > 1, "DP attention (leave out --enable-dp-attention)"),
        (parallel.pp_size > 1, "pipeline parallelism (--pp-size 1)"),
        (max(parallel.attn_cp_size, parallel.attn_dcp_size) > 1, "context parallelism (--attn-cp-size, --dcp-size 1)"),
        (args.enable_page_major_kv_layout or args.enable_unified_memory, "a page-major KV pool (leave it off)"),
        (args.disaggregation_mode != "null", "prefill/decode disaggregation (--disaggregation-mode null)"),
        (args.enable_pdmux, "--enable-pdmux (leave it out)"),
        (args.enable_two_batch_overlap, "--enable-two-batch-overlap (leave it out)"),
        (getattr(args, "enable_beam_search", False), "beam search (leave out --enable-beam-search)"),
        (
            args.enable_streaming_session,
            "sessions that keep their row between turns (leave out --enable-streaming-session)",
        ),
        (
            _stores_kv_outside(args),
            "a KV store outside the server, from which an exact request could read KV made by approximation (leave out "
            "--hicache-storage-backend, --enable-lmcache, --enable-flexkv and --enable-unified-cache-external-linker)",
        ),
        (
            check_cuda_graph_backend(Phase.DECODE, Backend.BREAKABLE),
            "breakable decode graphs (--cuda-graph-backend-decode full or disabled)",
        ),
        (full, "full or piecewise prefill graphs (--cuda-graph-backend-prefill breakable or disabled)"),
        (runner.model_config.is_encoder_decoder, "an encoder-decoder model"),
    )
    reasons = tuple(reason for holds, reason in checks if holds)
    if reasons:
        raise UnsupportedError(f"--attention-backend {name}", reasons, _HINT)
