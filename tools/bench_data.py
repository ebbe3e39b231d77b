"""Reader throughput beside stock webdataset, litdata and mosaicml-streaming, and what each reader can do.

    pip install litdata mosaicml-streaming        (peers, no dependencies of this repository; absent ones are marked)
    python -m tools.bench_data [--samples 4000 --batch 32 --workers 0 2 --repeats 7 --work runs/bench_data]

Samples are seeded JPEGs of 20 to 100 kB with a conversation, written once as plain tars. Ours and webdataset read
those tars; the other two read their own formats, converted from them (time and size are told). Everybody hands over the
same batch: keys, the text of the conversation parsed from its json, and the image either as encoded bytes (`raw`, what
a reader itself costs) or decoded and resized by the same function (`decoded`). Batches are made in the workers.

A pass is an epoch, or its first `--decoded` samples where images are decoded, in a process of its own with all files in
the page cache. Its first batch is timed by itself (opening files, starting workers); throughput is counted after as
many batches as workers read ahead. Readers take turns in every repeat and the first repeat is discarded; ratios are
medians of those within a repeat.

The second table is what happened when each thing was tried: see `tools/readers/checks.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from tools.readers import ours, samples, stock_litdata, stock_mosaic, stock_webdataset
from tools.readers.checks import Cells, run_checks
from tools.readers.common import SIDE, Job, Reader, installed
from tools.readers.processes import Failure, alone

RESULTS = Path(__file__).parent / "results" / "bench_data.md"
READERS = cast("list[Reader]", [ours, stock_webdataset, stock_litdata, stock_mosaic])
SIDES = (280, 560)  # of pictures, in pixels: files of 20 to 100 kB
PER_SHARD = 500
READ_AHEAD = 2  # batches per worker, torch's default
INSTALL = "pip install litdata mosaicml-streaming"


class Pass(NamedTuple):
    """Seconds to the first batch; samples and bytes of images per second after those read ahead."""

    first: float
    rate: float


class Source(NamedTuple):
    """The folder a reader reads, how long it took to make of the shards, and its size in bytes."""

    folder: Path
    seconds: float
    size: int


Setting = tuple[int, bool]  # workers, decoded
Passes = dict[tuple[Setting, str], list[Pass | Failure]]  # of every repeat


def timed(reader: Reader, source: Path, job: Job, most: int, state: Any = None) -> Pass:
    """One pass over at most `most` batches."""
    ahead = READ_AHEAD * job.workers + 1
    begin = time.perf_counter()
    first = start = end = 0.0
    count = 0
    for number, payload in enumerate(reader.loader([source], [1.0], job, state)):
        end = time.perf_counter()
        first = first or end - begin
        if number < ahead:
            start = end
        else:
            count += len(payload.keys)
        if number + 1 == most:
            break
    return Pass(first, count / (end - start) if count else float("nan"))


def measure(readers: Sequence[Reader], sources: dict[str, Source], arguments: argparse.Namespace, log: Path) -> Passes:
    """Passes of every setting and reader, taking turns; the first of each, which warms up, is left out."""
    passes: Passes = {}
    everything, some = (count // arguments.batch for count in (arguments.samples, arguments.decoded))
    for repeat in range(arguments.repeats + 1):
        for workers in arguments.workers:
            for decode in (False, True):
                if decode and repeat > arguments.decoded_repeats:
                    continue
                turn = repeat % len(readers)  # nobody is always the one after the slowest
                for reader in [*readers[turn:], *readers[:turn]]:
                    job = Job(arguments.batch, workers, decode)
                    call = partial(timed, reader, sources[reader.name].folder, job, some if decode else everything)
                    found = alone(call, log=log)
                    if repeat:
                        passes.setdefault(((workers, decode), reader.name), []).append(found)
    return passes


def middle(readers: Sequence[Reader], sources: dict[str, Source], arguments: argparse.Namespace, log: Path) -> Cells:
    """Time to the first batch from the start and from a state nine tenths through, per reader."""
    cells: Cells = {}
    job, most = Job(arguments.batch, 0, False), arguments.samples // arguments.batch
    for reader in readers:
        source = sources[reader.name].folder
        state = alone(_state_at, reader, source, job, most * 9 // 10, log=log)
        starts = [alone(timed, reader, source, job, 1, log=log) for _ in range(3)]
        if isinstance(state, Failure) or any(isinstance(start, Failure) for start in starts):
            cells[reader.name] = "stops"
            continue
        start = statistics.median(start.first for start in starts)
        taken, saved = state
        if saved is None:
            cells[reader.name] = f"{1e3 * start:.0f} ms; no state: reading up to there takes {1e3 * taken:.0f} ms"
            continue
        later = [alone(timed, reader, source, job, 1, saved, log=log) for _ in range(3)]
        kept = [one.first for one in later if isinstance(one, Pass)]
        cells[reader.name] = f"{1e3 * start:.0f} ms; {1e3 * statistics.median(kept):.0f} ms" if kept else "stops"
    return cells


def _state_at(reader: Reader, source: Path, job: Job, batches: int) -> tuple[float, Any]:
    """Seconds to read so many batches, and the state after them."""
    begin, loader = time.perf_counter(), reader.loader([source], [1.0], job)
    for number, _ in enumerate(loader, 1):
        if number == batches:
            break
    state = loader.state()
    return time.perf_counter() - begin, None if state is None else reader.merged([state])


def prepare(readers: Sequence[Reader], shards: Path, work: Path, log: Path) -> dict[str, Source]:
    """Each reader's own form of the shards, all of it read once so that it lies in the page cache."""
    sources: dict[str, Source] = {}
    for reader in readers:
        own = work / reader.name / "timed"
        shutil.rmtree(own, ignore_errors=True)
        own.parent.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        folder = alone(reader.convert, shards, own, 0, log=log)
        seconds = time.perf_counter() - begin
        if isinstance(folder, Failure):
            raise SystemExit(f"{reader.name}: converting: {folder.kind}: {folder.message} (see {log})")
        size = sum(len(path.read_bytes()) for path in folder.rglob("*") if path.is_file())
        sources[reader.name] = Source(folder, 0.0 if folder == shards else seconds, size)
    return sources


# The page


def throughput(readers: Sequence[Reader], passes: Passes, settings: Sequence[Setting], mean_kb: float) -> list[str]:
    lines = [
        "| images | workers | reader | samples/s | MB/s | of the fastest peer | first batch ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for workers, decode in settings:
        of = {reader.name: passes[(workers, decode), reader.name] for reader in readers}
        peers = [name for name in of if name != "ours" and all(isinstance(one, Pass) for one in of[name])]
        fastest = max(peers, key=lambda name: _rate(of[name]), default=None)
        for reader in (*readers, *(reader for reader in READERS if reader not in readers)):
            cells = ["decoded" if decode else "raw", str(workers), reader.name]
            own = of.get(reader.name)
            failed = [one for one in own or () if isinstance(one, Failure)]
            if own is None:
                cells += [absent(reader), "", "", ""]
            elif failed:
                cells += [f"stops: {failed[0].kind}: {failed[0].message}".replace("|", "/"), "", "", ""]
            else:
                done = [one for one in own if isinstance(one, Pass)]
                first = statistics.median(one.first for one in done)
                cells += [f"{_rate(own):.0f}", f"{_rate(own) * mean_kb / 1e3:.0f}"]
                cells += [_ratio(own, of[fastest]) if fastest else "", f"{1e3 * first:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def absent(reader: Reader) -> str:
    """Why a reader has no numbers."""
    return "not asked for" if installed(reader.package) else f"not installed: `{INSTALL}`"


def _rate(passes: Sequence[Pass | Failure]) -> float:
    return statistics.median(one.rate for one in passes if isinstance(one, Pass))


def _ratio(own: Sequence[Pass | Failure], peer: Sequence[Pass | Failure]) -> str:
    """Median of the ratios within repeats, with the lowest and the highest of them."""
    ratios = sorted(
        one.rate / two.rate
        for one, two in zip(own, peer, strict=True)
        if isinstance(one, Pass) and isinstance(two, Pass)
    )
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def abilities(found: dict[str, Cells]) -> list[str]:
    lines = ["| | " + " | ".join(reader.name for reader in READERS) + " |", "|---" * (len(READERS) + 1) + "|"]
    names = list(dict.fromkeys(name for cells in found.values() for name in cells))
    for name in names:
        cells = [found[r.name].get(name, "not checked") if r.name in found else absent(r) for r in READERS]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


def head(
    arguments: argparse.Namespace, readers: Sequence[Reader], sources: dict[str, Source], mean_kb: float
) -> list[str]:
    import PIL  # versions and the name of the machine are looked up last: nothing of this is timed
    import torch

    from tools.bench_prefill import machine

    versions = [f"{reader.package} {installed(reader.package)}" for reader in readers if reader.name != "ours"]
    shuffles = "; ".join(f"{reader.name}: {reader.shuffle}" for reader in readers)
    made = [
        f"{name} {source.size / 1e6:.0f} MB" + (f" (converted in {source.seconds:.0f} s)" if source.seconds else "")
        for name, source in sources.items()
    ]
    options = ("samples", "decoded", "batch", "repeats", "decoded_repeats")
    command = " ".join(f"--{name.replace('_', '-')} {getattr(arguments, name)}" for name in options)
    workers = " ".join(map(str, arguments.workers))
    return [
        "# Readers",
        "",
        f"`python -m tools.bench_data {command} --workers {workers}`; peers: `{INSTALL}`",
        "",
        f"* {datetime.now(UTC):%Y-%m-%d}; {machine(torch.device('cpu'))} ({os.cpu_count()} cores); "
        f"torch {torch.__version__}, pillow {PIL.__version__}, {', '.join(versions)}",
        f"* {arguments.samples} samples, {mean_kb:.0f} kB each, local files in the page cache; batch "
        f"{arguments.batch}; decoded images are resized to {SIDE} x {SIDE} by the same function",
        f"* On disk: {', '.join(made)}. Ours and webdataset read the same tars",
        f"* Shuffled: {shuffles}",
        f"* Medians of {arguments.repeats} interleaved passes (decoded: {arguments.decoded_repeats} of "
        f"{arguments.decoded} samples), each in a process of its own; in brackets the lowest and highest ratio of a "
        "repeat. First batch: from opening to the first batch, workers started",
        "",
    ]


def page(arguments: argparse.Namespace, readers: Sequence[Reader], work: Path, log: Path) -> str:
    begin = time.monotonic()
    shards = samples.make(work / "shards", arguments.samples, 0, PER_SHARD, SIDES)
    sources = prepare(readers, shards, work, log)
    mean_kb = sources["ours"].size / arguments.samples / 1e3
    print(f"samples and formats: {time.monotonic() - begin:.0f} s", flush=True)
    kept = work / "checks.json"
    if not arguments.kept_checks:
        kept.write_text(json.dumps(run_checks(readers, work / "checks", log)))
    found: dict[str, Cells] = {name: cells for name, cells in json.loads(kept.read_text()).items() if name in sources}
    passes = measure(readers, sources, arguments, log)
    print(f"passes done: {time.monotonic() - begin:.0f} s", flush=True)
    for name, cell in middle(readers, sources, arguments, log).items():
        found[name] = {**found[name], "first batch from the start; from a state nine tenths through": cell}
    settings = [(workers, decode) for decode in (False, True) for workers in arguments.workers]
    lines = [*head(arguments, readers, sources, mean_kb), *throughput(readers, passes, settings, mean_kb)]
    lines += [
        "",
        "What happened when it was tried (`tools/readers/checks.py`):",
        "",
        *abilities(found),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--decoded", type=int, default=1024, help="samples of a pass whose images are decoded")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--decoded-repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=[reader.name for reader in READERS], help="beside ours")
    parser.add_argument("--kept-checks", action="store_true", help="show what the run before found in --work")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_data"), help="samples, formats, log")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the tables, as Markdown")
    arguments = parser.parse_args()
    chosen = {"ours", *(arguments.only or [reader.name for reader in READERS])}
    readers = [reader for reader in READERS if reader.name in chosen and (reader is ours or installed(reader.package))]
    arguments.work.mkdir(parents=True, exist_ok=True)
    for reader in readers:  # imported once, here: every pass is a fork of this process
        if reader.name != "ours":
            __import__({"mosaicml-streaming": "streaming"}.get(reader.name, reader.name))
    text = page(arguments, readers, arguments.work.resolve(), arguments.work.resolve() / "log.txt")
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
