"""What the commands of ``mac-kernels tca`` share: the model, the texts, and the budgets with where they come from."""

from __future__ import annotations

import dataclasses
import datetime
import os
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mac_kernels import InputError, MissingError

if TYPE_CHECKING:
    import torch

    from mac_autotune.quality.texts import PassageName
    from mac_kernels.tca import TcaBudgets, TcaConfig
    from mac_kernels.tca.budgets import RetainedMass
    from mac_kernels.tca.calibrate import Measure
    from mac_kernels.tuned import ModelKey

LONGEST = 32768
"""Tokens that a calibration reads at most, unless told otherwise."""
TEXTS: tuple[PassageName, ...] = ("docs", "code")
_NEEDS = ("transformers", "accelerate", "gguf", "huggingface_hub")
_PACKAGES = ("torch", "transformers", "mac-kernels")
_SEED = 3  # `mac-kernels eval` measures other passages


def checked(names: str, device: str, *more: str) -> list[PassageName]:
    """The texts that are asked for, when all packages (``more`` among them) and the device are there."""
    missing = [name for name in (*_NEEDS, *more) if find_spec(name) is None]
    if missing:
        extras = "demo,tune" if more else "demo"
        raise MissingError(
            f"this command needs {', '.join(missing)}; install them with: pip install 'mac-kernels[{extras}]'"
        )
    asked = names.split(",")
    if len(set(asked)) != len(asked) or not set(asked) <= set(TEXTS):
        raise InputError(f"--texts {names!r} must be some of {', '.join(TEXTS)}, each once")
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when transformers is imported: its bars would run into ours
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: PyTorch sees no GPU here; use --device cpu")
    return [name for name in TEXTS if name in asked]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model, its tokenizer, its key and its context in tokens."""

    net: Any
    tokenizer: Any
    key: ModelKey
    context: int

    @staticmethod
    def of(model: str | None, device: str) -> Loaded:
        """Load a model."""
        import torch

        from mac_transformers.model_key import model_key
        from mac_transformers.weights import find_weights

        weights = find_weights(model)
        net, tokenizer = weights.load()
        torch.nn.Module.to(net, device)
        key = model_key(net.config, model or weights.name)
        key = dataclasses.replace(key, name=key.short_name)  # no path of this machine
        return Loaded(net, tokenizer, key, int(net.config.get_text_config().max_position_embeddings))

    def passages(self, names: list[PassageName], length: int, count: int) -> list[torch.Tensor]:
        """The passages that calibration reads."""
        from mac_autotune.quality.texts import passages

        return [one for name in names for one in passages(self.tokenizer, name, length=length, count=count, seed=_SEED)]

    def budgets(
        self,
        config: TcaConfig,
        measure: Measure,
        retained: RetainedMass,
        names: list[PassageName],
        read: list[torch.Tensor],
    ) -> TcaBudgets:
        """What a calibration found by reading some passages of these texts."""
        from mac_autotune.command import command_line
        from mac_kernels.tca import TcaBudgets
        from mac_kernels.tca.budgets import CalibrationRun

        run = CalibrationRun(
            texts=tuple(names),
            samples=len(read),
            tokens=len(read[0]),
            versions={name: version(name) for name in _PACKAGES},
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            command=command_line("tca"),
        )
        return TcaBudgets(key=self.key, config=config, measure=measure, retained=retained, run=run)


def config_of(**values: Any) -> TcaConfig:
    """A config of what options say."""
    from mac_kernels.tca import TcaConfig

    return TcaConfig.from_dict(values, source="tca")
