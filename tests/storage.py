"""What the tests of storage share: servers on the loopback that fail on demand, small chunks, short pauses.

The servers are real ones: http.server with Range written out below, moto for S3 (skipped where it is not installed).
"""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.storage import Access, remote, retry, web
from data_pipelines.storage.process import forget

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
    monkeypatch.setattr(retry, "PAUSE", 0.001)
    monkeypatch.setattr(web, "SILENCE", 5.0)
    monkeypatch.setattr(remote, "PATIENCE", 15.0)

    def stuck(*_: object) -> None:
        raise AssertionError("the test hangs")

    before = signal.signal(signal.SIGALRM, stuck)
    signal.alarm(60)
    forget()
    yield
    forget()
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def access(**changes: Any) -> Access:
    return Access(**({"chunk_mb": CHUNK / 2**20, "cache_gb": ROOMY, "retries": 3} | changes))


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


# --------------------------------------------------------------------------------------------------------- web servers

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
