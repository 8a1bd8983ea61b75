"""Decoding: agreement with Pillow, whole pictures only, nothing too large."""

from __future__ import annotations

import io
import json
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from configs.errors import UserError
from data_pipelines.document import Origin
from data_pipelines.formats import mint1t
from data_pipelines.formats.pictures import PictureError, header
from data_pipelines.images import decode_image, decode_rgb


def picture(width: int = 64, height: int = 48, mode: str = "RGB") -> Image.Image:
    """Smooth ramps and hard edges, so that a wrong filter or a shift by a pixel shows."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, ((x // 7 + y // 5) % 2) * 200], -1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("width", "height"), [(64, 64), (64, 48), (48, 64), (33, 64), (200, 150), (20, 20), (500, 3)])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_pixels_are_pillows_within_one_grey_level(width: int, height: int, format: str) -> None:
    data = encoded(picture(width, height), format, **({} if format == "PNG" else {"quality": 90}))
    size = 32
    ours = decode_image(data, size).numpy().transpose(1, 2, 0).astype(int)
    reference = Image.open(io.BytesIO(data)).convert("RGB")
    scale = size / max(width, height)
    to = (max(1, round(width * scale)), max(1, round(height * scale)))
    square = Image.new("RGB", (size, size), "white")
    square.paste(reference.resize(to, Image.Resampling.BICUBIC), ((size - to[0]) // 2, (size - to[1]) // 2))
    # JPEG: Pillow brings its own libjpeg, whose arithmetic may differ by a level before resizing
    assert np.abs(ours - np.asarray(square).astype(int)).max() <= (1 if format != "JPEG" else 3)


def test_a_picture_of_the_right_size_is_untouched() -> None:
    ours = decode_image(encoded(picture(32, 32), "PNG"), 32).numpy()
    assert np.array_equal(ours.transpose(1, 2, 0), np.asarray(picture(32, 32)))


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = picture(mode=mode)
    data = encoded(image, "JPEG", quality=95) if mode == "CMYK" else encoded(image, "PNG")
    difference = np.abs(decode_rgb(data).astype(int) - np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int))
    assert difference.max() <= 2


LEVELS = np.array([[0, 255, 256, 0x8000], [0x80FF, 0xFF00, 0xFFFE, 0xFFFF]], np.uint16)
DEEP = {
    "png": encoded(Image.fromarray(LEVELS), "PNG"),
    "tiff": encoded(Image.fromarray(LEVELS), "TIFF"),
    "big-endian tiff": encoded(Image.frombytes("I;16B", (4, 2), LEVELS.astype(">u2").tobytes()), "TIFF"),
}


@pytest.mark.parametrize("name", DEEP)
def test_of_sixteen_bits_the_upper_eight_are_kept(name: str) -> None:
    assert np.array_equal(decode_rgb(DEEP[name]), np.repeat((LEVELS >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_a_tiff_of_twelve_bits_has_its_own_white() -> None:
    packed = bytes([0x00, 0x00, 0x10, 0x80, 0x0F, 0xFF])  # 0, 16, 2048, 4095
    tags = [
        (256, 3, 4),
        (257, 3, 1),
        (258, 3, 12),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 122),
        (277, 3, 1),
        (278, 3, 1),
        (279, 4, 6),
    ]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    assert decode_rgb(data.ljust(122, b"\0") + packed)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_transparent_level_of_sixteen_bits_is_white_alone() -> None:
    data = encoded(Image.fromarray(LEVELS), "PNG", transparency=0x8000)
    assert decode_rgb(data)[..., 0].tolist() == [[0, 0, 1, 255], [128, 255, 255, 255]]


@pytest.mark.parametrize(("dtype", "said"), [(np.int32, "32-bit grey levels"), (np.float32, "float grey levels")])
def test_grey_levels_without_a_range_are_refused(dtype: type, said: str) -> None:
    data = encoded(Image.fromarray(LEVELS.astype(dtype)), "TIFF")
    with pytest.raises(UserError, match=f"item 7: .*{said}"):
        decode_rgb(data, "item 7")
    with pytest.raises(PictureError, match=said):
        header(data)


def test_frames_of_a_tiff_keep_their_levels() -> None:
    def page(*frames: Image.Image) -> dict[str, bytes]:
        described = {"images": [f"image {i}" for i in range(len(frames))], "texts": [None] * len(frames)}
        return {
            "json": json.dumps(described).encode(),
            "tiff": encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        }

    origin = Origin("interleaved", "shard", "key")
    (_, deep) = mint1t.read(page(picture(), Image.fromarray(LEVELS)), origin).images
    assert np.array_equal(decode_rgb(deep.data), decode_rgb(DEEP["tiff"]))
    with pytest.raises(UserError, match=r"frame 1 of the tiff cannot be decoded .float grey levels"):
        mint1t.read(page(picture(), Image.fromarray(LEVELS.astype(np.float32))), origin)


def test_transparent_pixels_are_white() -> None:
    image = picture().convert("RGBA")
    image.putalpha(0)
    assert (decode_rgb(encoded(image, "PNG")) == 255).all()


JPEG = encoded(picture(640, 480), "JPEG", quality=90)


@pytest.mark.parametrize("tail", [b"", b"junk after the end"])
@pytest.mark.parametrize("progressive", [False, True])
def test_perfect_pictures_in_untidy_files_survive(tail: bytes, progressive: bool) -> None:
    data = encoded(picture(), "JPEG", quality=90, progressive=progressive)
    whole = decode_rgb(data)
    assert np.array_equal(decode_rgb(data + tail), whole)
    assert np.array_equal(decode_rgb(data[:-2]), whole)  # lacks only its end marker


@pytest.mark.parametrize("filling", [b"\0", b"\xff", b"\0" * 9, b"\xff\xff\0\xff\0", b"\0\xff\xff"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_filling_before_any_marker_is_forgiven(filling: bytes, progressive: bool, mode: str) -> None:
    data = encoded(picture(mode=mode), "JPEG", quality=90, progressive=progressive)
    whole = decode_rgb(data)
    places = [
        data.index(marker) for marker in (b"\xff\xdb", b"\xff\xc2" if progressive else b"\xff\xc0", b"\xff\xc4", b"\xff\xda")
    ]
    for place in (*places, len(data) - 2):
        assert np.array_equal(decode_rgb(data[:place] + filling + data[place:]), whole)
    for place in reversed((*places, len(data) - 2)):  # all at once
        data = data[:place] + filling + data[place:]
    assert np.array_equal(decode_rgb(data[:-2]), whole)  # and no end marker


@pytest.mark.parametrize("stray", [b"\1", b"\0\0x", b"x\0"])
def test_other_stray_bytes_between_segments_are_refused(stray: bytes) -> None:
    for place in (JPEG.index(marker) for marker in (b"\xff\xc0", b"\xff\xc4", b"\xff\xda")):
        with pytest.raises(UserError, match="extraneous bytes"):
            decode_rgb(JPEG[:place] + stray + JPEG[place:])


def test_odd_scan_parameters_are_forgiven_and_hide_nothing() -> None:
    """libjpeg names its first complaint alone."""
    scan = JPEG.index(b"\xff\xda")
    end = scan + 2 + int.from_bytes(JPEG[scan + 2 : scan + 4], "big")
    odd = JPEG[: end - 3] + b"\1\2\3" + JPEG[end:]
    assert np.array_equal(decode_rgb(odd), decode_rgb(JPEG))
    with pytest.raises(UserError, match="extraneous bytes"):
        decode_rgb(odd[:-2] + b"stray" + odd[-2:])


@pytest.mark.parametrize("progressive", [False, True])
def test_a_flipped_bit_that_libjpeg_notices_is_refused(progressive: bool) -> None:
    """Most flips lose the place in the Huffman code: pixels shift, and bytes are left over at the end of the scan."""
    data = encoded(picture(128, 128), "JPEG", quality=90, progressive=progressive)
    whole, start, noticed = decode_rgb(data), data.index(b"\xff\xda") + 14, 0
    rng = np.random.default_rng(0)
    for place, bit in zip(rng.integers(start, len(data) - 2, 300), rng.integers(0, 8, 300), strict=True):
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        try:
            simplejpeg.decode_jpeg(bytes(flipped), "RGB")
        except ValueError:
            noticed += 1
            with suppress(UserError):
                assert np.array_equal(decode_rgb(bytes(flipped)), whole)
    assert noticed > 30


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("end", [b"", b"\xff\xd9"])
def test_a_cut_jpeg_is_refused_also_with_an_end_marker(keep: float, end: bytes) -> None:
    """Pillow takes the second kind for a whole picture and fills the rest with grey."""
    data = JPEG[: int(len(JPEG) * keep)] + end
    if end:
        Image.open(io.BytesIO(data)).load()  # no complaint
    with pytest.raises(UserError, match="item 7: not a whole, decodable image"):
        decode_image(data, 32, name="item 7")


def test_garbled_bytes_are_refused() -> None:
    """JPEG has no checksum, so not every flipped bit can be noticed; a lost block of the file can."""
    middle = len(JPEG) // 2
    with pytest.raises(UserError, match="not a whole"):
        decode_rgb(JPEG[:middle] + JPEG[middle + 512 :])


PNG, WEBP = encoded(picture(), "PNG"), encoded(picture(), "WEBP")


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"\xff\xd8\xff", PNG[: len(PNG) // 2], WEBP[: len(WEBP) // 2]])
def test_what_is_no_picture_is_named(data: bytes) -> None:
    with pytest.raises(UserError, match="caption 3"):
        decode_image(data, 32, name="caption 3")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("data", [EPS, encoded(picture(), "PPM"), encoded(picture(), "TGA"), encoded(picture(), "DDS")])
def test_formats_that_shards_do_not_hold_are_not_even_opened(data: bytes) -> None:
    """The header of an EPS opens; decoding it starts Ghostscript on the shard's bytes."""
    with pytest.raises(PictureError, match="identify its format as one of JPEG, PNG"):
        header(data)
    with pytest.raises(UserError, match="identify its format as one of JPEG, PNG"):
        decode_rgb(data)


def test_further_pictures_of_a_file_do_no_harm() -> None:
    """MPO (cameras), GIF and TIFF hold several; the first counts."""
    for format in ("MPO", "GIF", "TIFF"):
        data = encoded(picture(), format, save_all=True, append_images=[picture().rotate(180)])
        assert header(data) == (format, 64, 48)
        assert np.array_equal(decode_rgb(data), decode_rgb(encoded(picture(), "JPEG" if format == "MPO" else format)))


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, IndexError, struct.error])
def test_whatever_a_decoder_raises_is_a_fault_of_the_picture(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise error("the decoder's words")

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(UserError, match=r"item 7: not a whole.*the decoder's words"):
        decode_rgb(PNG, "item 7")
    with pytest.raises(PictureError, match="the decoder's words"):
        header(PNG)


def test_too_little_memory_is_no_fault_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def starved(*arguments: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", starved)
    for read in (decode_rgb, header):
        with pytest.raises(MemoryError):
            read(PNG)


def test_a_bomb_is_refused_by_its_header() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    with pytest.raises(UserError, match=r"60000x60000 pixels|decompression bomb"):
        decode_rgb(bomb)
