"""Tuned configurations: launch parameters by GPU and head layout, policies by model. Looked up, never timed."""

from .lookup import (
    Found,
    LaunchChoice,
    choose_launch,
    find_kernel,
    find_policy,
    forget,
    inventory,
    launch_for,
    load,
    save,
    tune_command,
)
from .schema import (
    SCHEMA_VERSION,
    Bucket,
    Coverage,
    KernelFile,
    KernelKey,
    ModelKey,
    PolicyFile,
    Provenance,
    Score,
    TunedFile,
    from_json,
    kind_of,
    launch_problems,
    planted_share,
    to_json,
)

__all__ = [
    "Bucket", "Coverage", "Found", "KernelFile", "KernelKey", "LaunchChoice", "ModelKey", "PolicyFile", "Provenance",
    "SCHEMA_VERSION", "Score", "TunedFile", "choose_launch", "find_kernel", "find_policy", "forget", "from_json",
    "inventory", "kind_of", "launch_for", "launch_problems", "load", "planted_share", "save", "to_json", "tune_command",
]  # fmt: skip
