"""Load image files of any format that Pillow opens as 8-bit RGB in viewing orientation."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_fast.training.data.record_errors import BadRecord, RecordIssue, describe
from vlm_fast.training.data.records import Record

if TYPE_CHECKING:
    from PIL.Image import Image, Transpose

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)

PNG = b"\x89PNG\r\n\x1a\n"
# PNG chunks without pixels, which Pillow refuses if they are too long; and keywords of chunks that
# hold the orientation.
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
ORIENTATION_KEYWORDS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
TOO_LONG = "MAX_TEXT"  # part of Pillow's error message about these chunks
# White level of 16-bit greys in formats that define one. Pillow scales JPEG 2000 and PNM itself.
WHITE_OF_16_BITS = {"PNG": 65535, "JPEG2000": 65535, "PPM": 65535}
DEEP_COLOUR = "RGB;16"  # Pillow's name for 16-bit colours, of which it keeps the upper 8 bits
GREYS = ("I", "F")  # prefixes of Pillow's modes with more than 8 bits
WHITE_IS_ZERO = 0
BITS_A_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT, UNSIGNED = 258, 262, 339, (1,)  # tags of a TIFF


class _UnknownWhiteLevel(Exception):
    """The file format does not say which grey value is white."""


def parse_background(background: str | tuple[int, ...]) -> Colour:
    """The red, green and blue of a colour, given as such or as a name that Pillow knows.

    Raises:
        ValueError: it is no colour.
    """
    if isinstance(background, str):
        from PIL import ImageColor

        try:
            background = ImageColor.getrgb(background)
        except ValueError:
            background = ()
    colour = tuple(background)
    if len(colour) != 3 or not all(type(part) is int and 0 <= part < 256 for part in colour):
        wanted = "three whole numbers from 0 to 255, or an opaque colour that PIL.ImageColor knows"
        raise ValueError(f"background is no colour, expected {wanted}")
    return colour


def load_image(record: Record, images: Path, background: Colour = WHITE) -> Image:
    """Decode the image of a record.

    Of animated images the first frame is used. Transparent pixels show the background. Greys of
    more than 8 bits are scaled by the range that the format defines.

    Args:
        record: with an image.
        images: the folder of images.
        background: red, green and blue from 0 to 255.

    Returns:
        An RGB image in viewing orientation.

    Raises:
        BadRecord: the file is missing, cannot be decoded completely, has more pixels than Pillow
            allows or metadata that Pillow refuses, or its white level is unknown.
        ModuleNotFoundError: Pillow is not installed.
    """
    from PIL.Image import DecompressionBombError, DecompressionBombWarning

    assert record.image is not None
    path = images / record.image

    def bad(kind: str, expected: str, actual: str) -> BadRecord:
        return BadRecord(RecordIssue(kind, record.index, record.id, "image", expected, actual))

    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise bad("missing image", f"a file in {images}", f"{describe(record.image)}, {what}")
    try:
        return _read(path, background)
    except MemoryError:
        raise
    # Decoders of broken files raise anything: SyntaxError, struct.error, IndexError.
    except Exception as error:
        kind, expected = "unreadable image", "a picture that decodes to its end"
        if isinstance(error, _UnknownWhiteLevel):
            kind, expected = "unknown range", "grey of 8 bits, or of a format that defines white"
        elif isinstance(error, (DecompressionBombError, DecompressionBombWarning)):
            kind, expected = "too many pixels", "a picture within PIL.Image.MAX_IMAGE_PIXELS"
        elif TOO_LONG in str(error):
            kind, expected = "metadata", "text and profiles within Pillow's limits"
        words = "" if kind == "unknown range" else f"{type(error).__name__}: "
        raise bad(
            kind, expected, f"{describe(record.image)}: {words}{describe(str(error))}"
        ) from error


def _read(path: Path, background: Colour) -> Image:
    from PIL import Image

    try:
        with Image.open(path) as file:
            return as_rgb(file, background)
    except ValueError as error:
        content = path.read_bytes() if TOO_LONG in str(error) else b""
        if not content.startswith(PNG):
            raise
    with Image.open(io.BytesIO(_without_long_chunks(content))) as file:
        return as_rgb(file, background)


def as_rgb(image: Image, background: Colour = WHITE) -> Image:
    """Convert an image of any mode to RGB in viewing orientation, over a background.

    Raises:
        Exception: whatever Pillow raises for a file that it cannot decode.
    """
    from PIL import Image, ImageChops

    deep = any(DEEP_COLOUR in str(tile) for tile in getattr(image, "tile", ()))
    image.load()
    turn = _orientation_transpose(image)
    if deep and isinstance(clear := image.info.get("transparency"), tuple):
        # Pillow cuts the pixels to 8 bits as well
        image.info["transparency"] = tuple(part >> 8 for part in clear)
    if image.mode.startswith(GREYS):
        image = _to_8_bit_grey(image)
    elif image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
        # Pillow inverts every CMYK JPEG, but only Adobe's are inverted
        image = ImageChops.invert(image)
    if image.has_transparency_data:
        if image.mode == "La":  # the only mode that Pillow converts "La" to
            image = image.convert("LA")
        below = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(below, image.convert("RGBA"))
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _orientation_transpose(image: Image) -> Transpose | None:
    """The transposition that brings an image into viewing orientation, from EXIF or XMP.

    It is read after the pixels, because Pillow rotates a TIFF while decoding.
    ``PIL.ImageOps.exif_transpose`` is not used: it also rewrites the metadata and fails if another
    part is broken.
    """
    from PIL.ExifTags import Base
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }  # fmt: skip
    try:
        return turns.get(image.getexif().get(Base.Orientation, 1))
    except Exception:  # ignore broken metadata, as image viewers do
        return None


def _to_8_bit_grey(image: Image) -> Image:
    """Convert grey of more than 8 bits to mode "L", or "LA" if one of its values is transparent."""
    from PIL import ImageMath

    white = _white_level(image)
    turned = image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO  # type: ignore[attr-defined]

    def grey(names: dict[str, Any]) -> Any:
        value = (names["image"] * 255 + white // 2) / white
        return names["convert"](255 - value if turned else value, "L")

    wide = image.convert("I")
    scaled: Image = ImageMath.lambda_eval(grey, image=wide)
    if (clear := image.info.get("transparency")) is not None:
        opaque: Image = ImageMath.lambda_eval(
            lambda names: names["convert"]((names["image"] != clear) * 255, "L"), image=wide
        )
        scaled.putalpha(opaque)
    return scaled


def _white_level(image: Image) -> int:
    """The grey value that is white.

    Raises:
        _UnknownWhiteLevel: the format does not define it, as for floats, signed and 32-bit numbers.
    """
    if image.mode != "F":
        if image.format in WHITE_OF_16_BITS:
            return WHITE_OF_16_BITS[image.format]
        if image.format == "TIFF":
            tags: Any = image.tag_v2  # type: ignore[attr-defined]
            (bits,), form = tags.get(BITS_A_SAMPLE, (1,)), tags.get(SAMPLE_FORMAT, UNSIGNED)
            if form == UNSIGNED and bits <= 16:
                return 2**bits - 1
    raise _UnknownWhiteLevel(f"{image.format} of mode {image.mode}")


def _without_long_chunks(content: bytes) -> bytes:
    """A PNG file without text and colour profiles, except for chunks that hold the orientation."""
    kept, at = [PNG], len(PNG)
    while at + 8 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        name, begin = content[at + 4 : at + 8], content[at + 8 : at + 40]
        if name not in TEXT_CHUNKS or begin.startswith(ORIENTATION_KEYWORDS):
            kept.append(content[at:end])
        at = end
    return b"".join(kept)
