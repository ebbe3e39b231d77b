"""``vlm kernels``: which implementation of each operation would run here, and why the others would not."""

import argparse
from typing import Any


def add(commands: Any) -> None:
    text = "which implementation of each operation would run here, and why not the others"
    parser = commands.add_parser("kernels", help=text, description=text)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="ask for this device (a GPU if there is one)")
    parser.set_defaults(call=_kernels)


def _kernels(arguments: argparse.Namespace) -> None:
    from importlib import import_module
    from pathlib import Path

    import torch

    import vlm

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for package in sorted(Path(vlm.__file__).parent.glob("kernels/[!_]*/__init__.py")):
        name = package.parent.name
        choice = import_module(f"vlm.kernels.{name}").explain(device)
        print(f"{name} on {device}: {choice.chosen}")
        for other, reason in choice.others.items():
            print(f"  not {other}: {reason}")
