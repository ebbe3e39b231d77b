"""Kernels against their peers, side by side in one run: medians, ratios, memory, and whether each is right.

    python -m tools.bench_kernels [--only TEXT] [--repeats 15] [--device auto] [--out FILE]

Peers of a case take turns in every repeat; the ratio is the median over the repeats of the first peer's time by that
peer's. Each peer is first compared with a trusted implementation on the same tensors, and one that is wrong or cannot
run says so instead of a time. First passes (compilation) are not timed. On a GPU in bf16 with an emptied L2 cache, on a
CPU a reduced set in fp32 without Triton, which only its interpreter runs there.
"""

import argparse
import platform
import statistics
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import torch

from tools.bench_kernels.cases import cases
from tools.bench_kernels.measure import Row, measure

RESULTS = Path(__file__).parents[1] / "results"
TOLERANCE = {torch.bfloat16: 4e-2, torch.float32: 1e-4}


def table(case: str, rows: list[Row]) -> Iterable[str]:
    yield f"### {case}\n"
    yield "| peer | ms, median | ms, 20 % .. 80 % | times as fast as the first | memory MB | error |"
    yield "|---|---|---|---|---|---|"
    first = rows[0]
    for row in rows:
        if row.problem:
            yield f"| {row.peer} | | | | | {row.problem} |"
            continue
        ordered = sorted(row.seconds)
        low, high = (1e3 * ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))
        ratio = statistics.median(a / b for a, b in zip(first.seconds, row.seconds, strict=True))
        error = "" if row.error != row.error else f"{row.error:.0e}"
        times = f"{1e3 * row.median:.3f} | {low:.3f} .. {high:.3f} | {ratio:.2f}"
        memory = "" if row.megabytes != row.megabytes else f"{row.megabytes:.1f}"
        yield f"| {row.peer} | {times} | {memory} | {error} |"
    yield ""


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU, {names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def version(package: str) -> str:
    try:
        return str(import_module(package).__version__)
    except ImportError:
        return "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--out", type=Path, help="the table, as Markdown (results/bench_kernels_DEVICE.md)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name = arguments.device
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    out = arguments.out or RESULTS / f"bench_kernels_{device.type}.md"
    torch.manual_seed(0)
    lines = [
        f"# Kernels on {machine(device)}\n",
        f"`python -m tools.bench_kernels --repeats {arguments.repeats} --device {device.type}`\n",
        f"* {datetime.now(UTC):%Y-%m-%d}; {machine(device)}; {str(dtype).removeprefix('torch.')}; torch "
        f"{torch.__version__}, triton {version('triton')}, natten {version('natten')}, fla {version('fla')}",
        f"* {arguments.repeats} interleaved repeats; the ratio is a median within repeats; the error is the largest "
        "difference by the largest value.\n",
    ]
    for case in cases(device, dtype):
        if arguments.only not in case.name:
            continue
        rows = measure(case.name, case.peers, case.truth, TOLERANCE[dtype], arguments.repeats)
        text = "\n".join(table(case.name, rows))
        print(text, flush=True)
        lines.append(text)
        out.parent.mkdir(exist_ok=True)
        out.write_text("\n".join(lines) + "\n")  # after every case: what was measured is not lost


if __name__ == "__main__":
    main()
