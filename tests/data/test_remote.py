"""Reading over a network that stalls, resets and cuts off, against a server of our own that does so when told."""

import http.server
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlm.data import remote
from vlm.data.address import open_binary
from vlm.data.errors import DataError
from vlm.data.index import build_index, load_manifest
from vlm.data.schema import Message, Part, Sample
from vlm.data.store import Store
from vlm.data.write import write_shards


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET and HEAD of one folder; each request first takes the next of the faults that are due."""

    protocol_version = "HTTP/1.1"
    folder: Path
    faults: list[str]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.headers.get('Range', '')}")
        fault = self.faults.pop(0) if self.faults else ""
        path = self.folder / self.path.lstrip("/")
        if fault.isdigit() or not path.is_file():
            self.send_error(int(fault or 404))
            return
        content, start, whole = path.read_bytes(), 0, True
        if (span := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))) and fault != "no ranges":
            start, whole = int(span[1]), False
            content = content[start : int(span[2]) + 1]
        if fault == "short":  # and it says so: nothing but the length tells
            content = content[:-7]
        self.send_response(200 if whole else 206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = len(content) // 2 if fault in ("stall", "reset", "cut") else len(content)
        self.wfile.write(content[:sent])
        if fault == "stall":
            time.sleep(1.5)
        if fault in ("stall", "reset", "cut"):
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Handler]]]:
    """The address of a folder of two shards, and the handler that takes faults and notes requests."""
    samples = (Sample(f"s{n}", (Message("user", (Part("text", f"text {n}"),)),)) for n in range(8))
    write_shards(samples, tmp_path, max_count=4)
    handler = type("Told", (Handler,), {"folder": tmp_path, "faults": [], "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(remote, "_PAUSE", 0.01)
    monkeypatch.setenv("VLM_REMOTE_TIMEOUT", "0.4")
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()


def text(sample: Sample) -> str:
    return sample.messages[0].content[0].text


@pytest.mark.parametrize("fault", ["stall", "reset", "cut", "short", "no ranges", "500", "503", "429"])
def test_what_passes_is_tried_again(fault: str, served: tuple[str, type[Handler]]) -> None:
    address, handler = served
    store = Store(load_manifest(f"{address}/shard-{{000000..000001}}.tar"))
    store.key(0)
    handler.asked.clear()
    handler.faults[:] = [fault, fault]
    start = time.monotonic()
    assert text(store.read(2)) == "text 2"
    assert len(handler.asked) == 3 and len(set(handler.asked)) == 1
    assert time.monotonic() - start < 1.4, "a stalled request was waited for"


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("stall", r"no answer within 0\.4\d* s"),
        ("short", r"\d+ bytes"),
        ("no ranges", r"\d+ bytes; does the server know ranges\?"),
        ("500", "500, .*"),
    ],
)
def test_what_lasts_is_one_line_that_names_the_sample(
    fault: str, found: str, served: tuple[str, type[Handler]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, handler = served
    monkeypatch.setenv("VLM_REMOTE_TRIES", "2")
    store = Store(load_manifest(f"{address}/shard-{{000000..000001}}.tar"))
    store.key(5)
    handler.faults[:] = [fault] * 2
    line = rf"sample s5: {address}/shard-000001.tar: expected \d+ bytes at \d+, found {found} \(try 2 of 2\)"
    with pytest.raises(DataError) as raised:
        store.read(5)
    assert re.fullmatch(line, str(raised.value)), raised.value
    assert handler.faults == [] and text(store.read(5)) == "text 5"


def test_a_refused_question_for_the_size_is_no_missing_file(served: tuple[str, type[Handler]], tmp_path: Path) -> None:
    address, handler = served
    handler.faults[:] = ["503"] * 4  # HEAD and GET, twice
    size = (tmp_path / "shard-000000.tar").stat().st_size
    assert remote.byte_size(f"{address}/shard-000000.tar") == size
    handler.faults[:] = ["503"] * 20
    with pytest.raises(DataError, match=r"expected its size, found 503, .*\(try 5 of 5\)"):
        remote.byte_size(f"{address}/shard-000000.tar")


def test_what_trying_again_cannot_mend_fails_at_once(served: tuple[str, type[Handler]]) -> None:
    address, handler = served
    handler.faults[:] = ["403"] * 5
    with pytest.raises(DataError, match=r"403.*\(try 1 of 5\)"):
        remote.read_range(f"{address}/shard-000000.tar", 0, 5)
    assert len(handler.asked) == 1
    handler.faults.clear()
    with pytest.raises(DataError, match="expected a file, found none"):
        open_binary(f"{address}/none.tar")


def test_a_shard_without_an_index_is_read_whole_in_spite_of_faults(
    served: tuple[str, type[Handler]], tmp_path: Path
) -> None:
    address, handler = served
    expected = load_manifest(tmp_path).hash
    for path in tmp_path.glob("*.index.json"):
        path.unlink()
    (tmp_path / "manifest.json").unlink()
    handler.faults[:] = ["", "503", "reset", "", "stall", "", "short", "cut"]
    found = load_manifest(f"{address}/shard-{{000000..000001}}.tar")
    assert found.hash == expected == build_index(tmp_path).hash
    assert handler.faults == []


def test_forked_workers_ask_for_themselves(served: tuple[str, type[Handler]]) -> None:
    address, handler = served
    store = Store(load_manifest(f"{address}/shard-{{000000..000001}}.tar"))
    assert text(store.read(0)) == "text 0"
    handler.faults[:] = ["reset"]
    child = os.fork()
    if child == 0:
        os._exit(0 if [text(sample) for sample in store] == [f"text {n}" for n in range(8)] else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("name", ["VLM_REMOTE_TIMEOUT", "VLM_REMOTE_TRIES"])
def test_limits_that_are_none_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "often")
    with pytest.raises(DataError, match=r"expected seconds and a count, found .*'often'"):
        remote.byte_size("http://127.0.0.1:1/a.tar")
