"""Train while everything fails: killed processes, full disks, rotten samples and a bad network, again and again.

    python tools/soak.py [--minutes 5] [--seed 0]

A tiny model trains on Scenes, half of which lie on the disk and half on a server of this program. Each life of a run
has a random legal layout (one or two processes, workers, micro-batch) and one fault drawn from a deck of all kinds:

* kill all, kill one: SIGKILL after a random number of steps; the other rank must end by itself
* terminate all, terminate one: SIGTERM; every rank must save after the same step and end with 0
* disk full: writing a checkpoint fails with ENOSPC (its place leads to /dev/full); file limit: RLIMIT_FSIZE, which
  checkpoints or logs run into. Both must end in one clear line
* in every life the server stalls, resets, cuts off, shortens or refuses some answers: no sample may be lost by that
* before every life bytes of a sample on the disk are flipped, or its image ends in zeros: a counted skip at the same
  position. Only damage that json or PIL alone see too is done; a flipped colour is seen by nobody

The run is then resumed in another layout. At its end the consumed samples must be those of an undisturbed run, step by
step; after every life every checkpoint must be readable. Rounds repeat until the minutes are over and every kind was
had. Prints what was injected and survived; ends with 1, and keeps the folder, at the first thing that was not.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.data.index import load_manifest
from vlm.data.scenes.make import make
from vlm.data.store import Store
from vlm.data.write import write_shards

RECIPE = """
name: soak
seed: {seed}
model:
  vision: {{use: conv_vit, image: 48, dim: 16, depth: 1, heads: 2}}
  connector: {{use: mlp, depth: 2}}
  language:
    config: {{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2,
      num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 128}}
    tokenizer: {tokenizer}
data:
  workers: 0
  on_bad_sample: {{skip: 50%, consecutive: 64}}
  sources: {{disk: {{shards: {disk}}}, net: {{shards: "{net}"}}}}
stages:
  - tags:
      objective: tags
      mix: {{disk: 1, net: 1}}
      train: {{vision: {{lr: 1e-2}}}}
      steps: 9
  - sft:
      mix: {{disk: 1, net: 2}}
      train: {{connector: {{lr: 1e-2}}, language: {{lr: 1e-2}}}}
      steps: 30
run: {{dir: {folder}, global_batch: 8, log_every: 1, threads: 1, trace_samples: true, save: {{every: 3, keep: 4}}}}
"""
FINAL = "stage1-sft-step00000030.ckpt"
STEPS = {0: ("tags", 9), 1: ("sft", 30)}
DECK = ("kill all", "kill one", "terminate all", "terminate one", "disk full", "file limit")
CLEAR = re.compile(r"^error: .*(No space left on device|File too large)", re.MULTILINE)
NETWORK = ("stall", "reset", "cut", "shorten", "refuse")
PATIENCE = 90.0  # seconds that ranks get to end by themselves


class Failed(Exception):
    """A fault was not survived, or not as it must be."""


class Server(ThreadingHTTPServer):
    """The files of a folder, by ranges too; answers with a fault as often as ``share`` says. ``faults`` counts them."""

    daemon_threads = True

    def __init__(self, folder: Path, draw: random.Random, share: float = 0.1) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder, self.draw, self.share = folder, draw, share
        self.faults: Counter[str] = Counter()
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self, method: str, ranged: bool) -> str:
        """One that such a request can suffer, or none."""
        with self.lock:
            if self.draw.random() >= self.share:
                return ""
            fault = self.draw.choices(NETWORK, (1, 4, 4, 4, 4))[0]  # stalls cost the most time
            if (method == "HEAD" and fault != "refuse") or (fault == "shorten" and not ranged):
                return ""
            self.faults[fault] += 1
            return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no news."""


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # type: ignore[assignment]  # the only one that makes these

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        fault = self.server.next_fault(self.command, span is not None)
        path = self.server.folder / Path(self.path).name
        if fault == "refuse" or not path.is_file():
            return self.send_error(503 if fault else 404)
        content, status = path.read_bytes(), 200
        if span:
            content, status = content[int(span[1]) : int(span[2]) + 1], 206
            if fault == "shorten":  # with a length that says so: only who asked can tell
                content = content[: len(content) * 2 // 3]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        broken = fault in ("stall", "reset", "cut")
        self.wfile.write(content[: len(content) // 2] if broken else content)
        if fault == "stall":
            time.sleep(2.5)
        if fault == "reset":
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = broken
        return None

    def log_message(self, format: str, *args: Any) -> None:
        pass


def rank_main(environment: dict[str, str], log: str, limit: int | None, arguments: list[str]) -> None:
    """One rank of ``vlm train``, in a process of its own; ``limit``: of bytes that a file may have."""
    os.environ.update(environment)
    with Path(log).open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    import torch

    torch.set_num_threads(1)
    from vlm.commands import main

    sys.exit(main(arguments))


@dataclass
class Soak:
    """The data, the server and the counts of one soak in ``folder``."""

    folder: Path
    seed: int
    injected: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    lives: int = 0

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            ["vlm.run", "vlm.training.train", "vlm.objectives.tags", "vlm.objectives.chat"]
        )
        scenes = make(self.folder / "scenes", train=160, test=8, seed=self.seed)
        samples = list(Store(load_manifest(scenes / "train")))
        write_shards(samples[:80], self.folder / "clean", max_count=30)
        write_shards(samples[80:], self.folder / "net", max_count=30)
        self.tokenizer = scenes / "tokenizer"
        self.server = Server(self.folder / "net", random.Random(self.seed + 1))

    def start(self, recipe: Path, world: int, limit: int | None, *overrides: str) -> list[Any]:
        """The processes of one life."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"VLM_REMOTE_TIMEOUT": "1", "VLM_REMOTE_TRIES": "8", "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        parallel = [f"run.devices={world}", f"run.parallel={'ddp' if world > 1 else 'single'}"]
        processes = []
        for rank in range(world):
            environment = common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {})
            arguments = ["train", str(recipe), *parallel, *overrides]
            log = str(recipe.with_name(f"rank{rank}.log"))
            processes.append(self.context.Process(target=rank_main, args=(environment, log, limit, arguments)))
            processes[-1].start()
        return processes

    def round(self, number: int, deck: list[str]) -> None:
        """One run to its end, through faults of the deck; those that happened are taken from it."""
        place = self.folder / f"round{number}"
        undisturbed = self.undisturbed(place / "undisturbed", number)
        run = Run(place / "run", self.folder / "clean")
        self.write(run.recipe, run.folder, number, run.disk, f"{self.server.address}/shard-{{000000..000002}}.tar")
        before, had = self.server.faults.copy(), Counter[str]()
        for _ in range(3):
            had[run.rot(self.draw)] += 1
        run.first_rotten = set(run.rotten)
        while not run.done:
            fault = deck[0] if deck else ""
            had.update([run.rot(self.draw)] if len(run.rotten) < 16 else [])
            if self.life(run, fault):
                had[deck.pop(0)] += 1
            run.check_checkpoints()
            if run.lives > 60:
                raise Failed("the run does not come to its end")
        had.update({f"server: {fault}": count for fault, count in (self.server.faults - before).items()})
        self.injected.update(had)
        run.check_end(undisturbed)
        self.survived.update(had)
        self.lives += run.lives
        shutil.rmtree(place)

    def undisturbed(self, place: Path, number: int) -> Path:
        place.mkdir(parents=True)
        self.write(place / "recipe.yaml", place / "run", number, self.folder / "clean", str(self.folder / "net"))
        (process,) = self.start(place / "recipe.yaml", 1, None)
        process.join(PATIENCE)
        if process.exitcode != 0:
            process.kill()
            raise Failed(f"the undisturbed run ended with {process.exitcode}: {(place / 'rank0.log').read_text()}")
        return place / "run"

    def write(self, path: Path, folder: Path, number: int, disk: Path, net: str) -> None:
        seed = 1000 * self.seed + number
        path.write_text(RECIPE.format(seed=seed, tokenizer=self.tokenizer, disk=disk, net=net, folder=folder))

    def life(self, run: "Run", fault: str) -> bool:
        """From start to end or death; whether the fault happened."""
        world = 2 if fault.endswith("one") else self.draw.choice((1, 2))
        micro = self.draw.choice([size for size in (1, 2, 4, 8) if (8 // world) % size == 0])
        limit = run.some_limit(self.draw) if fault == "file limit" else None
        workers = 0 if limit else self.draw.choice((0, 1, 2))  # shared memory would be limited too
        growth, wanted = run.growth(), self.draw.randint(1, 6)
        processes = self.start(run.recipe, world, limit, f"run.micro_batch={micro}", f"data.workers={workers}")
        run.lives += 1
        try:
            hit: list[Any] = []
            if fault and fault != "file limit":
                grown = _wait(lambda: growth() >= wanted or not _alive(processes))
                if grown and _alive(processes):
                    hit = self.strike(run, fault, processes)
            codes = _join(processes)
        finally:
            for process in processes:
                process.kill()
        happened = run.judge(fault, codes, {processes.index(process) for process in hit})
        layout = f"{world} x {micro}, {workers} workers"
        print(f"life {run.lives}: {layout}, {fault or 'none'}, {codes}, {run.consumed} steps", flush=True)
        return happened

    def strike(self, run: "Run", fault: str, processes: list[Any]) -> list[Any]:
        """Do it, and say to which processes."""
        if fault == "disk full":
            run.fill_disk()
            return []
        time.sleep(self.draw.uniform(0, 0.03))
        hit = processes if fault.endswith("all") else [self.draw.choice(processes)]
        for process in hit:
            os.kill(process.pid, signal.SIGKILL if fault.startswith("kill") else signal.SIGTERM)
        return hit


class Run:
    """The disturbed run: its recipe, its folder, its copy of the shards on the disk."""

    def __init__(self, place: Path, clean: Path) -> None:
        self.folder, self.recipe, self.disk = place / "run", place / "recipe.yaml", place / "disk"
        place.mkdir(parents=True)
        shutil.copytree(clean, self.disk)
        self.store = Store(load_manifest(clean))
        self.rotten: set[str] = set()
        self.first_rotten: set[str] = set()
        self.lives = 0

    @property
    def done(self) -> bool:
        return (self.folder / "checkpoints" / FINAL).exists()

    @property
    def consumed(self) -> int:
        trace = self.folder / "samples.jsonl"
        return trace.read_text().count("\n") if trace.exists() else 0

    def growth(self) -> Callable[[], int]:
        """Tells how many lines the trace has more than it ever had least: a life first drops what it does again."""
        least = self.consumed

        def lines() -> int:
            nonlocal least
            found = self.consumed
            least = min(least, found)
            return found - least

        return lines

    def rot(self, draw: random.Random) -> str:
        """Damage one more sample of the copy, so that it can no longer be read; which way."""
        number = draw.choice([n for n in range(len(self.store)) if self.store.key(n) not in self.rotten])
        row = self.store.row(number)
        clean = Path(next(s.address for s in self.store.manifest.shards if self._holds(s.address, row.key)))
        kind, (medium,) = draw.choice(("rot: bytes flipped", "rot: image cut off")), row.media
        while True:
            place, size = draw.choice([(row.offset, row.size), (medium.offset, medium.size)])
            content = bytearray(clean.read_bytes()[place : place + size])
            if kind == "rot: image cut off":
                place, size = medium.offset, medium.size
                content = bytearray(clean.read_bytes()[place : place + size])
                keep = draw.randint(1, size - 16)
                content[keep:] = bytes(size - keep)
            else:
                for _ in range(8):
                    content[draw.randrange(size)] ^= draw.randint(1, 255)
            if not _readable(bytes(content), place == row.offset):
                break
        with (self.disk / clean.name).open("r+b") as file:
            file.seek(place)
            file.write(content)
        self.rotten.add(row.key)
        return kind

    def _holds(self, shard: str, key: str) -> bool:
        return f'"{key}"'.encode() in Path(shard.removesuffix(".tar") + ".index.json").read_bytes()

    def some_limit(self, draw: random.Random) -> int:
        """Bytes that the logs will soon outgrow, or that no checkpoint keeps within."""
        sizes = [path.stat().st_size for path in self.folder.glob("*.*") if path.is_file()]
        return max([4096, *sizes]) + draw.choice((300, 1500))

    def fill_disk(self) -> None:
        """Every checkpoint that is still due would be written to a device that is full."""
        for stage, (name, steps) in STEPS.items():
            for step in range(3, steps + 1, 3):
                part = self.folder / "checkpoints" / f"stage{stage}-{name}-step{step:08d}.partial"
                try:
                    part.parent.mkdir(exist_ok=True)
                    part.symlink_to("/dev/full")
                except FileExistsError:
                    continue  # it is being written just now

    def judge(self, fault: str, codes: Sequence[int | None], hit: set[int]) -> bool:
        """Whether the fault happened. Raises Failed where a life did not end as it must."""
        log = "".join(path.read_text() for path in sorted(self.recipe.parent.glob("rank*.log")))
        where = f"life {self.lives}, {fault or 'no fault'}: exit codes {codes}"
        if None in codes:
            raise Failed(f"{where}: a rank did not end within {PATIENCE:g} s\n{log}")
        if all(code == 0 for code in codes) and self.done:
            return False  # it came to its end before the fault
        if fault.startswith("kill") and all(codes[rank] == -signal.SIGKILL for rank in hit) and hit:
            if all(code != 0 for code in codes):
                return True
        elif fault.startswith("terminate") and hit and all(code == 0 for code in codes):
            last = json.loads((self.folder / "samples.jsonl").read_text().splitlines()[-1])
            name, step = STEPS[last["stage"]][0], last["step"] + 1
            saved = self.folder / "checkpoints" / f"stage{last['stage']}-{name}-step{step:08d}.ckpt"
            if saved.exists():
                return True
            where += f", expected {saved.name}"
        elif fault in ("disk full", "file limit") and codes[0] == 2 and CLEAR.search(log):
            return True
        raise Failed(f"{where}: not the end that it must have\n{log}")

    def check_checkpoints(self) -> None:
        from vlm.training import checkpoints

        for path in sorted((self.folder / "checkpoints").glob("*.ckpt")):
            checkpoints.read(path)  # raises TrainingError

    def check_end(self, undisturbed: Path) -> None:
        """The same samples in every step, and a skip for each that was rotten by then and for no other."""
        expected, found = (_lines(folder / "samples.jsonl") for folder in (undisturbed, self.folder))
        ids = [Counter(key for line in lines for key in line["ids"]) for lines in (expected, found)]
        if ids[0] != ids[1]:
            raise Failed(f"samples lost: {ids[0] - ids[1]}; repeated: {ids[1] - ids[0]}")
        if expected != found:
            raise Failed("the samples are those of the undisturbed run, but not step by step")
        skipped = {
            (line["stage"], line["step"]): line.get("skipped", 0) for line in _lines(self.folder / "metrics.jsonl")
        }
        for line in found:
            least, most = (sum(key in bad for key in line["ids"]) for bad in (self.first_rotten, self.rotten))
            count = skipped[line["stage"], line["step"]]
            if not least <= count <= most:
                raise Failed(f"stage {line['stage']} step {line['step']}: {count} skips, expected {least} to {most}")


def _readable(content: bytes, is_json: bool) -> bool:
    try:
        if is_json:
            json.loads(content)
        else:
            Image.open(io.BytesIO(content)).load()
    except Exception:  # whatever it is that is wrong with it
        return False
    return True


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _alive(processes: list[Any]) -> bool:
    return any(process.is_alive() for process in processes)


def _wait(done: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def _join(processes: list[Any]) -> list[int | None]:
    end = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    return [process.exitcode for process in processes]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=5.0, help="rounds begin until then; one at least")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder, begun = Path(tempfile.mkdtemp(prefix="soak-")), time.monotonic()
    soak = Soak(folder, arguments.seed)
    deck: list[str] = []
    number = 0
    try:
        while number == 0 or deck or time.monotonic() - begun < 60 * arguments.minutes:
            if not deck:
                deck = list(soak.draw.sample(DECK, len(DECK)))
            soak.round(number, deck)
            number += 1
    except Exception as error:
        print(f"NOT SURVIVED in round {number} (kept in {folder}): {error}", file=sys.stderr)
        return 1
    finally:
        soak.server.shutdown()
        for kind in sorted(soak.injected):
            print(f"{kind:22} injected {soak.injected[kind]:5}  survived {soak.survived[kind]:5}")
        seconds = time.monotonic() - begun
        print(f"{number} rounds of {soak.lives} lives in {seconds:.0f} s, seed {arguments.seed}")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
