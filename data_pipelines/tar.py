"""Tars read by their bytes: every member that can be found, every region that gives none, and the samples they make up.

    bytes -> members and damages -> samples and damages
             scan                   samples

A damaged header does not end the shard: the scan goes on at the next block that is a header, on a 512-byte border or wherever the
magic of one stands, since bytes may have been lost or doubled. A sample is a run of neighbouring members whose names agree up to
the first dot; what stands on the two sides of a damage is never joined, even under one key, nor are members that repeat
themselves in no order. So no image can meet the caption of another.

Shards come from anywhere: sizes, names and numbers are checked before they are believed, links and devices are not followed, and
every step moves forward.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from data_pipelines.storage import ShardFile

BLOCK = 512
WINDOW = 1 << 20
"""Bytes read at a time while looking for the next header."""
MAX_NAME_BYTES = 1 << 16
"""Of a GNU long name or a PAX header; more is no name but a trap for memory."""
MAX_MEMBER_BYTES = (1 << 32) - 1
REGULAR = (b"0", b"\0", b"7")
KNOWN = b"\x0001234567xgLKSAVMND"
"""Type letters that a header found after a damage may have."""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file: its body at [offset, offset + size), its header in the block before; `check`: that block's CRC."""

    name: str
    start: int
    """Where the member begins: its header, or the header that holds its long name."""
    offset: int
    size: int
    check: int

    @property
    def end(self) -> int:
        return self.offset + (self.size + BLOCK - 1) // BLOCK * BLOCK


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes [start, end) of a shard that give no sample; `key` where the sample they belonged to is known."""

    start: int
    end: int
    reason: str
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """Members that stand side by side under one key, by extension (all of the name behind its first dot, in lower case)."""

    key: str
    members: dict[str, Member]

    @property
    def start(self) -> int:
        return next(iter(self.members.values())).start

    @property
    def end(self) -> int:
        last = next(reversed(self.members.values()))
        return last.offset + last.size


def split_name(name: str) -> tuple[str, str]:
    """(key, extension in lower case), cut at the first dot of the last path component, as webdataset does."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def read_members(file: ShardFile, sample: Sample) -> dict[str, bytes]:
    """extension -> content, read now and all of it."""
    return {extension: file.read(member.offset, member.size) for extension, member in sample.members.items()}


# ----------------------------------------------------------------------------------------------------------------- samples


def samples(file: ShardFile) -> Iterator[Sample | Damage]:
    """Samples and damaged regions in the order of the shard."""
    run: list[Member] = []
    run_key = ""
    for item in scan(file):
        if isinstance(item, Damage):
            if run and item.key == run_key:  # the sample's last member is cut off, so the whole of it is lost
                yield Damage(run[0].start, item.end, item.reason, run_key)
            else:
                yield from grouped(run_key, run)
                yield item
            run = []
            continue
        key, _ = split_name(item.name)
        if run and key != run_key:
            yield from grouped(run_key, run)
            run = []
        run_key = key
        run.append(item)
    yield from grouped(run_key, run)


def grouped(key: str, run: list[Member]) -> Iterator[Sample | Damage]:
    """A run of members under one key as samples: one, or several that repeat the same extensions in the same order.

    A repetition in another order (txt, jpg, txt) can be read in two ways, and one of them pairs what does not belong together.
    """
    extensions = [split_name(member.name)[1] for member in run]
    width = next((i for i in range(1, len(run)) if extensions[i] in extensions[:i]), len(run))
    if extensions != (extensions[:width] * len(run))[: len(run)] or len(run) % max(width, 1):
        listed = ", ".join(extensions[:8])
        yield Damage(run[0].start, run[-1].end, f"members repeat in no order ({listed}): which belong together is unknown", key)
        return
    for first in range(0, len(run), width or 1):
        yield Sample(key, dict(zip(extensions[:width], run[first : first + width], strict=True)))


# ----------------------------------------------------------------------------------------------------------------- members


def scan(file: ShardFile) -> Iterator[Member | Damage]:
    """Every regular member of a tar that can still be found, and every region between them that is lost.

    A member is believed when a header follows it and none stands inside it. Where bytes were lost in its body, or its size is
    wrong, the next header is before its end; the scan then goes on there, and the member is a damage.
    """
    total = file.size
    position, start, after_damage = 0, 0, False
    held: Member | None = None
    long_name: str | None = None
    pax: dict[str, str] = {}
    while True:
        header = file.read(position, BLOCK)
        parsed = parse(header)
        if parsed is None:
            following = next_header(file, held.offset if held else position + 1)
            if held and following is not None and following < held.end:
                reason = f"{printable(held.name)} lacks bytes: the next header stands {held.end - following} bytes too early"
                yield Damage(held.start, following, reason, split_name(held.name)[0])
            else:
                yield from (held,) if held else ()
                if following is None:
                    yield from ending(file, position, header)
                    return
                reason = "empty blocks where a header should stand" if header == bytes(BLOCK) else "damaged header"
                yield Damage(position, following, f"{reason}; {following - position} bytes are lost up to the next valid header")
            position = start = following
            held, after_damage, long_name, pax = None, True, None, {}
            continue
        yield from (held,) if held else ()
        held = None
        kind, size = parsed
        size = int(pax.get("size", size))
        body, name = position + BLOCK, pax.get("path") or long_name or short_name(header)
        key = split_name(name)[0] if kind in REGULAR else None
        member = Member(name, start, body, size, zlib.crc32(header))
        if body + size > total:
            following = next_header(file, body)
            there = f"{printable(name)} has {size} bytes, {total - body} are there"
            yield Damage(start, total if following is None else following, f"truncated: {there}", key)
            if following is None:
                return
            position = start = following
            after_damage, long_name, pax = True, None, {}
            continue
        inside = header_inside(file, body, body + size) if kind in REGULAR else None
        if inside is not None:
            reason = f"{printable(name)} holds the header of another member: its own bytes are lost, or its size is wrong"
            yield Damage(start, inside, reason, key)
            position = start = inside
            after_damage, long_name, pax = True, None, {}
            continue
        if kind in (b"L", b"x"):
            described = extended(file, kind, body, size)
            if described is None:
                yield Damage(position, member.end, "damaged extended header: the next member's name and size are not certain")
                after_damage, long_name, pax, start = True, None, {}, member.end
            elif kind == b"L":
                long_name = described["path"]
            else:
                pax = described
        else:
            if kind in REGULAR and (doubt := untrusted(member, header, long_name is None and "path" not in pax, after_damage)):
                yield Damage(start, member.end, doubt)
            elif kind in REGULAR:
                held = member
            elif kind not in (b"5", b"g", b"K"):  # of folders, global headers and names of links nothing is wanted
                yield Damage(start, member.end, f"{printable(name)} is no regular file (type {kind!r}) and is not read")
            long_name, pax, start, after_damage = None, {}, member.end, False
        position = member.end


def untrusted(member: Member, header: bytes, short: bool, after_damage: bool) -> str:
    """Why the name or the size of a member cannot be believed, or ""."""
    if after_damage and short and 0 not in header[:100]:
        # The lost region may have held this member's long name; under a shortened one it could join a wrong sample.
        return f"the name {printable(member.name)} may be cut short: what was lost before it may have held the rest"
    if member.size > MAX_MEMBER_BYTES:
        return f"{printable(member.name)} has {member.size:,} bytes; 4 GiB is the most"
    return ""


def extended(file: ShardFile, kind: bytes, body: int, size: int) -> dict[str, str] | None:
    """What a GNU long name or a PAX header says of the member after it; None where it is damaged."""
    if size > MAX_NAME_BYTES:
        return None
    content = file.read(body, size)
    if kind == b"L":
        return {"path": content.rstrip(b"\0").decode("utf-8", "replace")}
    records: dict[str, str] = {}
    while content:
        length, separator, _ = content.partition(b" ")
        if not separator or not length.isdigit() or not len(length) + 1 < int(length) <= len(content):
            return None if content.strip(b"\0") else records
        name, equals, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        if not equals or content[int(length) - 1 : int(length)] != b"\n":
            return None
        records[name.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        content = content[int(length) :]
    number = records.get("size", "0")
    return records if number.isascii() and number.isdigit() else None


def ending(file: ShardFile, position: int, header: bytes) -> Iterator[Damage]:
    """What is wrong with the end of a shard, from the first block on after which no header follows."""
    total = file.size
    if len(header) < BLOCK:
        left = f" ({len(header)} bytes of a header are left)" if header else ""
        yield Damage(min(position, total), total, f"truncated{left}: the two closing blocks of the tar are missing")
        return
    closing = last_data(file, position)
    if header != bytes(BLOCK):
        yield Damage(position, closing, f"damaged header; no valid one follows, {closing - position} bytes are lost")
        if total - closing < 2 * BLOCK:
            yield Damage(closing, total, "truncated: the two closing blocks of the tar are missing")
    elif closing > position:
        yield Damage(position, closing, f"{closing - position} bytes after the closing blocks, and no header among them")
    elif total - position < 2 * BLOCK:
        yield Damage(position, total, "truncated: one of the two closing blocks of the tar is missing")


def parse(header: bytes) -> tuple[bytes, int] | None:
    """(type, size) of a header block; None where it is cut, or its checksum or a number is wrong."""
    if len(header) < BLOCK:
        return None
    size, checksum = number(header[124:136]), number(header[148:156])
    if size is None or checksum is None:
        return None
    # Adler-32's lower half is 1 plus the sum of the bytes, modulo 65521: the tar's own checksum, ten times as fast as sum()
    found = zlib.adler32(header[156:], zlib.adler32(b"        ", zlib.adler32(header[:148]))) & 0xFFFF
    return (header[156:157], size) if found == (checksum + 1) % 65521 else None


def number(field: bytes) -> int | None:
    """A tar's octal or base-256 number; None for anything else, negative ones included."""
    if field[0] & 0x80:  # base-256, for members of 8 GiB and more
        return None if field[0] & 0x40 else int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    digits = field.partition(b"\0")[0].strip(b" ")
    if not digits:
        return 0
    return int(digits, 8) if digits.isdigit() and not (b"8" in digits or b"9" in digits) else None


def short_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0].decode("utf-8", "replace")
    prefix = header[345:500].split(b"\0", 1)[0].decode("utf-8", "replace") if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def next_header(file: ShardFile, start: int) -> int | None:
    """Position of the first header from `start` on: a name, a known type and a valid checksum, on a border of blocks, or off it
    where the magic `ustar` stands."""
    at = start
    while at + BLOCK <= file.size:
        window = file.read(at, min(WINDOW + BLOCK, file.size - at))
        last = len(window) - BLOCK
        borders = iter(range(-at % BLOCK, last + 1, BLOCK))
        border, magic = next(borders, None), _magic(window, 0, last)
        while border is not None or magic is not None:
            first = min(place for place in (border, magic) if place is not None)
            if is_header(window[first : first + BLOCK]):
                return at + first
            if magic == first:
                magic = _magic(window, first + 1, last)
            if border == first:
                border = next(borders, None)
        at += last + 1
    return None


def header_inside(file: ShardFile, start: int, end: int) -> int | None:
    """Position of the first header with a magic in [start, end), where no member of a corpus has one."""
    for at in range(start, end - BLOCK + 1, WINDOW):
        window = file.read(at, min(WINDOW + BLOCK, end - at))
        found = _magic(window, 0, len(window) - BLOCK)
        while found is not None:
            if is_header(window[found : found + BLOCK]):
                return at + found
            found = _magic(window, found + 1, len(window) - BLOCK)
    return None


def _magic(window: bytes, start: int, last: int) -> int | None:
    found = window.find(b"ustar", start + 257) - 257
    return found if start <= found <= last else None


def is_header(block: bytes) -> bool:
    return block[0] != 0 and block[156:157] in KNOWN and parse(block) is not None


def last_data(file: ShardFile, start: int) -> int:
    """Where the zeros begin that reach to the end of the file, on a block's border counted from `start`."""
    end = start
    for at in range(start, file.size, WINDOW):
        if kept := file.read(at, min(WINDOW, file.size - at)).rstrip(b"\0"):
            end = at + len(kept)
    return min(file.size, start + (end - start + BLOCK - 1) // BLOCK * BLOCK)


def printable(text: str) -> str:
    """Without the control characters that a damaged shard may bring to a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
