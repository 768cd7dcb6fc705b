"""Pixels against Pillow, numpy and colour profiles with a known effect."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from ideoflow.captions.boxes import Geometry
from ideoflow.data.pictures import (
    PICTURE_SUFFIXES,
    find_pictures,
    open_picture,
    picture_digest,
    shown_size,
    visible_files,
)
from ideoflow.data.pixels import load_pixels, to_srgb
from ideoflow.data.survey import Sample
from ideoflow.diagnostics import IdeoflowError
from ideoflow.diagnostics.codes import data as codes


def load(file, size=None, crop=None):
    """The pixels as (height, width, 3) bytes; at its own size unless another is given."""
    with open_picture(file) as image:
        shown = shown_size(image)
    pixels = load_pixels(Sample(file, size or shown, Geometry(*shown, crop), ""))
    assert pixels.dtype == torch.float32 and pixels.shape == (3, *(size or shown)[::-1])
    assert pixels.min() >= -1 and pixels.max() <= 1
    return ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "jpg"])
@pytest.mark.parametrize("value", [*range(9), 77])
def test_orientation(picture, tmp_path, suffix, value):
    file, lossless = tmp_path / f"a.{suffix}", {"webp": {"lossless": True}, "jpg": {"quality": 100}}
    picture(40, 24).save(file, exif=orientation(value), **lossless.get(suffix, {}))
    with Image.open(file) as image:
        image.load()
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert (load(file) == expected).all()
    assert expected.shape == ((40, 24, 3) if value in (5, 6, 7, 8) else (24, 40, 3))


def test_crop_and_size(picture, tmp_path):
    picture(64, 48).save(tmp_path / "a.png")
    whole = load(tmp_path / "a.png")
    assert (load(tmp_path / "a.png", (20, 10), (5, 6, 25, 16)) == whole[6:16, 5:25]).all()
    half = load(tmp_path / "a.png", (32, 24))
    mean = whole.reshape(24, 2, 32, 2, 3).mean((1, 3))
    assert abs(half - mean).mean() < 2, "shrinking averages"


def test_alpha_is_laid_on_white(picture, tmp_path):
    rgba = picture(16, 8).convert("RGBA")
    alpha = np.linspace(0, 255, 16 * 8).reshape(8, 16).astype(np.uint8)
    rgba.putalpha(Image.fromarray(alpha))
    rgba.save(tmp_path / "a.png")
    share = alpha[..., None] / 255
    expected = np.asarray(rgba)[..., :3] * share + 255 * (1 - share)
    assert abs(load(tmp_path / "a.png") - expected).max() <= 1


def test_grey_with_alpha_and_one_transparent_colour(tmp_path):
    grey = np.tile(np.array([0, 128, 255, 40], np.uint8), (2, 1))
    Image.merge("LA", [Image.fromarray(grey), Image.fromarray(255 - grey)]).save(tmp_path / "la.png")
    assert abs(load(tmp_path / "la.png")[0, :, 0].astype(int) - [0, 192, 255, 74]).max() <= 1
    Image.fromarray(grey).save(tmp_path / "l.png", transparency=128)
    assert load(tmp_path / "l.png")[0, :, 0].tolist() == [0, 255, 255, 40]


def test_a_palette_with_transparency(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), mode="P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "one.png", transparency=1)
    assert load(tmp_path / "one.png")[0].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]
    image.save(tmp_path / "each.png", transparency=bytes([255, 0, 128]))
    assert abs(load(tmp_path / "each.png")[0, 2].astype(int) - [127, 127, 255]).max() <= 1
    image.save(tmp_path / "none.gif")
    assert load(tmp_path / "none.gif")[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_black_and_white_and_grey(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "1.png")
    assert load(tmp_path / "1.png")[0].tolist() == [[255] * 3, [0] * 3]
    Image.fromarray(np.array([[7, 200]], np.uint8)).save(tmp_path / "l.png")
    assert load(tmp_path / "l.png")[0].tolist() == [[7] * 3, [200] * 3]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_and_not_cut(tmp_path, suffix):
    values = np.array([[0, 256, 257, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    assert load(tmp_path / f"a.{suffix}")[0, :, 1].tolist() == (values[0] / 257).round().tolist()


def test_floats_run_from_0_to_1(tmp_path):
    Image.fromarray(np.array([[-1, 0, 0.5, 1, 9]], np.float32)).save(tmp_path / "a.tiff")
    assert load(tmp_path / "a.tiff")[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_cmyk(picture, tmp_path):
    cmyk = picture(32, 32).convert("CMYK")
    cmyk.save(tmp_path / "a.tiff")
    assert (load(tmp_path / "a.tiff") == np.asarray(cmyk.convert("RGB"))).all()
    cmyk.save(tmp_path / "a.jpg", quality=100)
    assert abs(load(tmp_path / "a.jpg").astype(int) - np.asarray(cmyk.convert("RGB"))).mean() < 3


def test_lab(tmp_path):
    """CIE L* of 0, 53.4 and 100 with a = b = 0 are the greys 0, 127.5 and 255 of sRGB."""
    lab = np.zeros((1, 3, 3), np.uint8)
    lab[0, :, 0] = [0, 136, 255]
    Image.fromarray(lab, mode="LAB").save(tmp_path / "a.tiff")
    assert abs(load(tmp_path / "a.tiff")[0].astype(int) - [[0], [127], [255]]).max() <= 2


# Colour profiles ------------------------------------------------------------------------------------------


def fixed(*values):
    return b"".join(struct.pack(">i", round(v * 65536)) for v in values)


def profile(gamma, swap):
    """A matrix profile with sRGB's primaries (adapted to D50) and a plain gamma; red and blue exchanged if
    ``swap``. Laid out as ICC.1:2010 says, since ImageCms makes no RGB profile but sRGB.
    """
    columns = [
        (0.4360747, 0.2225045, 0.0139322),
        (0.3850649, 0.7168786, 0.0971045),
        (0.1430804, 0.0606169, 0.7141733),
    ]
    columns = columns[::-1] if swap else columns
    names = (b"rXYZ", b"gXYZ", b"bXYZ")
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {
        b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249),
        **{n: b"XYZ " + bytes(4) + fixed(*c) for n, c in zip(names, columns, strict=True)},
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0\0\0\0",
    }  # fmt: skip
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head + bytes(128 - len(head)) + table + body


def srgb_from_linear(x):
    """IEC 61966-2-1."""
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize(("gamma", "swap"), [(1.0, False), (1.8, False), (2.2, True)])
def test_an_embedded_profile_is_applied(tmp_path, gamma, swap, mode):
    values = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(values).convert(mode).save(tmp_path / "a.png", icc_profile=profile(gamma, swap))
    with Image.open(tmp_path / "a.png") as image:
        stored = np.asarray(image.convert("RGB"))  # a palette rounds the colours
    expected = srgb_from_linear((stored / 255.0) ** gamma) * 255
    expected = expected[..., ::-1] if swap else expected
    assert abs(load(tmp_path / "a.png") - expected).max() <= 2


def test_an_srgb_profile_changes_nothing(picture, tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture().save(tmp_path / "with.png", icc_profile=srgb)
    picture().save(tmp_path / "without.png")
    assert abs(load(tmp_path / "with.png").astype(int) - load(tmp_path / "without.png")).max() <= 1


@pytest.mark.parametrize("broken", [b"", b"no profile", profile(1.8, False)[:200]])
def test_a_broken_profile_leaves_the_values(picture, tmp_path, broken):
    picture().save(tmp_path / "a.png", icc_profile=broken)
    assert (load(tmp_path / "a.png") == np.asarray(picture())).all()


def test_a_profile_of_another_colour_space_leaves_the_values(tmp_path):
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    grey.save(tmp_path / "a.png", icc_profile=profile(1.0, False))
    assert (load(tmp_path / "a.png")[..., 0] == np.asarray(grey)).all()


# Damage ---------------------------------------------------------------------------------------------------


def refused(file):
    with pytest.raises(IdeoflowError) as caught:
        load_pixels(Sample(file, (16, 16), Geometry(16, 16), ""))
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code is codes.BAD_PICTURE and diagnostic.span.path == str(file)
    assert file.name in diagnostic.message
    return diagnostic


def test_a_decompression_bomb(tmp_path):
    """A PNG that promises 20000 x 20000 pixels in 60 bytes."""
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c))
        for n, c in ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    )
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    diagnostic = refused(tmp_path / "bomb.png")
    assert "too large" in diagnostic.message and "400000000 pixels" in diagnostic.message


def test_a_large_photograph_is_no_bomb(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (40, 40)).save(tmp_path / "large.png")  # between the warning and the error
    load(tmp_path / "large.png")
    assert not recwarn.list
    Image.new("RGB", (50, 50)).save(tmp_path / "larger.png")
    assert "too large" in refused(tmp_path / "larger.png").message


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tiff", "avif"])
def test_a_truncated_picture(picture, tmp_path, suffix):
    stream = io.BytesIO()
    picture().save(stream, {"jpg": "jpeg"}.get(suffix, suffix))
    for share in (0, 0.01, 0.5, 0.9):
        file = tmp_path / f"a.{suffix}"
        file.write_bytes(stream.getvalue()[: int(len(stream.getvalue()) * share)])
        refused(file)


def test_what_is_gone_is_told(tmp_path):
    refused(tmp_path / "gone.png")
    with pytest.raises(IdeoflowError) as caught:
        picture_digest(tmp_path / "gone.png")
    assert caught.value.diagnostics[0].code is codes.BAD_PICTURE


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_told_or_decoded(picture, tmp_path, data):
    suffix = data.draw(st.sampled_from(["jpeg", "png", "webp", "gif", "bmp", "tiff"]))
    stream = io.BytesIO()
    exif = data.draw(st.sampled_from([orientation(6).tobytes(), b"Exif\0\0II*\0\xff\xff\xff\xff", b"MM\0*"]))
    options = {"exif": exif} if suffix in ("jpeg", "png", "webp") else {}
    picture(24, 16).save(stream, suffix, icc_profile=profile(1.8, False), **options)
    content = bytearray(stream.getvalue())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "any.jpg"
    file.write_bytes(content)
    try:
        with open_picture(file) as image:
            width, height = shown_size(image)
        if width * height < 10_000:
            load_pixels(Sample(file, (16, 16), Geometry(width, height), ""))
    except IdeoflowError as error:
        assert error.diagnostics[0].code is codes.BAD_PICTURE


def test_hidden_files_and_other_kinds_are_left_out(picture, tmp_path):
    for name in ("a.JPG", "b/c.png", "b/.d.png", ".cache/e.png", "b/.x/f.png", "g.jpg.txt", "h.psd"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = [p.relative_to(tmp_path).as_posix() for p in find_pictures(visible_files(tmp_path))]
    assert found == ["a.JPG", "b/c.png"]


def test_links_are_followed_once(picture, tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    for name in ("elsewhere/deep/a.png", "b.png"):
        (tmp_path / name).touch()
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "folder").symlink_to(tmp_path / "elsewhere")
    (folder / "c.png").symlink_to(tmp_path / "b.png")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    found = [p.relative_to(folder).as_posix() for p in find_pictures(visible_files(folder))]
    assert found == ["c.png", "folder/deep/a.png"]


@pytest.mark.parametrize("suffix", sorted(PICTURE_SUFFIXES))
def test_pillow_reads_every_suffix_that_is_taken(picture, tmp_path, suffix):
    registered = Image.registered_extensions()
    file = tmp_path / f"a{suffix}"
    picture(32, 16).save(file, registered[suffix])
    assert load(file).shape == (16, 32, 3)


def test_every_mode_of_pillow_becomes_rgb():
    for mode in (
        "1",
        "L",
        "P",
        "RGB",
        "RGBA",
        "CMYK",
        "YCbCr",
        "LAB",
        "HSV",
        "I",
        "F",
        "LA",
        "I;16",
        "RGBX",
        "PA",
    ):
        assert to_srgb(Image.new(mode, (4, 4))).mode == "RGB", mode
