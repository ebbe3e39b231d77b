"""``vlm doctor``: what is installed and what this machine has."""

import argparse
from typing import Any

# Distribution names and what we use each for; the first rows are required.
_PACKAGES = {
    "vlm-recipes": "this program",
    "torch": "tensors",
    "torchvision": "image transforms of timm",
    "lightning": "training loop",
    "timm": "vision encoders",
    "transformers": "language models",
    "peft": "adapters (LoRA)",
    "tokenizers": "word-level tokenizer of Scenes",
    "safetensors": "weights",
    "webdataset": "shards",
    "fsspec": "addresses of shards",
    "pydantic": "recipes",
    "deepspeed": "optional: ZeRO",
    "open_clip_torch": "vision encoders",
    "triton": "optional: fast kernels on a GPU",
}


def add(commands: Any) -> None:
    text = "what is installed, and which devices are here"
    parser = commands.add_parser("doctor", help=text, description=text)
    parser.set_defaults(call=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    """Exit code 1 when a required package is missing."""
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "found", "for", box=None, pad_edge=False)
    for row in [*_machine(), *_packages()]:
        table.add_row(*row)
    Console().print(table)
    return int(any(found == "missing" for _, found, _ in _packages()))


def _machine() -> list[tuple[str, str, str]]:
    import os
    import platform

    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [
        ("python", platform.python_version(), platform.platform()),
        ("processor", f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads of torch"),
        (
            "GPU",
            ", ".join(gpus) or "none",
            f"CUDA {torch.version.cuda}" if torch.version.cuda else "torch without CUDA",
        ),
    ]


def _packages() -> list[tuple[str, str, str]]:
    from importlib.metadata import PackageNotFoundError, version

    rows = []
    for package, use in _PACKAGES.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed" if use.startswith("optional") else "missing"
        rows.append((package, found, use))
    return rows
