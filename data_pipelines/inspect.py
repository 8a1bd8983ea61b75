"""Packed sequences as the model will see them: one HTML page, and a contact sheet of their images.

stream.py -> the sequences of some steps -> Tally of all of them, View of the first ones -> page.py        -> inspect.html
                                            views.py                                     -> contact_sheet  -> PNG
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from configs.command import command
from configs.errors import UserError
from data_pipelines.stream import StreamSettings, open_stream

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image

    from data_pipelines.views import Tally, View


@dataclass
class PixelsConfig:
    image_size: int
    """Pixels a side that the encoder gets."""


@dataclass
class InspectConfig(StreamSettings):
    image_encoder: PixelsConfig = field(default_factory=lambda: PixelsConfig(96))
    start: int = 0
    """First step looked at."""
    steps: int = 50
    """Steps that are counted for the ratios, padding and tokens at the top of the page."""
    sequences: int = 12
    """Sequences that are shown, the first ones of those steps."""
    out: str = "inspect.html"
    png: str | None = None
    """A contact sheet beside the page: every shown sequence's packing and images."""

    def validate(self) -> None:
        super().validate()
        if self.image_encoder.image_size < 1:
            raise UserError(f"image_encoder.image_size={self.image_encoder.image_size}: must be at least 1.")
        if self.start < 0:
            raise UserError(f"start={self.start}: must not be negative.")
        if self.steps < 1:
            raise UserError(f"steps={self.steps}: must be at least 1.")
        there = self.steps * self.train.global_batch
        if not 0 <= self.sequences <= there:
            raise UserError(
                f"sequences={self.sequences}: steps={self.steps} of train.global_batch={self.train.global_batch} have {there}. "
                "Ask for fewer, or raise steps."
            )
        for key, path in (("out", self.out), ("png", self.png)):
            if path is not None and not Path(path).expanduser().absolute().parent.is_dir():
                raise UserError(f"{key}={path}: there is no such folder.")


@command("inspect", schema=InspectConfig)
def main(config: InspectConfig) -> None:
    """Write a page of packed sequences as the model will see them: documents and their borders, images, text, padding, loss.

    python -m data_pipelines.inspect                                     the first sequences of the base configuration
    python -m data_pipelines.inspect start=100 sequences=24 steps=500    24 from step 100 on, ratios over 500 steps
    python -m data_pipelines.inspect packing.policy=concat png=sheet.png out=concat.html

    The page is one file without scripts or outside links. Other keys: those of mm1.train that decide the data: data.*, packing.*,
    seed, train.global_batch, connector.num_tokens, image_encoder.image_size, decoder.tokenizer.
    """
    from data_pipelines.page import page

    tallies, views = look(config)
    out = Path(config.out).expanduser()
    out.write_text(page(config, range(config.start, config.start + config.steps), tallies, views), encoding="utf-8")
    counted = config.steps * config.train.global_batch
    print(f"{len(views)} sequences shown, {counted} counted: {out.absolute()}")
    if config.png is not None:
        png = Path(config.png).expanduser()
        contact_sheet(views, config.packing.seq_len).save(png, "PNG")
        print(f"contact sheet: {png.absolute()}")


def look(config: InspectConfig) -> tuple[list[Tally], list[View]]:
    """Counts of all sequences of the steps asked for, one tally a source, and views of the first ones."""
    stream, tokenizer = open_stream(config)
    from data_pipelines.images import SquareDecoder
    from data_pipelines.loader import PackedLoader, as_images
    from data_pipelines.reader import ShardError
    from data_pipelines.views import Tally, view

    tallies = [Tally(name, config.data.sources[name].kind, config.data.sources[name].ratio) for name in stream.names]
    views: list[View] = []
    loader = PackedLoader(stream, image_size=None, micro_batch=1, first=config.start)
    for item, _ in islice(loader.sequences(), config.steps * config.train.global_batch):
        for number, tally in enumerate(tallies):
            tally.add(item, number, config.connector.num_tokens)
        for fault in item.faults:
            print(f"left out: {fault}", file=sys.stderr)
        if len(views) < config.sequences:
            decoder, images = SquareDecoder(config.image_encoder.image_size), item.sequence.images
            squares = decoder.allocate(len(images))
            for start, image, square in zip(item.sequence.image_starts, images, squares, strict=True):
                try:
                    decoder.decode(image.data, image.name, square)
                except ShardError:
                    raise
                except UserError as error:
                    owner = item.sequence.origins[item.sequence.document_ids[start] - 1]
                    where = owner if config.packing.isolate_documents else f"step {item.step}, slot {item.slot}"
                    print(f"training leaves out, and a crossed-out square stands for: {where}: {error}", file=sys.stderr)
                    cross_out(square)
            views.append(view(item, as_images(squares), tokenizer, config.connector.num_tokens))
    return tallies, views


def cross_out(square: np.ndarray) -> None:
    """Fill `square`, uint8 (size, size, 3), with what no picture is mistaken for: red diagonals on grey."""
    square[:] = 220
    diagonal = range(len(square))
    square[diagonal, diagonal] = square[diagonal, diagonal[::-1]] = (200, 0, 0)


# ----------------------------------------------------------------------------------------------------------- contact sheet


def contact_sheet(views: Sequence[View], seq_len: int, *, width: int = 1200, thumbnail: int = 64) -> PIL.Image.Image:
    """One band a sequence: its packing as a bar, below it its images framed in the colours of their documents."""
    from PIL import Image, ImageDraw, ImageFont

    from data_pipelines.views import colour, picture

    margin, cell = 16, thumbnail + 8
    columns = (width - 2 * margin) // cell
    counts = [sum(len(document.pictures) for document in shown.documents) for shown in views]
    heights = [56 + -(-count // columns) * cell for count in counts]
    sheet = Image.new("RGB", (width, 2 * margin + max(1, sum(heights))), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    top = margin
    for shown, height in zip(views, heights, strict=True):
        padding = 1 - shown.used / shown.length
        title = (
            f"step {shown.step}  slot {shown.slot}  {shown.source}   documents: {len(shown.documents)}   padding {padding:.1%}"
        )
        draw.text((margin, top), title, fill="#333333", font=font)
        scale = (width - 2 * margin) / seq_len
        draw.rectangle((margin, top + 20, width - margin, top + 31), fill="#eeeeee")
        index = 0
        for number, document in enumerate(shown.documents):
            left, right = (round(margin + at * scale) for at in (document.start, document.stop))
            draw.rectangle((left, top + 20, max(left, right - 2), top + 31), fill=colour(number))
            for part in document.pictures:
                x, y = margin + index % columns * cell, top + 40 + index // columns * cell
                draw.rectangle((x, y, x + thumbnail + 3, y + thumbnail + 3), fill=colour(number))
                small = picture(part.pixels).resize((thumbnail, thumbnail), Image.Resampling.BICUBIC)
                sheet.paste(small, (x + 2, y + 2))
                index += 1
        top += height
    return sheet


if __name__ == "__main__":
    main()
