"""Throughput and memory of our own vision backbones, each beside the timm model nearest to it in parameters.

    python tools/bench_backbones.py [--device auto --threads 1 --batch 2 --repeats 5]
    python tools/bench_backbones.py --device cuda --batch 64 --all
    python tools/bench_backbones.py --only nat,biformer

Backbones are those of models/backbones that have variants: by default the smallest of each, with --all every one.
Networks have random weights and their classification head, and take the pictures of their variant's size; the timm
model is, among PEERS, the nearest in parameters, at the same size of pictures where it can take it, else at its own
(then throughput is not of the same pixels, and the row says so).

A model and its peer take turns in every repeat; times are medians, ratios are medians of those within a repeat. Memory
is the most that a forward pass without gradients needs above the weights: on a GPU as the allocator counts it, on a CPU
the largest sum of the live tensors that the pass makes (buffers inside a kernel are not seen). A training step is
forward and backward of the sum of the logits, where --train is given.
"""

import argparse
import platform
import statistics
import time
import weakref
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlm.create import _load, names
from vlm.models.backbone import BackboneEncoder

# Transformers, convolutions and both, from 6 to 300 million parameters; all take 224 pixels.
PEERS = (
    "deit_tiny_patch16_224", "mobilenetv3_large_100", "regnety_004", "regnety_008", "regnety_016", "pvt_v2_b1",
    "mambaout_kobe", "deit_small_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny", "pvt_v2_b2",
    "swin_small_patch4_window7_224", "convnext_small", "pvt_v2_b5", "deit_base_patch16_224",
    "swin_base_patch4_window7_224", "convnext_base", "convnext_large", "vit_large_patch16_224",
)  # fmt: skip
RESULTS = Path(__file__).parent / "results" / "bench_backbones.md"


class Candidate(NamedTuple):
    """A network, its name, parameters, and the side of the pictures that it takes."""

    name: str
    make: Callable[[], nn.Module]
    parameters: int
    side: int


class Measured(NamedTuple):
    """Seconds of each repeat, and bytes that one pass needs above the weights."""

    seconds: list[float]
    memory: int


class LiveBytes(TorchDispatchMode):
    """The largest sum of bytes of tensors that are alive at once, among those made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage(), given)
        return out

    def _count(self, storage: Any, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in given:
            return  # a view
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def parameters(make: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


def ours(every: bool, only: set[str]) -> list[Candidate]:
    """Variants of the backbones of the folder: of each the smallest, or all."""
    found = []
    for name in names("vision"):
        kind: Any = _load("vision", name, None)
        if (only and name not in only) or not (isinstance(kind, type) and issubclass(kind, BackboneEncoder)):
            continue
        own = []
        for variant, settings in kind.variants.items():
            make = _whole(kind, variant)
            own.append(Candidate(f"{name} {variant}", make, parameters(make), settings.get("image", kind.native)))
        found += own if every else [min(own, key=lambda one: one.parameters)]
    return found


def _whole(kind: Any, variant: str) -> Callable[[], nn.Module]:
    return lambda: kind.whole(variant)


def peer_of(one: Candidate, peers: list[Candidate]) -> Candidate:
    """The nearest in parameters, at the same side where its network takes any."""
    near = min(peers, key=lambda peer: abs(peer.parameters - one.parameters))
    if one.side == near.side:
        return near
    try:
        make = _timm(near.name, one.side)
        parameters(make)
    except TypeError:
        return near
    return near._replace(make=make, side=one.side)


def _timm(name: str, side: int | None = None) -> Callable[[], nn.Module]:
    sized: dict[str, Any] = {} if side is None else {"img_size": side}
    return lambda: timm.create_model(name, **sized)


def timm_peers() -> list[Candidate]:
    return [Candidate(name, _timm(name), parameters(_timm(name)), 224) for name in PEERS]


# Measuring


def step_of(network: nn.Module, images: Tensor, train: bool) -> Callable[[], Any]:
    if not train:
        return torch.inference_mode()(lambda: network(images))

    def step() -> None:
        network.zero_grad(set_to_none=True)
        network(images).float().sum().backward()

    return step


def memory_of(step: Callable[[], Any], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        step()
    return live.most


def measure(pair: list[Candidate], arguments: argparse.Namespace, device: torch.device) -> list[Measured]:
    """Both networks of a row, taking turns."""
    steps = []
    for one in pair:
        torch.manual_seed(0)
        network = one.make().to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        images = torch.randn(
            arguments.batch, 3, one.side, one.side, device=device, dtype=next(network.parameters()).dtype
        )
        steps.append(step_of(network.train(arguments.train), images, arguments.train))
    memory = [memory_of(step, device) for step in steps]  # it warms up too
    seconds: list[list[float]] = [[] for _ in steps]
    for repeat in range(arguments.repeats + 1):
        for number, step in enumerate(steps):
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:
                seconds[number].append(time.perf_counter() - start)
    return [Measured(*both) for both in zip(seconds, memory, strict=True)]


# The table


def row(pair: list[Candidate], found: list[Measured], batch: int) -> str:
    cells = []
    for one, measured in zip(pair, found, strict=True):
        rate = batch / statistics.median(measured.seconds)
        cells += [f"{one.parameters / 1e6:.1f}", f"{rate:.2f}", f"{measured.memory / 2**20:.0f}"]
    ratios = [theirs / own for own, theirs in zip(*(measured.seconds for measured in found), strict=True)]
    name = pair[1].name if pair[0].side == pair[1].side else f"{pair[1].name} (at {pair[1].side})"
    middle = f"{statistics.median(ratios):.2f}"
    return (
        f"| {pair[0].name} | {pair[0].side} | {' | '.join(cells[:3])} | {name} | {' | '.join(cells[3:])} | {middle} |"
    )


def page(rows: list[str], arguments: argparse.Namespace, device: torch.device) -> str:
    chip = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {_cpu()}, {arguments.threads} threads"
    )
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    flags = "".join(f" --{name}" for name in ("all", "train") if getattr(arguments, name))
    flags += f" --only {arguments.only}" if arguments.only else ""
    command = f"--device {device.type} --threads {arguments.threads} --batch {arguments.batch}"
    what = "a training step (forward and backward)" if arguments.train else "a forward pass without gradients"
    lines = [
        "# Vision backbones beside timm",
        "",
        f"`python tools/bench_backbones.py {command} --repeats {arguments.repeats}{flags}`",
        "",
        f"* {datetime.now(UTC):%Y-%m-%d}; {chip}; torch {torch.__version__}, timm {timm.__version__}, {dtype}",
        f"* Batch {arguments.batch}, {what}, random weights; medians of {arguments.repeats} repeats that take turns",
        "* Memory: the most above the weights. Times faster: ours by the peer in throughput, of pictures of that size",
        *([f"* {arguments.note}"] if arguments.note else []),
        "",
        "| backbone | pixels | M parameters | images/s | MiB | nearest of timm | M parameters | images/s | MiB | times "
        "faster |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    return "\n".join(lines)


def _cpu() -> str:
    """The maker's name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="names of backbones, with commas")
    parser.add_argument("--all", action="store_true", help="every variant")
    parser.add_argument("--train", action="store_true", help="a training step instead of a forward pass")
    parser.add_argument("--note", default="", help="a line about the run, for the page")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if arguments.device == "auto" else arguments.device
    device, peers, rows = torch.device(kind), timm_peers(), []
    chosen = ours(arguments.all, set(filter(None, arguments.only.split(","))))
    if not chosen:
        parser.error(f"--only: no backbone of ours with variants is called {arguments.only}")
    for one in chosen:
        pair = [one, peer_of(one, peers)]
        rows.append(row(pair, measure(pair, arguments, device), arguments.batch))
        print(rows[-1], flush=True)
    arguments.out.write_text(page(rows, arguments, device), encoding="utf-8")
    print(f"Written: {arguments.out}")


if __name__ == "__main__":
    main()
