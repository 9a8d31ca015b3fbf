"""Images of every mode and format are read as 8-bit RGB in viewing orientation, or a fault."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageChops, PngImagePlugin
from typer.testing import CliRunner

from vlm_fast.cli import main
from vlm_fast.training.data import BadRecord, Captions, Conversations, check

HEIGHT, WIDTH = 32, 48
TURNS = (
    None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
)  # fmt: skip
WHITE, GREEN = (255, 255, 255), (10, 200, 30)


def ramp(most):
    return np.linspace(0, most, HEIGHT * WIDTH).round().astype(np.int64).reshape(HEIGHT, WIDTH)


ACROSS = np.tile(np.linspace(0, 255, WIDTH).round().astype(np.int64), (HEIGHT, 1))
COLOURS = np.stack([ramp(255), ramp(255)[::-1], ACROSS], -1).astype(np.uint8)
PICTURE = Image.fromarray(COLOURS)
ALPHA = (np.indices((HEIGHT, WIDTH)).sum(0) % 3 * 127).astype(np.uint8)


def read(folder, picture, name, *, background=None, **options):
    """The image that a data set returns for this image, saved under this name; or for bytes."""
    if isinstance(picture, bytes):
        (folder / name).write_bytes(picture)
    else:
        picture.save(folder / name, **options)
    said = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a ramp"}]
    record = {"id": "a", "image": name, "conversations": said}
    (folder / "data.json").write_text(json.dumps([record]))
    more = {} if background is None else {"background": background}
    for kind in (Captions, Conversations):
        image = kind(folder / "data.json", folder, **more)[0].image
        assert image.mode == "RGB"
    return image


def largest_difference(picture, wanted):
    assert np.asarray(picture).shape == np.asarray(wanted).shape
    return np.abs(np.asarray(picture).astype(float) - np.asarray(wanted).astype(float)).max()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.mpo"])
def test_exif_orientation_is_applied(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "a camera"
    turn = TURNS[orientation - 1]
    wanted = PICTURE if turn is None else PICTURE.transpose(turn)
    options = {"quality": 100} if name[-3:] in ("jpg", "mpo") else {}
    options |= {"lossless": True} if name.endswith("webp") else {}
    found = read(tmp_path, PICTURE, name, exif=exif, **options)
    assert largest_difference(found, wanted) <= (16 if options.get("quality") else 0)


def test_xmp_orientation_is_applied(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta tiff:Orientation="6"></x:xmpmeta>')
    found = read(tmp_path, PICTURE, "a.png", pnginfo=info)
    assert largest_difference(found, PICTURE.transpose(Image.Transpose.ROTATE_270)) == 0


def test_broken_exif_is_ignored(tmp_path):
    found = read(tmp_path, PICTURE, "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert largest_difference(found, PICTURE) == 0
    # Broken EXIF with a readable orientation: an offset beyond the end.
    entries = struct.pack("<HHII", 274, 3, 1, 3) + struct.pack("<HHII", 0x8769, 4, 1, 10**6)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + b"\0\0\0\0"
    found = read(tmp_path, PICTURE, "a.png", exif=exif)
    assert largest_difference(found, PICTURE.transpose(Image.Transpose.ROTATE_180)) == 0


def composed(colours, alpha, background):
    share = alpha.astype(float)[..., None] / 255
    return np.asarray(colours).astype(float) * share + np.array(background) * (1 - share)


def transparent_image(kind):
    """An image with this kind of transparency, its save options, colours and alpha."""
    grey, few = PICTURE.convert("L"), PICTURE.quantize(16)
    if kind in ("RGBA", "LA", "PA"):
        opaque = {"RGBA": PICTURE, "LA": grey, "PA": few}[kind]
        picture = opaque.convert(kind)
        picture.putalpha(Image.fromarray(ALPHA))
        return picture, {}, opaque.convert("RGB"), ALPHA
    places = np.asarray(few)
    if kind == "P, an index":
        return few, {"transparency": 3}, few.convert("RGB"), np.where(places == 3, 0, 255)
    if kind == "P, bytes":
        table = bytes([0, 128, 255, 3])
        alpha = np.array([*table, *[255] * 252])[places]
        return few, {"transparency": table}, few.convert("RGB"), alpha
    if kind == "L, a value":
        value = int(np.asarray(grey)[3, 4])
        alpha = np.where(np.asarray(grey) == value, 0, 255)
        return grey, {"transparency": value}, grey.convert("RGB"), alpha
    if kind == "1, a value":
        sharp = grey.convert("1")
        alpha = np.where(np.asarray(sharp), 255, 0)
        return sharp, {"transparency": 0}, sharp.convert("RGB"), alpha
    if kind == "I;16, a value":
        deep = ramp(65535).astype(np.uint16)
        shown = np.repeat((deep / 257).round()[..., None], 3, -1)
        alpha = np.where(deep == deep[3, 4], 0, 255)
        return Image.fromarray(deep), {"transparency": int(deep[3, 4])}, shown, alpha
    value = tuple(map(int, COLOURS[3, 4]))
    alpha = np.where((value == COLOURS).all(-1), 0, 255)
    return PICTURE, {"transparency": value}, PICTURE, alpha


KINDS = ("RGBA", "LA", "PA", "P, an index", "P, bytes", "L, a value", "1, a value",
         "I;16, a value", "RGB, a value")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_transparent_images_are_composed_on_the_background(tmp_path, kind):
    picture, options, colours, alpha = transparent_image(kind)
    name = "a.tif" if kind == "PA" else "a.png"
    if kind == "PA":  # no format that Pillow writes has this mode
        picture = picture.convert("RGBA")
    for background in (None, WHITE, GREEN, "#0ac81e"):
        found = read(tmp_path, picture, name, background=background, **options)
        shown = WHITE if background in (None, WHITE) else GREEN
        assert largest_difference(found, composed(colours, np.asarray(alpha), shown)) <= 1
    assert (np.asarray(alpha) < 255).any()


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "RGBA in a palette"])
def test_modes_of_in_memory_images(mode):
    from vlm_fast.training.data.images import as_rgb

    if mode == "RGBA in a palette":
        picture = transparent_image("RGBA")[0].quantize(32)
        wanted = composed(
            picture.convert("RGB"), np.asarray(picture.convert("RGBA"))[..., 3], GREEN
        )
    else:
        picture, _, colours, alpha = transparent_image(
            {"La": "LA", "RGBa": "RGBA", "PA": "PA"}[mode]
        )
        picture, wanted = picture.convert(mode), composed(colours, alpha, GREEN)
    assert picture.mode == ("P" if " " in mode else mode)
    assert largest_difference(as_rgb(picture, GREEN), wanted) <= 2


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm", "a.jp2"])
def test_grey_16_bit_is_scaled(tmp_path, name):
    deep = ramp(65535)
    found = read(tmp_path, Image.fromarray(deep.astype(np.uint16)), name)
    assert largest_difference(found.getchannel(0), (deep / 257).round()) == 0
    assert ImageChops.difference(found.getchannel(0), found.getchannel(2)).getextrema() == (0, 0)


def test_grey_of_other_depths_byte_orders_and_signs(tmp_path):
    deep = ramp(65535)
    big = Image.fromarray(deep.astype(">u2"))
    assert big.mode == "I;16B"
    assert largest_difference(read(tmp_path, big, "a.tif").getchannel(0), (deep / 257).round()) == 0
    # 0 is white, by the photometric interpretation.
    found = read(tmp_path, Image.fromarray(deep.astype(np.uint16)), "b.tif", tiffinfo={262: 0})
    assert largest_difference(found.getchannel(0), 255 - (deep / 257).round()) <= 1
    ten = ramp(1023).ravel()
    text = f"P2 {WIDTH} {HEIGHT} 1023 {' '.join(map(str, ten))}".encode()
    found = np.asarray(read(tmp_path, text, "c.pgm").getchannel(0)).ravel()
    assert np.abs(found - ten / 1023 * 255).max() <= 1
    found = np.asarray(read(tmp_path, twelve_bits(ramp(4095)), "d.tif").getchannel(0))
    assert np.abs(found - ramp(4095) / 4095 * 255).max() <= 1


def twelve_bits(values):
    """A TIFF of 12 bits a sample: two in three bytes."""
    pairs = values.reshape(-1, 2)
    packed = np.stack(
        [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255]
    )
    data = packed.T.astype(np.uint8).tobytes()
    tags = {256: WIDTH, 257: HEIGHT, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: HEIGHT,
            279: len(data)}  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


@pytest.mark.parametrize(
    "kind", [np.float32, np.int32, np.int16, ">i2", np.uint32], ids=lambda kind: np.dtype(kind).str
)
def test_grey_with_unknown_white_level_is_a_fault(tmp_path, kind):
    tifffile.imwrite(tmp_path / "b.tif", ramp(30000).astype(kind), byteorder=np.dtype(kind).str[0]
                     if np.dtype(kind).str[0] in "<>" else "<")  # fmt: skip
    content = (tmp_path / "b.tif").read_bytes()
    with pytest.raises(BadRecord, match=r"image: unknown range: .*'a\.tif': .*mode [IF]"):
        read(tmp_path, content, "a.tif")
    found = check(tmp_path / "data.json", tmp_path)
    assert [issue.kind for issue in found.issues] == ["unknown range"]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "HSV", "RGBX"])
def test_other_modes(tmp_path, mode):
    from PIL import ImageCms

    from vlm_fast.training.data.images import as_rgb

    if mode == "LAB":
        profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        turned = ImageCms.applyTransform(PICTURE, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    else:
        turned = PICTURE.convert(mode)
    assert largest_difference(as_rgb(turned), turned.convert("RGB")) == 0
    if mode not in ("HSV", "RGBX"):
        assert largest_difference(read(tmp_path, turned, "a.tif"), turned.convert("RGB")) == 0


def test_adobe_cmyk_jpegs_are_inverted(tmp_path):
    stream = io.BytesIO()
    PICTURE.convert("CMYK").save(stream, "JPEG", quality=100)
    content = stream.getvalue()
    assert largest_difference(read(tmp_path, content, "a.jpg"), PICTURE) <= 16
    marker = content.index(b"\xff\xee")
    length = struct.unpack(">H", content[marker + 2 : marker + 4])[0]
    plain = content[:marker] + content[marker + 2 + length :]
    inverted = ImageChops.invert(PICTURE.convert("CMYK")).convert("RGB")
    assert largest_difference(read(tmp_path, plain, "b.jpg"), inverted) <= 16


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_animated_image_gives_first_frame(tmp_path, name):
    first = Image.new("RGBA", (8, 6), (200, 0, 0, 255))
    first.putpixel((0, 0), (0, 0, 0, 0))
    options = {"lossless": True} if name.endswith("webp") else {}
    others = [Image.new("RGBA", (8, 6), (0, 0, 200, 255))] * 2
    found = read(tmp_path, first, name, save_all=True, append_images=others, **options)
    assert found.getpixel((4, 4)) == (200, 0, 0) and found.getpixel((0, 0)) == WHITE


def png_with(*chunks):
    stream = io.BytesIO()
    PICTURE.save(stream, "PNG")
    content = stream.getvalue()
    made = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return content[:33] + made + content[33:]


LONG = zlib.compress(b"x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1))
ROTATED = (
    b"\nexif\n      26\n"
    + (b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + struct.pack("<HHII", 274, 3, 1, 6) + b"\0\0\0\0")
    .hex()
    .encode()
)


@pytest.mark.parametrize(
    "chunks",
    [[(b"zTXt", b"Comment\0\0" + LONG)], [(b"iTXt", b"Comment\0\1\0\0\0" + LONG)],
     [(b"iCCP", b"profile\0\0" + LONG)],
     [(b"tEXt", b"Comment\0" + b"x" * 2**20)] * 65],
    ids=["zTXt", "iTXt", "iCCP", "in all"],
)  # fmt: skip
def test_png_with_too_long_text_is_read(tmp_path, chunks):
    with (
        pytest.raises(ValueError, match="MAX_TEXT"),
        Image.open(io.BytesIO(png_with(*chunks))) as it,
    ):
        it.load()
    assert largest_difference(read(tmp_path, png_with(*chunks), "a.png"), PICTURE) == 0
    turned = png_with(*chunks[:1], *chunks[1:], (b"tEXt", b"Raw profile type exif\0" + ROTATED))
    wanted = PICTURE.transpose(Image.Transpose.ROTATE_270)
    assert largest_difference(read(tmp_path, turned, "a.png"), wanted) == 0


def test_png_with_orientation_in_too_long_text_is_a_metadata_fault(tmp_path):
    content = png_with((b"zTXt", b"Raw profile type exif\0\0" + LONG))
    with pytest.raises(BadRecord, match=r"image: metadata: .*'a\.png': ValueError: .*MAX_TEXT"):
        read(tmp_path, content, "a.png")


def test_decompression_bombs_raise(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    with pytest.raises(BadRecord, match=r"image: too many pixels: .*MAX_IMAGE_PIXELS.*1536 pixels"):
        read(tmp_path, PICTURE, "a.png")


@pytest.mark.parametrize("background", [(1, 2), (1, 2, 300), (1.0, 2, 3), "no colour", "#11223344"])
def test_invalid_background_raises(tmp_path, background):
    (tmp_path / "data.json").write_text("[]")
    for use in (Conversations, Captions, check):
        with pytest.raises(ValueError, match="background is no colour, expected three whole"):
            use(tmp_path / "data.json", tmp_path, background=background)
    options = ["--data", str(tmp_path / "data.json"), "--images", str(tmp_path)]
    command = ["data", "check", *options, "--background", "no colour"]
    found = CliRunner().invoke(main.app, command)
    assert found.exit_code == main.Exit.USAGE and "--background: " in found.stderr
