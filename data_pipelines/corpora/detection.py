"""Which layout a corpus's records have, found from the first that one reads; and the checks that every record must pass.

detect      the layouts of a source, narrowed record by record until one is left: a page of text alone looks the same in two
examine     a record read into a Document of strings and decodable pictures, with nothing of it left over
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, TypeVar

from configs.errors import UserError
from data_pipelines.document import Document, Origin
from data_pipelines.formats import KNOWN, following, read_document
from data_pipelines.formats.img2dataset import IMAGE_EXTENSIONS
from data_pipelines.formats.pictures import PictureError, header

PROBE = 100
"""Records that are looked at before the first layout that reads them all is taken."""

Content = TypeVar("Content", bound=Mapping[str, Any])


def detect(
    where: str, readers: Mapping[str, Callable[[Origin, Content], Document]], records: Iterable[tuple[Origin, Content]]
) -> str:
    """The name in `readers` that reads the first valid records. What no layout reads is passed over; it stops the reading later.

    Raises UserError with what was seen, what each layout missed in it and how the known ones look, when none reads any.
    """
    left, found = list(readers), False
    seen: tuple[str, list[str]] | None = None
    for origin, content in islice(records, PROBE):
        fitting, complaints = [], []
        for name in left:
            try:
                readers[name](origin, content)
            except UserError as error:
                complaints.append(str(error))
            else:
                fitting.append(name)
        if fitting:
            left, found = fitting, True
        elif seen is None:
            seen = (f"{origin} has {', '.join(sorted(map(str, content))) or 'nothing'}", complaints)
        if found and len(left) == 1:
            break
    if found:
        return left[0]
    if seen is None:
        raise UserError(f"{where}: holds no samples. Leave it out.")
    known = "; ".join(f"{name}: {KNOWN[name]}" for name in readers)
    raise UserError(f"{where}: the first sample is of no known layout. Seen: {seen[0]}. Known: {known}. " + " ".join(seen[1]))


def checked(format: str, members: Mapping[str, bytes], origin: Origin) -> Document:
    """A tar's sample as a document that uses every picture of the sample; else UserError naming it."""
    document = examine(format, origin, lambda: read_document(format, members, origin))
    pictures = {member for member in members if member.rpartition(".")[2].lower() in IMAGE_EXTENSIONS}
    used = {image.name for image in document.images}
    if unused := sorted(pictures - used - {name.partition(":")[0] for name in used}):  # "tiff:3" is a frame of the member tiff
        raise UserError(
            f"{origin}: layout {format!r} has no place for the picture {', '.join(unused)}, which would be lost. Give the shard "
            "as the source it belongs to (captions, interleaved), or take the picture out."
        )
    return document


def examine(format: str, origin: Origin, read: Callable[[], Document]) -> Document:
    """What `read` returns, made sure to follow its layout and to hold pictures whose header can be read; else UserError.

    A picture is judged by its header alone, which takes microseconds; damage further in is found when it is decoded.
    """
    document = following(format, origin, read)
    for image in document.images:
        try:
            header(image.data)
        except PictureError as error:
            raise UserError(f"{origin}: {image.name} {error}. Shrink or mend it, or take the sample out.") from error
    return document
