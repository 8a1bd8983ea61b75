"""Document: the one type that captions, interleaved documents and text become.

A document is an ordered sequence of text spans and images. A caption pair is [image, text], a web page is any alternation of the
two, a book is [text]. Everything to the right (packing, batches, evaluation) sees only this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """An image as it lies in the shard: encoded bytes (JPEG, PNG, WebP ...), not yet decoded.

    `source` holds the bytes or fetches them: documents that wait to be packed keep no pictures in memory.
    """

    source: bytes | Callable[[], bytes]
    name: str = ""

    @property
    def data(self) -> bytes:
        """The encoded bytes; raises what reading them raises (faults.SampleFault, reader.ShardError)."""
        return self.source if isinstance(self.source, bytes) else self.source()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and self.name == other.name and self.data == other.data

    def __hash__(self) -> int:
        return hash((self.name, self.data))

    def __reduce__(self) -> tuple[type[Image], tuple[bytes, str]]:
        """Another process gets the bytes, not the files they come from."""
        return Image, (self.data, self.name)


class Origin(NamedTuple):
    """Where a document came from, precise enough to find its bytes again."""

    source: str
    shard: str
    key: str

    def __str__(self) -> str:
        return f"{self.source}:{self.shard}:{self.key}"


class Document(NamedTuple):
    parts: tuple[str | Image, ...]
    origin: Origin

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(part for part in self.parts if isinstance(part, Image))

    @property
    def text(self) -> str:
        """The text spans alone, joined as they stand."""
        return "".join(part for part in self.parts if isinstance(part, str))
