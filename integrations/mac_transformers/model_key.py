"""What a tuned policy is looked up by: name and shape of a model."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from mac_kernels.errors import InputError
from mac_kernels.tuned import ModelKey


def model_key(config: PreTrainedConfig, name: str | None = None) -> ModelKey:
    """The key of a model; ``name`` is a path or hub id, by default the one that it was loaded from."""
    text = config.get_text_config(decoder=True)
    heads = int(text.num_attention_heads)
    return ModelKey(
        name=name if name is not None else str(getattr(config, "_name_or_path", "") or ""),
        num_layers=int(text.num_hidden_layers),
        num_qo_heads=heads,
        num_kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        vocab_size=int(text.vocab_size),
    )


def read_model_key(model: str) -> ModelKey:
    """The key of a model folder, ``.gguf`` file or hub id; reads its config, not its weights.

    Raises
    ------
    InputError
        If there is no config that transformers can read.
    """
    path = Path(model).expanduser()
    where = (
        (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path if path.exists() else model, {})
    )
    try:
        config = AutoConfig.from_pretrained(where[0], **where[1])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"--model {model}: its config cannot be read ({error}); give a folder, .gguf file or hub id"
        ) from None
    return model_key(config, model)
