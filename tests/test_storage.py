"""Reading shards: whatever lies between, a read gives the file's bytes or says why not, and never bytes of something else.

Servers are real ones on the loopback: http.server with Range written out below, moto for S3 (skipped where it is not installed).
"""

from __future__ import annotations

import errno
import os
import pickle
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from data_pipelines import storage
from data_pipelines.storage import Access, MissingError, ReadError, exists, expand, is_remote, matches, open_file, size_of

CHUNK = 65536 + 1000  # no whole number of checksum blocks, so that borders of both are crossed
DATA = b"".join(struct.pack("<I", number * 2654435761 & 0xFFFFFFFF) for number in range(120_000))  # 480,000 bytes, 8 chunks
ROOMY = 0.01


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short pauses, no proxy between a test and its own server, no connection left from another test, no test that hangs."""
    pytest.importorskip("fsspec")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(storage, "PAUSE", 0.001)
    monkeypatch.setattr(storage, "SILENCE", 5.0)
    monkeypatch.setattr(storage, "PATIENCE", 15.0)

    def stuck(*_: object) -> None:
        raise AssertionError("the test hangs")

    before = signal.signal(signal.SIGALRM, stuck)
    signal.alarm(60)
    storage.forget()
    yield
    storage.forget()
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def access(**changes: Any) -> Access:
    return Access(**({"chunk_mb": CHUNK / 2**20, "cache_gb": ROOMY, "retries": 3} | changes))


# -------------------------------------------------------------------------------------------------------------- servers

Fault = Callable[["Handler"], bool]  # True: the request is answered, or will never be


class Server(ThreadingHTTPServer):
    """Serves `files`; each request first meets the next of `faults`. `asked` lists (path, Range) of every request."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.etags = files, dict.fromkeys(files, '"one"')
        self.faults: list[Fault] = []
        self.asked: list[tuple[str, str]] = []
        self.ranges = True

    def url(self, name: str = "a.tar") -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, *_: object) -> None:
        """Clients go away in the middle on purpose."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path[1:].partition("?")[0]
        self.server.asked.append((name, self.headers.get("Range", "")))
        if self.server.faults and self.server.faults.pop(0)(self):
            return
        if name not in self.server.files:
            self.answer(404, {}, b"not here")
            return
        data, headers = self.server.files[name], {"ETag": self.server.etags[name]} if self.server.etags[name] else {}
        if not (self.server.ranges and (found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")))):
            self.answer(200, headers, data)
        elif int(found[1]) >= len(data):
            self.answer(416, headers | {"Content-Range": f"bytes */{len(data)}"}, b"")
        else:
            start, end = int(found[1]), min(int(found[2]) + 1, len(data))
            self.answer(206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}, data[start:end])

    def answer(self, status: int, headers: dict[str, str], body: bytes, promised: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if promised is None else promised))
        self.end_headers()
        self.wfile.write(body)


def status(code: int) -> Fault:
    def fault(handler: Handler) -> bool:
        handler.answer(code, {}, b"an error page, not the file")
        return True

    return fault


def reset(handler: Handler) -> bool:
    """The connection breaks in the middle of the body."""
    handler.answer(206, {"Content-Range": handler.headers["Range"].replace("=", " ") + f"/{len(DATA)}"}, DATA[:100], CHUNK)
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    os.close(handler.connection.detach())  # close() would wait for the streams made of the socket
    return True


def short(handler: Handler) -> bool:
    """A body that is complete by its own length, and yet shorter than what was asked for."""
    start = re.findall(r"\d+", handler.headers["Range"])[0]
    handler.answer(206, {"Content-Range": f"bytes {start}-{int(start) + 4}/{len(DATA)}", "ETag": '"one"'}, b"short")
    return True


def slow(handler: Handler) -> bool:
    time.sleep(1.0)
    return True


def fine(_: Handler) -> bool:
    return False


@pytest.fixture
def server() -> Iterator[Server]:
    yield from serving(Server({"a.tar": DATA, "b.tar": DATA[::-1], "empty.tar": b""}))


def serving(server: Any) -> Iterator[Any]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


# --------------------------------------------------------------------------------------------------- any reads, any place


@pytest.fixture
def places(server: Server, tmp_path: Path) -> Iterator[dict[str, str]]:
    import fsspec

    (tmp_path / "a.tar").write_bytes(DATA)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/shards/a.tar", DATA)
    yield {
        "local": str(tmp_path / "a.tar"),
        "file": f"file://{tmp_path}/a.tar",
        "http": server.url(),
        "memory": "memory://shards/a.tar",
    }
    memory.rm("/shards", recursive=True)


READS = st.lists(st.tuples(st.integers(0, len(DATA) + 10), st.integers(0, 3 * CHUNK)), min_size=1, max_size=8)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(reads=READS, gigabytes=st.sampled_from([0.0, 0.0002, ROOMY]), again=st.booleans())
def test_any_reads_are_slices(places: dict[str, str], reads: list[tuple[int, int]], gigabytes: float, again: bool) -> None:
    """With no cache, one that holds two chunks, a roomy one; again: with nothing in memory before every read."""
    for url in places.values():
        file = open_file(url, access(cache_gb=gigabytes))
        assert (file.name, file.size) == (url, len(DATA))
        for offset, size in reads:
            if again:
                storage.here().chunks.clear()
            assert file.read(offset, size) == DATA[offset : offset + size]


def test_the_end_and_nothing(places: dict[str, str], server: Server) -> None:
    for url in places.values():
        file = open_file(url, access())
        assert file.read(len(DATA) - 3, 10) == DATA[-3:]
        assert file.read(len(DATA), 10) == file.read(5, 0) == b""
        with pytest.raises(ValueError, match="negative"):
            file.read(-1, 10)
        file.close()
        assert file.read(1, 2) == DATA[1:3]
    assert open_file(server.url("empty.tar"), access()).read(0, 10) == b""


def test_names(tmp_path: Path) -> None:
    assert [is_remote(name) for name in ("s3://b/x", "HTTPS://h/x", "memory://x", "a+b://x")] == [True] * 4
    assert [is_remote(name) for name in ("file:///x", "/x", "x", "a:b", Path("s3://b/x"), "./s3://")] == [False] * 6
    assert storage.local_path("file:///a/b") == storage.local_path("file://localhost/a/b") == Path("/a/b")
    assert storage.shown("https://me:secret@h/x?X-Signature=y") == "https://...@h/x?..."


def test_sizes_and_presence(places: dict[str, str], server: Server, tmp_path: Path) -> None:
    for url in places.values():
        assert size_of(url, access()) == len(DATA)
        assert exists(url, access())
        assert not exists(url + ".no", access())
        with pytest.raises(MissingError, match=re.escape(".no: no such file")):
            open_file(url + ".no", access()).read(0, 1)
    assert not exists(tmp_path)
    with pytest.raises(UserError, match="not a regular file"):
        open_file(tmp_path).read(0, 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cache_gb", -1.0),
        ("cache_gb", float("inf")),
        ("chunk_mb", 0.0),
        ("chunk_mb", 5e3),
        ("retries", -1),
        ("cache_dir", "s3://x"),
    ],
)
def test_impossible_settings(key: str, value: Any) -> None:
    Access().validate()
    with pytest.raises(UserError, match=f"data.access.{key}="):
        Access(**{key: value}).validate()


def test_patterns(places: dict[str, str], server: Server, tmp_path: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe({"/shards/c.tar": b"c", "/shards/b*.tar": b"b", "/shards/bb.tar": b"bb"})
    for name in ("c.tar", "b*.tar", "bb.tar"):
        (tmp_path / name).write_bytes(b"")
    for folder in (str(tmp_path), "memory://shards"):
        assert matches(f"{folder}/*.tar") == [f"{folder}/{name}.tar" for name in ("a", "b*", "bb", "c")]
        assert matches(f"{folder}/b*.tar") == [f"{folder}/b*.tar"]  # the file of just that name
        assert matches(f"{folder}/no*.tar") == matches(f"{folder}/no.tar") == []
        assert expand(f"{folder}/{{c,a}}.tar") == [f"{folder}/c.tar", f"{folder}/a.tar"]
        with pytest.raises(UserError, match=r"\{a,no\}.tar \(.*/no.tar\): no such file"):
            expand(f"{folder}/{{a,no}}.tar")
    assert expand(server.url("{b,a}.tar")) == [server.url("b.tar"), server.url("a.tar")]
    assert matches(server.url("a.tar?signature=*")) == [server.url("a.tar?signature=*")]
    assert matches(server.url("no.tar")) == []
    with pytest.raises(UserError, match="a web server cannot list files"):
        matches(server.url("*.tar"))


# --------------------------------------------------------------------------------------------------------- web servers


@pytest.mark.parametrize("fault", [status(500), status(503), status(429), reset, short], ids=["500", "503", "429", "cut", "few"])
def test_a_hiccup_passes(server: Server, fault: Fault) -> None:
    file = open_file(server.url(), access())
    assert file.size == len(DATA)
    server.faults = [fault, fault, fault]
    assert file.read(CHUNK - 5, 10) == DATA[CHUNK - 5 : CHUNK + 5]
    assert len(server.asked) == 1 + 4


def test_hiccups_while_opening(server: Server) -> None:
    server.faults = [status(503), status(500)]
    assert open_file(server.url(), access()).size == len(DATA)


@pytest.mark.parametrize("limit", ["SILENCE", "PATIENCE"])
def test_a_silent_server_is_asked_again(server: Server, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """Either limit alone ends the wait."""
    for name in ("SILENCE", "PATIENCE"):
        monkeypatch.setattr(storage, name, 0.3 if name == limit else 100.0)
    server.faults = [slow, fine, slow]
    assert open_file(server.url(), access()).read(7, 7) == DATA[7:14]


@pytest.mark.parametrize("fault", [status(503), reset, short], ids=["503", "reset", "short"])
def test_what_does_not_pass_is_no_damage(server: Server, fault: Fault) -> None:
    file = open_file(server.url(), access(retries=2))
    assert file.size
    server.faults = [fault] * 9
    with pytest.raises(ReadError, match=r"a.tar could not be read in 3 attempts; the last error: .+nothing about the file's con"):
        file.read(0, 10)
    assert len(server.asked) == 1 + 3
    server.faults = []
    assert file.read(0, 10) == DATA[:10]


def test_no_server_at_all() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port
        with pytest.raises(ReadError, match="in 2 attempts"):
            open_file(f"http://127.0.0.1:{unused.getsockname()[1]}/a.tar", access(retries=1)).read(0, 1)


@pytest.mark.parametrize(("code", "text"), [(404, "no such file"), (403, "no access .403"), (401, "no access"), (400, "refused")])
def test_what_only_the_user_can_mend_is_said_at_once(server: Server, code: int, text: str) -> None:
    server.faults = [status(code)]
    with pytest.raises(UserError, match=text) as caught:
        open_file(server.url("a.tar?X-Signature=secret"), access()).read(0, 1)
    assert not isinstance(caught.value, ReadError)
    assert "secret" not in str(caught.value)
    assert len(server.asked) == 1


@pytest.mark.parametrize("how", ["size", "etag", "shrunk", "gone"])
def test_a_file_that_changes_stops_the_run(server: Server, how: str) -> None:
    file = open_file(server.url(), access())
    assert file.read(0, 10) == DATA[:10]
    if how == "gone":
        del server.files["a.tar"]
    if how == "size":
        server.files["a.tar"] = DATA + b"more"
    if how == "shrunk":
        server.files["a.tar"] = DATA[:CHUNK]
    if how == "etag":
        server.files["a.tar"], server.etags["a.tar"] = DATA[::-1], '"two"'
    said = {"gone": "no such file", "shrunk": f"changed while in use: .* has {CHUNK} now"}
    with pytest.raises(UserError, match=said.get(how, "a.tar changed while in use")) as caught:
        file.read(3 * CHUNK, 10)
    assert not isinstance(caught.value, ReadError)


def test_a_changed_file_opened_anew_takes_nothing_from_the_cache_of_the_old(server: Server) -> None:
    assert open_file(server.url(), access()).read(0, 10) == DATA[:10]
    server.files["a.tar"], server.etags["a.tar"] = DATA[::-1], '"two"'
    assert open_file(server.url(), access()).read(0, 10) == DATA[::-1][:10]


def test_a_changed_file_in_memory_is_noticed(places: dict[str, str]) -> None:
    """fsspec's common road, without headers: asked again after every request."""
    import fsspec

    file = open_file(places["memory"], access())
    assert file.read(0, 10) == DATA[:10]
    fsspec.filesystem("memory").pipe_file("/shards/a.tar", DATA[::-1])
    with pytest.raises(UserError, match="changed while in use"):
        file.read(3 * CHUNK, 10)


def test_a_server_without_ranges_sends_a_file_once(server: Server) -> None:
    server.ranges = False
    file = open_file(server.url(), access())
    for offset in (5 * CHUNK, 0, len(DATA) - 9):
        storage.here().chunks.clear()
        assert file.read(offset, 9) == DATA[offset : offset + 9]
    assert len(server.asked) == 2  # for its size, for its bytes
    for gigabytes in (0.0, 0.0004):
        with pytest.raises(UserError, match=r"cannot send parts of a file.*data.access.cache_gb above"):
            open_file(server.url("b.tar"), access(cache_gb=gigabytes)).read(0, 9)


def test_a_whole_file_instead_of_a_part_is_cut(server: Server) -> None:
    """As caches in between do at times; also when nothing may be kept."""
    file = open_file(server.url(), access(cache_gb=0))
    assert file.size
    server.ranges = False
    assert file.read(2 * CHUNK + 1, 9) == DATA[2 * CHUNK + 1 : 2 * CHUNK + 10]
    server.files["a.tar"] = DATA[:-1]
    with pytest.raises(UserError, match="changed while in use"):
        file.read(4 * CHUNK, 9)


def test_neighbouring_chunks_come_in_one_request(server: Server) -> None:
    file = open_file(server.url(), access())
    assert file.read(4 * CHUNK, 1)
    assert file.read(0, len(DATA)) == DATA
    last = len(DATA) - 1
    spans = [(4 * CHUNK, 5 * CHUNK - 1), (0, 4 * CHUNK - 1), (5 * CHUNK, last)]
    assert [span for _, span in server.asked[1:]] == [f"bytes={start}-{end}" for start, end in spans]


# --------------------------------------------------------------------------------------------------------------- cache


def cached(home: Path) -> list[Path]:
    return sorted(path for path in (home / "cache").glob("*/*"))


def test_what_is_cached_is_not_asked_for(server: Server, home: Path) -> None:
    assert open_file(server.url(), access()).read(0, len(DATA)) == DATA
    assert len(cached(home)) == 8
    asked = len(server.asked)
    storage.forget()
    file = open_file(server.url(), access())
    assert file.read(0, len(DATA)) == DATA
    assert file.read(CHUNK - 2, 4) == DATA[CHUNK - 2 : CHUNK + 2]
    assert len(server.asked) == asked + 1  # the version alone
    assert open_file(server.url("b.tar"), access()).read(0, 4) == DATA[::-1][:4]  # another file's chunk 0 is another


def test_zero_keeps_nothing(server: Server, home: Path) -> None:
    assert open_file(server.url(), access(cache_gb=0)).read(0, 9) == DATA[:9]
    assert not (home / "cache").exists()


@pytest.mark.parametrize("how", ["flip", "flip late", "short", "long", "empty", "swapped", "table"])
def test_a_damaged_cache_file_is_fetched_again(server: Server, home: Path, how: str) -> None:
    file = open_file(server.url(), access())
    assert file.read(0, 2 * CHUNK) == DATA[: 2 * CHUNK]
    zero, one = cached(home)
    good = zero.read_bytes()
    at = {"flip": 100, "flip late": CHUNK - 1, "table": CHUNK + 3}.get(how, 0)
    bad = {"short": good[:-1], "long": good + b"x", "empty": b"", "swapped": one.read_bytes()}
    zero.write_bytes(bad.get(how, good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]))
    storage.here().chunks.clear()
    asked = len(server.asked)
    assert file.read(0, CHUNK) == DATA[:CHUNK]
    assert len(server.asked) == asked + 1
    assert zero.read_bytes() == good


def test_the_cache_stays_within_its_room_and_keeps_what_was_used_last(server: Server, home: Path) -> None:
    room = 4 * (CHUNK + 100)
    setting = access(cache_gb=room / 1e9)
    file = open_file(server.url(), setting)
    for number in [0, 1, 2, 3, 0, 4, 5, 0, 6, 7]:
        storage.here().chunks.clear()
        for age, path in enumerate(sorted(cached(home), key=lambda path: -path.stat().st_mtime), start=1):
            os.utime(path, (time.time() - 100 * age,) * 2)  # older than the minute within which a use is not noted
        assert file.read(number * CHUNK, 10) == DATA[number * CHUNK :][:10]
        assert sum(path.stat().st_size for path in cached(home)) <= room
    names = {path.name for path in cached(home)}
    assert {"0", "7"} <= names
    assert [span for _, span in server.asked].count(f"bytes=0-{CHUNK - 1}") == 1
    assert "1" not in names


def test_a_lost_count_and_a_dead_writers_rest_are_cleared_up(server: Server, home: Path) -> None:
    setting = access(cache_gb=3 * (CHUNK + 100) / 1e9)
    file = open_file(server.url(), setting)
    assert file.read(0, 2 * CHUNK)
    rest = cached(home)[0].with_name("9.dead.partial")
    rest.write_bytes(bytes(CHUNK))
    os.utime(rest, (0, 0))
    (home / "cache" / "usage").unlink()
    assert file.read(2 * CHUNK, 2 * CHUNK) == DATA[2 * CHUNK : 4 * CHUNK]
    assert not rest.exists()
    assert sum(path.stat().st_size for path in cached(home)) <= setting.capacity


def test_a_full_disk_ends_caching_with_one_warning(
    server: Server, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = open_file(server.url(), access())
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "write", full)
        assert file.read(0, 10) == DATA[:10]
        assert file.read(3 * CHUNK, 10) == DATA[3 * CHUNK :][:10]
    said = capsys.readouterr().err
    assert said.count("nothing more is cached") == 1
    assert "data.access.cache_dir" in said
    assert cached(home) == []


READER = """
import sys
from data_pipelines import storage
storage.PAUSE = 0.001
url, folder, seed, chunk, room = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
file = storage.open_file(url, storage.Access(cache_dir=folder, chunk_mb=chunk / 2**20, cache_gb=room / 1e9))
data = open(sys.argv[6], "rb").read()
for step in range(60):
    storage.here().chunks.clear()
    offset = (seed * 7919 + step * 104729) % file.size
    assert file.read(offset, 70000) == data[offset : offset + 70000], offset
    if step % 10 == 0:
        print(storage.here().full, flush=True)
"""


def test_two_processes_share_a_cache(server: Server, tmp_path: Path) -> None:
    """With less room than both want, so that each removes what the other wrote."""
    (tmp_path / "data").write_bytes(DATA)
    room = 5 * (CHUNK + 100)
    command = [sys.executable, "-c", READER, server.url(), str(tmp_path / "shared")]
    rest = [str(CHUNK), str(room), str(tmp_path / "data")]
    children = [
        subprocess.Popen([*command, seed, *rest], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for seed in "12"
    ]
    for child in children:
        out, err = child.communicate(timeout=40)
        assert child.returncode == 0, err
        assert set(out.split("\n")) == {"set()", ""}, err
    assert sum(path.stat().st_size for path in (tmp_path / "shared").glob("*/*")) <= room
    assert not list((tmp_path / "shared").glob("*/*.partial"))


# ------------------------------------------------------------------------------------------------------------ processes


def in_a_child(work: Callable[[], None]) -> None:
    """Fork, work, and require success within 20 s."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_fork_after_use_reads_on(places: dict[str, str]) -> None:
    for url in places.values():
        file = open_file(url, access(cache_gb=0))
        assert file.read(0, 9) == DATA[:9]

        def work(file: storage.ShardFile = file) -> None:
            for number in (5, 2, 0):
                assert file.read(number * CHUNK, 9) == DATA[number * CHUNK :][:9]
            file.close()

        in_a_child(work)
        in_a_child(work)
        assert file.read(6 * CHUNK, 9) == DATA[6 * CHUNK :][:9]


def test_pickled_files_insist_on_the_version_they_were_opened_with(places: dict[str, str], server: Server) -> None:
    for url in places.values():
        file = open_file(url, access(retries=0))
        assert file.read(3, 9) == DATA[3:12]
        copy = pickle.loads(pickle.dumps(file))
        assert copy.read(3, 9) == DATA[3:12]
        copy.close()
        assert file.read(5, 9) == DATA[5:14]
    file = open_file(server.url("b.tar"), access(cache_gb=0))
    assert file.size
    copy = pickle.loads(pickle.dumps(file))
    server.etags["b.tar"] = '"two"'
    with pytest.raises(UserError, match="changed while in use"):
        copy.read(0, 1)


def test_importing_and_local_reading_need_no_driver(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(DATA)
    code = (
        "import sys; from data_pipelines.storage import open_file; open_file(sys.argv[1]).read(0, 9);"
        "assert not {'fsspec', 'aiohttp', 'torch', 's3fs'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.tar")], check=True, timeout=30)


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.registry import _registry

    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)  # a test before may have loaded the driver
    with pytest.raises(UserError, match=r"s3://.*pip install 'mm1-ablations\[remote\]'"):
        open_file("s3://bucket/a.tar", access()).read(0, 1)
    with pytest.raises(UserError, match="Protocol not known"):
        open_file("nonsense://a.tar", access()).read(0, 1)


# ---------------------------------------------------------------------------------------------------------- local files


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENETDOWN])
def test_a_local_hiccup_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    (tmp_path / "a.tar").write_bytes(DATA)
    pread, failures, handles = os.pread, [number, number, None], []

    def failing(handle: int, size: int, offset: int) -> bytes:
        handles.append(handle)
        if failures and (failure := failures.pop(0)):
            raise OSError(failure, os.strerror(failure))
        return pread(handle, min(size, 1000), offset)  # and short reads, which are allowed

    monkeypatch.setattr(storage.os, "pread", failing)
    opened: list[object] = []
    open_ = os.open
    monkeypatch.setattr(storage.os, "open", lambda *args, **kwargs: opened.append(args) or open_(*args, **kwargs))
    file = open_file(tmp_path / "a.tar", access())
    assert file.read(500, 5000) == DATA[500:5500]
    assert len(opened) == 3  # a stale handle would have failed for ever
    failures[:] = [number] * 9
    with pytest.raises(ReadError, match=f"in 4 attempts.*{re.escape(os.strerror(number))}"):
        file.read(0, 1)
    failures.clear()
    assert file.read(0, 1) == DATA[:1]


def test_a_local_file_that_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(DATA)
    file = open_file(path, access(retries=0))
    assert file.size == len(DATA)
    with monkeypatch.context() as patch:  # the file is whole, but the read comes back with nothing: a hiccup
        patch.setattr(storage.os, "pread", lambda *_: b"")
        with pytest.raises(ReadError, match="nothing came at byte 0"):
            file.read(0, 5)
    os.truncate(path, 1000)
    with pytest.raises(UserError, match="changed while in use: it had 480000 bytes when it was opened and has 1000 now"):
        file.read(900, 200)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_local_file_that_must_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(DATA)
    (tmp_path / "a.tar").chmod(0)
    with pytest.raises(UserError, match="not permitted"):
        open_file(tmp_path / "a.tar").read(0, 1)


def test_descriptors_are_given_back(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(DATA)

    def descriptors() -> int:
        links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return sum(os.path.realpath(link) == str(tmp_path / "a.tar") for link in links)

    files = [open_file(tmp_path / "a.tar") for _ in range(5000)]
    assert descriptors() == 0
    assert files[0].read(0, 1) == files[1].read(0, 1)
    assert descriptors() == 2
    files[0].close()
    assert descriptors() == 1
    del files
    assert descriptors() == 0


# ------------------------------------------------------------------------------------------------------------------- S3


class Proxy(BaseHTTPRequestHandler):
    """In front of an S3 server; every second GET of an object fails with status `failure`; -1: two of three get no answer."""

    protocol_version = "HTTP/1.1"
    behind, failure, count, asked = "", 0, 0, 0

    def log_message(self, *_: object) -> None:
        pass

    def forward(self) -> None:
        cls = type(self)
        cls.asked += 1
        if self.command == "GET" and "?" not in self.path:
            cls.count += 1
            if cls.failure < 0 and cls.count % 3:  # two in a row, because aiohttp itself asks again once on a connection it kept
                self.close_connection = True
                return
            if cls.failure > 0 and cls.count % 2:
                self.send_response(cls.failure)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        headers = {key: value for key, value in self.headers.items() if key.lower() not in ("connection", "accept-encoding")}
        request = urllib.request.Request(cls.behind + self.path, headers=headers, method=self.command)
        try:
            answer = urllib.request.urlopen(request, timeout=10)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            body = answer.read()
            self.send_response(answer.status)
            for key, value in answer.headers.items():
                if key.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(key, value)
            self.send_header("Content-Length", answer.headers.get("Content-Length", str(len(body))))
            self.end_headers()
            self.wfile.write(body)

    do_GET = do_HEAD = forward


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Any, type[Proxy]]]:
    """(a boto3 client of the server itself, the proxy's class); s3:// goes through the proxy."""
    pytest.importorskip("s3fs", reason="pip install 'mm1-ablations[remote]'")
    moto = pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
    import boto3
    import fsspec

    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3 = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    s3.start()
    host, port = s3.get_host_and_port()
    proxy = type("ThisProxy", (Proxy,), {"behind": f"http://{host}:{port}"})
    for front in serving(ThreadingHTTPServer(("127.0.0.1", 0), proxy)):
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://127.0.0.1:{front.server_port}"})
        client = boto3.client("s3", endpoint_url=proxy.behind)
        client.create_bucket(Bucket="shards")
        client.put_object(Bucket="shards", Key="in/a.tar", Body=DATA)
        client.put_object(Bucket="shards", Key="in/b.tar", Body=DATA[::-1])
        yield client, proxy
    s3.stop()


def test_s3(bucket: tuple[Any, type[Proxy]]) -> None:
    """One server for all of it: starting one costs seconds."""
    client, proxy = bucket
    assert matches("s3://shards/in/*.tar") == ["s3://shards/in/a.tar", "s3://shards/in/b.tar"]
    proxy.failure = 503
    file = open_file("s3://shards/in/a.tar", access())
    for offset, size in [(0, 9), (CHUNK - 5, 10), (len(DATA) - 9, 99), (3 * CHUNK, 3 * CHUNK)]:
        assert file.read(offset, size) == DATA[offset : offset + size]
    asked = proxy.asked
    assert file.read(3 * CHUNK, CHUNK) == DATA[3 * CHUNK : 4 * CHUNK]
    assert proxy.asked == asked
    in_a_child(lambda: None if open_file("s3://shards/in/b.tar", access()).read(9, 9) == DATA[::-1][9:18] else os._exit(3))
    with pytest.raises(ReadError, match=r"s3://shards/in/b.tar could not be read in 1 attempts"):
        open_file("s3://shards/in/b.tar", access(retries=0, cache_gb=0)).read(5 * CHUNK, 9)
    proxy.failure, proxy.count = -1, 0
    with pytest.raises(ReadError, match="in 1 attempts"):  # s3fs does not try again on its own account
        open_file("s3://shards/in/b.tar", access(retries=0, cache_gb=0)).read(5 * CHUNK, 9)
    assert open_file("s3://shards/in/b.tar", access(cache_gb=0)).read(5 * CHUNK, 9) == DATA[::-1][5 * CHUNK :][:9]
    proxy.failure = 0
    for name in ("s3://shards/in/no.tar", "s3://nowhere/a.tar"):
        assert not exists(name, access())
    proxy.failure, proxy.count = 403, 0
    with pytest.raises(UserError, match=r"no access .*AWS_ACCESS_KEY_ID.*FSSPEC_S3_ENDPOINT_URL"):
        open_file("s3://shards/in/b.tar", access(cache_gb=0)).read(7 * CHUNK, 9)
    proxy.failure = 0
    client.put_object(Bucket="shards", Key="in/a.tar", Body=DATA[::-1])  # of the same size
    with pytest.raises(UserError, match="changed while in use: its version was"):
        file.read(2 * CHUNK, 9)


def test_s3_without_credentials(bucket: tuple[Any, type[Proxy]], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match=r"no access .*AWS_ACCESS_KEY_ID") as caught:
        open_file("s3://shards/in/a.tar", access()).read(0, 1)
    assert not isinstance(caught.value, ReadError)
