"""Files of plain web servers.

They get requests of our own: fsspec's cat_file gives no headers, and they say which version the bytes are of and whether Range
was heard. A server that does not hear it sends the whole file, which is then kept whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from configs.errors import UserError
from data_pipelines.storage.file import changed
from data_pipelines.storage.names import shown
from data_pipelines.storage.process import here
from data_pipelines.storage.remote import RemoteFile, Version, filesystem, stamp_of, waited
from data_pipelines.storage.retry import Hiccup

SILENCE = 60.0
"""Seconds without a byte after which an HTTP request counts as failed."""


class WebFile(RemoteFile):
    """A file of a web server, http or https."""

    def _request(self, headers: Mapping[str, str], handle: Callable[[Any], Any]) -> Any:
        """What `handle` makes of the answer, whose status is 200, 206 or 416."""
        import aiohttp

        fs = filesystem(self.name)

        async def request() -> Any:
            session = await fs.set_session()
            options = dict(fs.kwargs)
            options["headers"] = dict(options.get("headers") or {}) | {"Accept-Encoding": "identity"} | dict(headers)
            options.setdefault("timeout", aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE))
            async with session.get(fs.encode_url(self.name), **options) as answer:
                if answer.status not in (200, 206, 416):
                    answer.raise_for_status()
                    raise Hiccup(f"the server answers {answer.status} {answer.reason}")
                return await handle(answer)

        return waited(fs, request)

    def _ask(self) -> Version:
        """Asked with a GET of one byte and not with HEAD: signed URLs allow only GET, and the answer shows if Range works."""

        async def handle(answer: Any) -> Version:
            stamp = stamp_of(answer.headers)
            total = answer.headers.get("Content-Range", "").rpartition("/")[2]
            if answer.status in (206, 416) and total.isdigit():
                return Version(int(total), stamp)
            length = answer.headers.get("Content-Length", "")
            if answer.status != 200 or not length.isdigit() or answer.headers.get("Content-Encoding", "identity") != "identity":
                raise UserError(f"{shown(self.name)}: the server does not say how large it is. Copy the shard to this machine.")
            answer.close()  # the whole file is on its way
            return Version(int(length), stamp, ranges=int(length) <= 1)

        return self._request({"Range": "bytes=0-0"}, handle)

    def _fetch(self, run: range) -> dict[int, bytes]:
        if self.version.ranges:
            return self._get(run)
        if not self.cache.takes(self.size):
            raise UserError(
                f"{shown(self.name)}: the server cannot send parts of a file, so that every read would fetch all of its "
                f"{self.size / 1e9:.2f} GB, and the cache at {self.cache.folder} cannot keep it whole. Set data.access.cache_gb "
                f"above that (it is {self.access.cache_gb:g}) on a disk with room, or copy the shards to this machine."
            )
        with self.cache.lock(f"{self._key}.lock"):  # one process fetches the file, the others find it in the cache
            kept = {number: self.cache.get(self._key, number, self._length(number), 0, self._length(number)) for number in run}
            if all(data is not None for data in kept.values()):
                return {number: data for number, data in kept.items() if data is not None}
            return self._get(run)

    def _get(self, run: range) -> dict[int, bytes]:
        start, end = self._span(run)

        async def handle(answer: Any) -> dict[int, bytes]:
            if answer.status == 206:
                found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers.get("Content-Range", "").strip())
                if not found or int(found[1]) != start:
                    raise Hiccup(f"for bytes {start}-{end - 1} came {answer.headers.get('Content-Range')!r}")
                self.version.require(self.name, int(found[3]) if found[3] != "*" else None, self._stamp(answer))
                data = await answer.read()
                if len(data) != end - start:
                    raise Hiccup(f"{len(data)} bytes came for bytes {start}-{end - 1}")
                return self._split(run, data)
            if answer.status == 416:
                total = answer.headers.get("Content-Range", "").rpartition("/")[2]
                raise changed(self.name, f"it had {self.size} bytes when it was opened and has {total or 'fewer'} now")
            return await self._whole(answer, run)

        return self._request({"Range": f"bytes={start}-{end - 1}"}, handle)

    async def _whole(self, answer: Any, run: range) -> dict[int, bytes]:
        """Range was not heard and the whole file comes: keep all of it on disk as it passes, and of it only `run` in memory."""
        length = answer.headers.get("Content-Length", "")
        self.version.require(self.name, int(length) if length.isdigit() else None, self._stamp(answer))
        wanted: dict[int, bytes] = {}
        number, buffer, store = 0, bytearray(), self.cache.takes(self.size)
        async for piece in answer.content.iter_any():
            buffer += piece
            while number * self.access.chunk < self.size and len(buffer) >= (length_now := self._length(number)):
                data, buffer = bytes(buffer[:length_now]), buffer[length_now:]
                if number in run:
                    wanted[number] = data
                    here().remember((self._key, number), data)
                if store:
                    self.cache.put(self._key, number, data)
                number += 1
        if number * self.access.chunk < self.size or buffer:
            raise Hiccup(f"the body does not have the {self.size} bytes it should have")
        return wanted

    def _stamp(self, answer: Any) -> str:
        """The answer's stamp if it is of the kind that was there at opening: an ETag cannot be compared with a time."""
        stamp = stamp_of(answer.headers)
        return stamp if stamp.partition(" ")[0] == self.version.stamp.partition(" ")[0] else ""
