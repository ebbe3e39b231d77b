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
    from vlm.kernels.dispatch import Call

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = str(dtype).removeprefix("torch.")
    print(f"For {name} on {device}, heads of 64; {'without' if device.type == 'cpu' else 'with'} a GPU.")
    for package in sorted(Path(vlm.__file__).parent.glob("kernels/[!_]*/__init__.py")):
        module = import_module(f"vlm.kernels.{package.parent.name}")
        if not hasattr(module, "explain"):
            continue  # parts that operations share
        forward, training = (module.explain(Call(device, dtype, grad)) for grad in (False, True))
        print(f"\n{module.NAME}: {forward.chosen}")
        for other, reason in forward.others.items():
            print(f"  not {other}: {reason}")
        if training.chosen != forward.chosen:
            print(f"  with gradients {training.chosen}: {training.others[forward.chosen]}")
