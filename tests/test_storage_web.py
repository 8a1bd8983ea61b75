"""Web servers: hiccups pass or are said to be hiccups, files that change stop the run, and Range may go unheard."""

# ruff: noqa: F811 (a fixture's name is both an import and an argument)
from __future__ import annotations

import socket

import pytest

from configs.errors import UserError
from data_pipelines.storage import ReadError, open_file, remote, web
from data_pipelines.storage.process import here
from tests.storage import CHUNK, DATA, Fault, Handler, Server, access, fine, quick, reset, server, short, slow, status  # noqa: F401 (fixtures)


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
    for module, name in ((web, "SILENCE"), (remote, "PATIENCE")):
        monkeypatch.setattr(module, name, 0.3 if name == limit else 100.0)
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


def test_a_server_without_ranges_sends_a_file_once(server: Server) -> None:
    server.ranges = False
    file = open_file(server.url(), access())
    for offset in (5 * CHUNK, 0, len(DATA) - 9):
        here().chunks.clear()
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


def of_no_length(body: bytes) -> Fault:
    """The whole file instead of a part, by a server that does not say how much it sends."""

    def fault(handler: Handler) -> bool:
        handler.send_response(200)
        handler.send_header("ETag", '"one"')
        handler.send_header("Connection", "close")  # also sets handler.close_connection: the body ends where the connection does
        handler.end_headers()
        handler.wfile.write(body)
        return True

    return fault


@pytest.mark.parametrize("body", [DATA[: 3 * CHUNK], DATA[:-1], DATA + b"more"], ids=["whole chunks too few", "short", "long"])
def test_a_whole_file_of_another_size_is_a_hiccup(server: Server, body: bytes) -> None:
    file = open_file(server.url(), access(cache_gb=0))
    assert file.size
    server.faults = [of_no_length(body)] * 2 + [of_no_length(DATA)]
    assert file.read(0, 9) == DATA[:9]
    assert len(server.asked) == 1 + 3


def test_another_part_than_was_asked_for_is_a_hiccup(server: Server) -> None:
    def elsewhere(handler: Handler) -> bool:
        headers = {"Content-Range": f"bytes {CHUNK}-{2 * CHUNK - 1}/{len(DATA)}", "ETag": '"one"'}
        handler.answer(206, headers, DATA[CHUNK : 2 * CHUNK])
        return True

    file = open_file(server.url(), access())
    assert file.size
    server.faults = [elsewhere]
    assert file.read(0, 9) == DATA[:9]


def test_neighbouring_chunks_come_in_one_request(server: Server) -> None:
    file = open_file(server.url(), access())
    assert file.read(4 * CHUNK, 1)
    assert file.read(0, len(DATA)) == DATA
    last = len(DATA) - 1
    spans = [(4 * CHUNK, 5 * CHUNK - 1), (0, 4 * CHUNK - 1), (5 * CHUNK, last)]
    assert [span for _, span in server.asked[1:]] == [f"bytes={start}-{end}" for start, end in spans]
