"""What each reader can do, found by doing it: every cell of the table is what happened, not what a page claims.

The data are a few hundred small samples. A global batch of 8 is read by one rank or two, two workers each; a run is
stopped after `STOP` batches by taking its state there while workers have read ahead, and continued in new processes.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from tools.readers import samples
from tools.readers.common import Job, Loader, Reader
from tools.readers.processes import Failure, alone, ranks
from vlm.data.check import check
from vlm.data.errors import DataError
from vlm.data.index import load_index

BATCH, STOP, MIXED = 8, 11, 20  # samples of a global batch; batches before the stop; batches compared of a mixture
SIZES, PER_FILE, SIDES = (192, 64), 32, (48, 96)
WEIGHTS = (3.0, 1.0)
SECONDS = 30.0  # what takes longer hangs: it is a second or two of work
NO_STATE = "nothing to save"

Cells = dict[str, str]  # capability -> what was found


class Trace(NamedTuple):
    """What one rank read: the keys of each batch, its state after batch `STOP`, samples told as skipped."""

    batches: list[list[str]]
    state: Any
    skipped: int


class Folders(NamedTuple):
    """Where a reader finds each set of the checks, in its own format."""

    first: Path
    second: Path
    other: Path  # as many samples of the same sizes as the first, but other ones
    damaged: Path  # the first with one image destroyed


def run_checks(readers: Sequence[Reader], work: Path, log: Path) -> dict[str, Cells]:
    """The cells of every reader."""
    sets = {name: samples.make(work / name, *what, PER_FILE, SIDES) for name, what in _sets().items()}
    sets["damaged"] = _damage(sets["first"], work / "damaged")
    found = {}
    for reader in readers:
        folders = []
        for name, shards in sets.items():
            own = work / reader.name / name
            shutil.rmtree(own, ignore_errors=True)
            own.parent.mkdir(parents=True, exist_ok=True)
            made = alone(reader.convert, shards, own, PER_FILE, log=log)
            if isinstance(made, Failure):
                raise RuntimeError(f"{reader.name}: converting {name}: {made.kind}: {made.message} (see {log})")
            folders.append(made)
        begin = time.monotonic()
        found[reader.name] = _cells(reader, Folders(*folders), work / reader.name / "changed", log)
        print(f"checks of {reader.name}: {time.monotonic() - begin:.0f} s", flush=True)
    return found


def _sets() -> dict[str, tuple[int, int]]:
    """Samples and seed of each set."""
    return {"first": (SIZES[0], 1), "second": (SIZES[1], 2), "other": (SIZES[0], 3)}


def _cells(reader: Reader, folders: Folders, changed: Path, log: Path) -> Cells:
    run = partial(_run, reader, log)
    single, mixed = [folders.first], [folders.first, folders.second]
    cells = {f"resume: {name}": cell for name, cell in _resumes(run, single, (1.0,)).items()}
    cells |= {f"resume of a mixture: {name}": cell for name, cell in _resumes(run, mixed, WEIGHTS).items()}
    mixture = run(mixed, WEIGHTS, 1)
    keys = [] if isinstance(mixture, Failure) else [key for batch in mixture.batches[:MIXED] for key in batch]
    share = sum(key.startswith("s1_") for key in keys) / max(1, len(keys))
    cells["mixes sources by weight"] = f"{share:.1%} of {len(keys)} where 75 % were asked" if keys else _words(mixture)
    cells["a destroyed image"] = _damaged(run([folders.damaged], (1.0,), 1, decode=True))
    cells |= _changed(reader, folders, changed, log)
    cells["reads http"] = _remote(reader, folders.first, changed, log)
    return cells


# Reading


def _run(
    reader: Reader,
    log: Path,
    sources: Sequence[Path],
    weights: Sequence[float],
    world: int,
    state: Any = None,
    workers: int = 2,
    decode: bool = False,
) -> Trace | Failure:
    """Global batches of a world, ranks one after the other in each; the state is what a checkpoint would hold."""
    jobs = [Job(BATCH // world, workers, decode, 0, world, rank) for rank in range(world)]
    traces = ranks([(_trace, (partial(reader.loader, sources, weights, job, state),)) for job in jobs], log, SECONDS)
    for trace in traces:
        if isinstance(trace, Failure):
            return trace
    batches = [[key for keys in parts for key in keys] for parts in zip(*(trace.batches for trace in traces))]  # noqa: B905 - ragged is possible
    states = [trace.state for trace in traces]
    merged = None if None in states else reader.merged(states)
    return Trace(batches, merged, sum(trace.skipped for trace in traces))


def _trace(make: Callable[[], Loader]) -> Trace:
    loader, batches, state = make(), [], None
    for payload in loader:
        batches.append(payload.keys)
        if len(batches) == STOP:
            state = loader.state()
    return Trace(batches, state, loader.skipped)


# Resuming


def _resumes(run: Callable[..., Trace | Failure], sources: list[Path], weights: tuple[float, ...]) -> Cells:
    """Stopped on one world and continued on another, each beside the run that was not stopped."""
    whole = {key: run(sources, weights, key[0], None, key[1]) for key in ((1, 0), (1, 2), (2, 2))}
    cells = {"batches the same on 1 and 2 ranks": _same(whole[1, 2], whole[2, 2])}
    for name, old, new, workers in (
        ("same ranks, no workers", (1, 0), 1, 0),
        ("same ranks, 2 workers", (1, 2), 1, 2),
        ("2 workers to 3", (1, 2), 1, 3),
        ("1 rank to 2", (1, 2), 2, 2),
        ("2 ranks to 1", (2, 2), 1, 2),
    ):
        full = whole[old]
        if isinstance(full, Failure):
            cells[name] = _words(full)
        elif full.state is None:
            cells[name] = NO_STATE
        else:
            cells[name] = _resumed(full, run(sources, weights, new, full.state, workers), len(sources) > 1)
    return cells


def _resumed(full: Trace, rest: Trace | Failure, mixed: bool) -> str:
    if isinstance(rest, Failure):
        return _words(rest)
    expected, found = ([sorted(batch) for batch in trace] for trace in (full.batches[STOP:], rest.batches))
    if mixed:  # has no end of its own, so a piece of it is compared
        expected, found = expected[: MIXED - STOP], found[: MIXED - STOP]
    if expected == found:
        return "exact"
    if found == expected[: len(found)]:
        return f"exact, but without the last {sum(map(len, expected[len(found) :]))} samples of the epoch"
    wanted, got = (Counter(key for batch in batches for key in batch) for batches in (expected, found))
    same = sum(a == b for a, b in zip(expected, found))  # noqa: B905
    if wanted == got:
        return f"each sample once, {same} of {len(expected)} batches the same"
    lost, added = (wanted - got).total(), (got - wanted).total()
    return f"{lost} samples lost, {added} repeated or others; {same} of {len(expected)} batches the same"


def _same(one: Trace | Failure, two: Trace | Failure) -> str:
    for trace in (one, two):
        if isinstance(trace, Failure):
            return _words(trace)
    assert isinstance(one, Trace) and isinstance(two, Trace)
    pairs = list(zip(one.batches, two.batches))  # noqa: B905
    same = sum(sorted(a) == sorted(b) for a, b in pairs)
    return "yes" if same == len(pairs) and len(one.batches) == len(two.batches) else f"{same} of {len(pairs)}"


# Damage and change


def _damaged(trace: Trace | Failure) -> str:
    if isinstance(trace, Failure):
        return _words(trace)
    read = sum(len(keys) for keys in trace.batches)
    return f"{read} of {SIZES[0]} read, {trace.skipped or 'none'} counted as skipped"


def _changed(reader: Reader, folders: Folders, changed: Path, log: Path) -> Cells:
    """A byte of an image in another state, a file cut short, and a saved state over other data."""
    cells: Cells = {}
    for name, change in (("a changed byte", _flip), ("a file cut short", _cut)):
        shutil.rmtree(changed, ignore_errors=True)
        shutil.copytree(folders.first, changed)
        change(_data_files(changed)[1])
        seen = _noticed(_count(_run(reader, log, [changed], (1.0,), 1)), "while reading")
        by_hash = _by_hash(reader, changed, log)
        cells[name] = f"{seen}; {by_hash}" if by_hash else seen
    first = _run(reader, log, [_swapped(changed, folders.first)], (1.0,), 1)
    state = None if isinstance(first, Failure) else first.state
    if state is None:
        return {**cells, "a saved state over other data": NO_STATE}
    rest = _run(reader, log, [_swapped(changed, folders.other)], (1.0,), 1, state)
    cells["a saved state over other data"] = _noticed(_count(rest, STOP * BATCH), "on resuming")
    return cells


def _count(found: Trace | Failure, before: int = 0) -> int | Failure:
    """Samples read, and those that were read before."""
    return found if isinstance(found, Failure) else before + sum(map(len, found.batches))


def _by_hash(reader: Reader, changed: Path, log: Path) -> str:
    """What a check of hashes that the reader brings along finds; empty where none is known."""
    if reader.name == "ours":
        return _noticed(alone(_check_shards, changed, log=log), "by `vlm data check`")
    if reader.name == "mosaicml-streaming":
        copy = changed.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        found = alone(_read_remote, reader, str(changed), changed, copy, log=log)
        return _noticed(found, "while copying with validate_hash")
    return ""


def _check_shards(folder: Path) -> int:
    problems = check(folder)
    if problems:
        raise DataError(str(problems[0]))
    return SIZES[0]


def _noticed(found: int | Failure, when: str) -> str:
    if isinstance(found, Failure):
        return f"noticed {when} ({found.kind})"
    return f"not noticed {when}" if found == SIZES[0] else f"{found} of {SIZES[0]} samples {when}, no exception"


def _swapped(folder: Path, content: Path) -> Path:
    """`folder` holding what `content` does, so that the path stays the same."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(content, folder)
    return folder


def _data_files(folder: Path) -> list[Path]:
    """The large files of a format, without its indexes."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".tar", ".bin", ".mds"))


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x55
    file.write_bytes(content)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _damage(shards: Path, folder: Path) -> Path:
    """A copy with the first 64 bytes of one image overwritten."""
    _swapped(folder, shards)
    shard = _data_files(folder)[1]
    row = load_index(str(shard)).rows[5]
    with shard.open("r+b") as file:
        file.seek(row.media[0].offset)
        file.write(bytes(64))
    return folder


# Remote


def _remote(reader: Reader, source: Path, changed: Path, log: Path) -> str:
    """All of the first set over http, from a server on this machine that answers range requests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Ranges, directory=str(source)))
    process = get_context("fork").Process(target=server.serve_forever, daemon=True)
    process.start()
    try:
        base = f"http://127.0.0.1:{server.server_address[1]}"
        copy = changed.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        found = alone(_read_remote, reader, base, source, copy, log=log, seconds=SECONDS)
    finally:
        process.terminate()
        process.join()
        server.server_close()
    return _words(found) if isinstance(found, Failure) else f"{found} of {SIZES[0]} samples"


def _read_remote(reader: Reader, base: str, source: Path, copy: Path) -> int:
    files = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    loader = reader.remote(base, files, copy, Job(BATCH, 2, False))
    return sum(len(payload.keys) for payload in loader)


class _Ranges(SimpleHTTPRequestHandler):
    """Files with `Range: bytes=a-b` answered, as object stores do."""

    def send_head(self) -> Any:
        asked = self.headers.get("Range", "")
        path = Path(self.translate_path(self.path))
        if not asked.startswith("bytes=") or not path.is_file():
            return super().send_head()
        size = path.stat().st_size
        first, last = asked.removeprefix("bytes=").split("-")
        start = int(first) if first else size - int(last)
        end = min(int(last) + 1 if first and last else size, size)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        with path.open("rb") as file:
            file.seek(start)
            self.wfile.write(file.read(end - start))
        return None

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _words(found: Any) -> str:
    """A failure in a cell."""
    assert isinstance(found, Failure)
    message = found.message if len(found.message) < 90 else found.message[:87] + "..."
    return f"stops: {found.kind}: {message}".replace("|", "/").replace(str(Path.cwd()), ".")
