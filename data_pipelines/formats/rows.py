"""Rows of jsonl, jsonl.gz (json.gz), jsonl.zst and parquet files: streamed, in order, in bounded memory.

    container(path)      what the file is, by its first bytes: tar, jsonl, gzip, zstd or parquet
    read_rows(path)      (name of the row, its fields, bytes of the file read so far)

Files come from strangers: a line, the unpacked size of a compressed file and its window are capped, and a compressed file
that ends too early is an error, not a shorter corpus. Parquet and zstd need the extra `formats`.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from configs.errors import UserError

MAX_LINE_BYTES = 256_000_000
"""A record with dozens of pictures in base64 has tens of megabytes."""
MAX_RATIO = 250
"""Times a compressed file may grow, beyond SLACK_BYTES; text grows by 3 to 20, a decompression bomb by 1,000 and more."""
SLACK_BYTES = 64_000_000
ZSTD_WINDOW_BYTES = 2**27
"""zstd's own default limit; files made with --long=28 and above need more memory than it grants."""
ZSTD_PIECE = 4096
"""Compressed bytes handed over at once: at zstd's best rate (a block of 128 KiB in 4 bytes) they make 134 MB."""
PARQUET_BATCH = 32
"""Rows turned into Python objects at once."""


def container(path: Path) -> str:
    """Raises UserError for an empty file, a packed tar, an archive or anything else that holds no rows."""
    with open(path, "rb") as file:
        head = file.read(512)
    if head[:2] == b"\x1f\x8b":
        if _is_tar(_gzip_head(path)):
            raise UserError(f"{path} is a compressed tar; reading it needs a plain one. Unpack it: gunzip {path}")
        return "gzip"
    if head[:4] == b"\x28\xb5\x2f\xfd":
        return "zstd"
    if head[:4] == b"PAR1":
        return "parquet"
    if _is_tar(head) or path.suffix == ".tar":
        return "tar"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:1] == b"{":
        return "jsonl"
    if start[:1] == b"[":
        raise UserError(f"{path} is one JSON array; rows are read one a line. Rewrite it: jq -c '.[]' {path} > rows.jsonl")
    if head[:4] == b"PK\x03\x04":
        raise UserError(f"{path} is a zip archive. Unpack it: unzip {path}")
    if not start:
        raise UserError(f"{path}: holds no samples. Leave it out.")
    raise UserError(f"{path} is no tar, jsonl, jsonl.gz, jsonl.zst or parquet file; it begins with {head[:16]!r}.")


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def _gzip_head(path: Path) -> bytes:
    try:
        with gzip.open(path, "rb") as file:
            return file.read(512)
    except (OSError, EOFError, zlib.error):
        return b""  # the reader names what is wrong


def read_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, Any] | UserError, int]]:
    """(row, fields, bytes read so far); a row is named "line 3" (from 1, as editors count) or, of parquet, "row 2" (from 0).

    `columns` are those that parquet reads, of the ones that are there; lines always have all. A line that is no JSON object is
    handed over as the UserError that names it, and the next one follows. Raises UserError for a file that is damaged or ends too
    early.
    """
    kind = container(path)
    if kind == "parquet":
        yield from _parquet(path, columns)
        return
    with open(path, "rb") as file:
        for number, line in enumerate(_lines(path, _pieces(path, file, kind)), 1):
            if not line.strip():
                continue
            row: dict[str, Any] | UserError
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    row = UserError(f"{path}:line {number}: must be a JSON object, and is {type(row).__name__}.")
            except (ValueError, RecursionError) as error:
                row = UserError(f"{path}:line {number}: no JSON ({error}). Correct the line, or take it out.")
            yield f"line {number}", row, file.tell()


def _lines(path: Path, pieces: Iterator[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    size = 0
    for piece in pieces:
        *whole, last = piece.split(b"\n")
        for line in whole:
            yield b"".join([*rest, line])
            rest, size = [], 0
        rest.append(last)
        size += len(last)
        if size > MAX_LINE_BYTES:
            raise UserError(f"{path}: a line of more than {MAX_LINE_BYTES:,} bytes. Is it one JSON object a line?")
    if size:
        yield b"".join(rest)


def _pieces(path: Path, file: BinaryIO, kind: str) -> Iterator[bytes]:
    if kind == "jsonl":
        yield from iter(lambda: file.read(1 << 20), b"")
        return
    unpacked = 0
    for piece in (_gzip if kind == "gzip" else _zstd)(path, file):
        unpacked += len(piece)
        if unpacked > MAX_RATIO * file.tell() + SLACK_BYTES:
            raise UserError(f"{path}: unpacks to more than {MAX_RATIO} times its size; refused as a decompression bomb.")
        yield piece


def _gzip(path: Path, file: BinaryIO) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file, mode="rb") as stream:
            yield from iter(lambda: stream.read(1 << 18), b"")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: the gzip stream is damaged or ends too early ({error}). Bring the file again.") from error


def _zstd(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """By hand rather than by zstandard's stream_reader, which takes a frame that is cut off for the end of the file."""
    try:
        import zstandard
    except ImportError:
        raise needs_extra(path, "zstandard") from None

    def fresh() -> Any:
        return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj()

    frame, open_frame = fresh(), False
    try:
        while piece := file.read(ZSTD_PIECE):
            while piece:
                unpacked, open_frame = frame.decompress(piece), True
                if unpacked:
                    yield unpacked
                piece = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame, open_frame = fresh(), False
    except zstandard.ZstdError as error:
        raise UserError(
            f"{path}: the zstd stream is damaged, or its window is above {ZSTD_WINDOW_BYTES >> 20} MiB ({error}). Bring the file "
            "again, or repack it without --long."
        ) from error
    if open_frame:
        raise UserError(f"{path}: the zstd stream ends too early. Bring the file again.")


def _parquet(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, dict[str, Any], int]]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise needs_extra(path, "pyarrow") from None

    size, number = path.stat().st_size, 0
    try:
        # pre_buffer would hold a row group's packed columns whole, which in some corpora is the whole file
        with ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            names = file.schema_arrow.names
            chosen = [name for name in names if columns is None or name in columns]
            if not chosen:
                raise UserError(f"{path}: has the columns {', '.join(names)}; looked for {', '.join(columns or ())}.")
            if _declared_bytes(file.metadata, chosen) > MAX_RATIO * size + SLACK_BYTES:
                raise UserError(f"{path}: unpacks to more than {MAX_RATIO} times its size; refused as a decompression bomb.")
            for batch in file.iter_batches(batch_size=PARQUET_BATCH, columns=chosen, use_threads=False):
                for row in batch.to_pylist():
                    yield f"row {number}", row, size * (number + 1) // file.metadata.num_rows
                    number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the parquet file is damaged at or after row {number} ({error}). Bring it again.") from error


def _declared_bytes(metadata: Any, columns: Sequence[str]) -> int:
    """Unpacked size of the columns, as the file's own footer has it: it stops careless files, not one whose footer lies."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    chunks = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns)


def needs_module(path: Path, kind: str) -> None:
    """Raises UserError when files of this container need a module that is not installed."""
    module = {"zstd": "zstandard", "parquet": "pyarrow"}.get(kind)
    if module is not None and importlib.util.find_spec(module) is None:
        raise needs_extra(path, module)


def needs_extra(path: Path, module: str) -> UserError:
    return UserError(f"{path}: reading it needs {module}. Install it: pip install 'mm1-ablations[formats]'")
