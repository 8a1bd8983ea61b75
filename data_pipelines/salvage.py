"""Salvage: every member of a tar that can still be found, and every region between them that is lost.

    bytes -> members and damages -> samples and damages
             scan                   samples

The reader of training (shards.py) stops at the first damage. This one looks for the next block that is a header (on a 512-byte
border, with a valid checksum) and goes on from there; what stands on the two sides of a damaged region is never joined into one
sample, even under one key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from data_pipelines.shards import BLOCK, pax_records, tar_number

CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    header: int
    body: int
    size: int


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes [start, end) of a shard that give no member; `member` where a truncated one can still be named."""

    start: int
    end: int
    reason: str
    member: str | None = None


def scan(file: BinaryIO, total: int) -> Iterator[Member | Damage]:
    """Every regular member of a tar that can still be found, and every region between them that is lost."""
    position, after_damage = 0, False
    long_name: str | None = None
    pax: dict[str, str] = {}
    while True:
        if position + BLOCK > total:
            start = min(position, total)
            left = f" ({total - start} bytes of a header are left)" if total > start else ""
            yield Damage(start, total, f"truncated{left}: the two closing blocks of the tar are missing")
            return
        header = read_at(file, position, BLOCK)
        parsed = parse(header)
        if parsed is None:
            following = next_header(file, position + BLOCK, total)
            if following is None:
                yield from ending(file, position, total, header)
                return
            empty = header == bytes(BLOCK)
            reason = "empty blocks where a header should stand" if empty else "damaged header"
            yield Damage(position, following, f"{reason}; {following - position} bytes are lost up to the next valid header")
            position, after_damage, long_name, pax = following, True, None, {}
            continue
        kind, size = parsed
        size = int(pax.get("size", size))
        body, name = position + BLOCK, long_name or pax.get("path") or short_name(header)
        if body + size > total:
            there = f"{name} has {size} bytes, {total - body} are there"
            yield Damage(position, total, f"truncated: {there}", name if kind in (b"0", b"\0") else None)
            return
        end = body + (size + BLOCK - 1) // BLOCK * BLOCK
        if kind == b"L":
            long_name = read_at(file, body, size).rstrip(b"\0").decode("utf-8", "replace")
        elif kind == b"x":
            try:
                pax = pax_records(read_at(file, body, size))
                int(pax.get("size", 0))
            except ValueError:
                yield Damage(position, end, "damaged PAX header: the next member's name and size are not known for certain")
                pax, after_damage = {}, True
        else:
            if kind in (b"0", b"\0"):
                if after_damage and not long_name and "path" not in pax and 0 not in header[:100]:
                    # The lost region may have held this member's long name; under a shortened one it could join a wrong sample.
                    yield Damage(
                        position, end, f"the name {name} may be cut short: what was lost before it may have held the rest"
                    )
                else:
                    yield Member(name, position, body, size)
            long_name, pax, after_damage = None, {}, False
        position = end


def ending(file: BinaryIO, position: int, total: int, header: bytes) -> Iterator[Damage]:
    """What is wrong with the end of a shard, from the first block on after which no header follows."""
    closing = last_data(file, position, total)
    if header != bytes(BLOCK):
        yield Damage(position, closing, f"damaged header; no valid one follows, {closing - position} bytes are lost")
        if total - closing < 2 * BLOCK or total % BLOCK:
            yield Damage(closing, total, "truncated: the two closing blocks of the tar are missing")
    elif closing > position:
        yield Damage(position, closing, f"{closing - position} bytes after the closing blocks, and no header among them")
    elif total - position < 2 * BLOCK:
        yield Damage(position, total, "truncated: one of the two closing blocks of the tar is missing")


def parse(header: bytes) -> tuple[bytes, int] | None:
    """(type, size) of a header block, None where the checksum is wrong."""
    try:
        size, checksum = tar_number(header[124:136]), tar_number(header[148:156])
    except ValueError:
        return None
    return (header[156:157], size) if sum(header) - sum(header[148:156]) + 8 * 32 == checksum else None


def short_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0].decode("utf-8", "replace")
    prefix = header[345:500].split(b"\0", 1)[0].decode("utf-8", "replace") if header[257:262] == b"ustar" else ""
    return f"{prefix}/{name}" if prefix else name


def next_header(file: BinaryIO, start: int, total: int) -> int | None:
    """Position of the first block from `start` on that is a header: valid checksum, known type, a name."""
    for at in range(start, total, CHUNK):
        chunk = read_at(file, at, min(CHUNK, total - at))
        if not chunk.strip(b"\0"):
            continue
        for offset in range(0, len(chunk) - BLOCK + 1, BLOCK):
            block = chunk[offset : offset + BLOCK]
            if block[0] and block[156:157] in b"\x0001234567xgLKS" and parse(block):
                return at + offset
    return None


def last_data(file: BinaryIO, start: int, total: int) -> int:
    """Where the zeros begin that reach to the end of the file, on a block's border; at least `start`."""
    end = start
    for at in range(start, total, CHUNK):
        if kept := read_at(file, at, min(CHUNK, total - at)).rstrip(b"\0"):
            end = at + len(kept)
    return min(total, start + (end - start + BLOCK - 1) // BLOCK * BLOCK)


def read_at(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size)


@dataclass
class Sample:
    """Members that stand side by side under one key: extension -> (offset, size). `cut`: one of them reaches past the end."""

    key: str
    start: int
    end: int = 0
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    cut: bool = False


def samples(file: BinaryIO, total: int) -> Iterator[Sample | Damage]:
    """Samples and damaged regions in the shard's order; a region ends the sample before it."""
    current: Sample | None = None
    for item in scan(file, total):
        key, extension = split_name(item.name if isinstance(item, Member) else item.member or "")
        if isinstance(item, Damage):
            if current and item.member and key == current.key:
                current.cut = True
            if current:
                yield current
            current = None
            yield item
            continue
        if current is None or key != current.key or extension in current.members:
            if current:
                yield current
            current = Sample(key, item.header)
        current.members[extension] = (item.body, item.size)
        current.end = item.body + item.size
    if current:
        yield current


def split_name(name: str) -> tuple[str, str]:
    """(key, extension): cut at the first dot of the last path component, as shards.index_shard does."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension
