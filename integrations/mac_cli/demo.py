"""``mac-kernels demo``: full attention and MAC on the same text, on this machine."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mac_kernels.errors import MissingError
from mac_kernels.settings import resolve_config

from .config import ConfigOption, PresetOption, SetOption, parse_changes
from .output import JsonOption, err, out, print_json
from .progress import stages

ModelOption = Annotated[
    str | None, typer.Option("--model", help="A folder, a .gguf file or a hub id. Default: SmolLM2-135M-Instruct.")
]
TextOption = Annotated[Path | None, typer.Option("--text", help="A UTF-8 text. Default: Python's own documentation.")]
PromptOption = Annotated[int, typer.Option("--prompt-tokens", help="Tokens read before decoding starts.")]
TokensOption = Annotated[int, typer.Option("--tokens", help="Tokens decoded.")]
OutputOption = Annotated[Path, typer.Option("--output", help="Folder for report.json and report.png.")]

_NEEDS = ("transformers", "accelerate", "gguf", "huggingface_hub", "matplotlib")


def demo(
    *,
    model: ModelOption = None,
    text: TextOption = None,
    prompt_tokens: PromptOption = 3600,
    tokens: TokensOption = 448,
    preset: PresetOption = None,
    config: ConfigOption = None,
    changes: SetOption = None,
    output: OutputOption = Path("mac-demo"),
    as_json: JsonOption = False,
) -> None:
    """Decode a text with full attention and with MAC, and report hits, KV read, errors and speed.

    Example: mac-kernels demo --preset fast --tokens 800 --output mac-demo
    """
    resolved = resolve_config(preset, file=config, changes=parse_changes(changes or []))
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise MissingError(f"demo needs {', '.join(missing)}; install them with: pip install 'mac-kernels[demo]'")

    # both are read when torch is first imported: other progress bars would run into ours, and threads that wait
    # actively make every small operation slow on a machine that others use, too (6.8 instead of 0.6 s per token)
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from mac_transformers.demo import DemoSettings, check_settings, run_demo, write_report
    from mac_transformers.outdir import OutputFolder
    from mac_transformers.weights import find_weights

    settings = DemoSettings(
        config=resolved.config,
        label=resolved.name,
        text_file=text,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
    )
    check_settings(settings)
    folder = OutputFolder(output)
    with stages(in_bytes=True) as display:
        weights = find_weights(model, progress=display)
    err().print(f"model: {weights.name} ({weights.source})", soft_wrap=True, highlight=False)
    with stages() as display:
        report = run_demo(weights, settings, progress=display)
    files = write_report(report, folder)
    if as_json:
        print_json({**report, "files": [str(path) for path in files]})
        return
    _print(report, files)


def _print(report: dict[str, Any], files: list[Path]) -> None:
    console = out()
    text, memory = report["text"], report["memory"]
    console.print(
        f"{text['decoded_tokens']:,} tokens decoded after a prompt of {text['prompt_tokens']:,} ({text['name']}), "
        "the same tokens for every row",
        soft_wrap=True,
        highlight=False,
    )
    header, *lines = table_of(report)
    table = Table(header[0])
    for policy in header[1:]:
        table.add_column(policy, justify="right")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    console.print(f"KV cache of the request: {memory['kv_cache_bytes'] / 2**20:.1f} MiB", highlight=False)
    for note in report["notes"]:
        console.print(f"note: {note}", soft_wrap=True, highlight=False)
    console.print(f"written: {', '.join(map(str, files))}", soft_wrap=True, highlight=False)


_FIGURES = (
    ("head hit rate", "head_hit_rate", ".1%"),
    ("group hit rate", "group_hit_rate", ".1%"),
    ("share of the KV cache read", "kv_read_share", ".1%"),
    ("KL mean, nats", "kl_mean_nats", ".5f"),
    ("KL p99, nats", "kl_p99_nats", ".4f"),
    ("top-1 agreement", "top1_agreement", ".1%"),
    ("perplexity ratio", "perplexity_ratio", ".4f"),
    ("tokens/s", "tokens_per_second", ".1f"),
)


def table_of(report: dict[str, Any]) -> list[list[str]]:
    """Return the report's table, header first: one line per figure, one column per policy."""
    rows = report["rows"]
    rings = f"{report['memory']['ring_bytes'] / 2**20:.1f} MiB"
    return [
        ["", *(row["policy"] for row in rows)],
        *([label, *(_format(row[field], form) for row in rows)] for label, field, form in _FIGURES),
        ["ring bytes", *("-" if row["head_hit_rate"] is None else rings for row in rows)],
    ]


def _format(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
