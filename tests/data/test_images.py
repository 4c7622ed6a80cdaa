"""The one reader of images gives what ``transformers.image_utils.load_image`` gives, from every source."""

from __future__ import annotations

import io
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image

from dop_search.data.images import check_image, read_image
from dop_search.data.jsonl import read_jsonl
from dop_search.data.pools import open_pool
from dop_search.data.sources import DatasetSource
from dop_search.utils.errors import DataError

ORIENTATION = 0x0112


def picture(mode="RGB", size=(14, 9)):
    rng = np.random.default_rng(len(mode))
    colours = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8), "RGBA")
    return colours.convert("RGB").convert(mode) if mode not in ("RGBA", "LA") else colours.convert(mode)


def saved(path, mode, **options):
    picture(mode).save(path, **options)
    return path


def rotated(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return {"exif": exif}


ORDINARY = [
    *((f"{mode}.png", mode, {}) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")),
    ("transparent.png", "P", {"transparency": 3}),
    *((f"{mode}.jpg", mode, {}) for mode in ("RGB", "L", "CMYK")),
    *((f"turned{n}.jpg", "RGB", rotated(n)) for n in range(1, 9)),
    ("turned.png", "RGB", rotated(6)),
    ("a.webp", "RGBA", {}),
    ("a.gif", "P", {"save_all": True, "append_images": [Image.new("P", (14, 9))]}),
    ("a.tiff", "CMYK", {}),
    ("a.bmp", "RGB", {}),
]


@pytest.mark.parametrize(("name", "mode", "options"), ORDINARY, ids=[name for name, _, _ in ORDINARY])
def test_ordinary_files_are_read_as_transformers_reads_them(name, mode, options, tmp_path):
    path = saved(tmp_path / name, mode, **options)
    expected = np.asarray(load_image(str(path)))
    for source in (path, str(path), path.read_bytes(), {"bytes": path.read_bytes(), "path": None}, Image.open(path)):
        image = read_image(source, "here")
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), expected)


def test_every_source_gives_the_same_pixels(tmp_path):
    """A phone's photo, as data sets with an image column, lines of a file and tasks of lmms-eval hold it."""
    import datasets

    from dop_search.evaluation.lmms.model import _media

    path = saved(tmp_path / "phone.jpg", "RGB", **rotated(6))
    expected = np.asarray(load_image(str(path)))
    assert expected.shape == (14, 9, 3), "turned upright"
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "phone.jpg", "question": "?"}))
    table = datasets.Dataset.from_list([{"image": str(path), "question": "?", "answer": "a"}] * 2)
    table.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "decoded.parquet"))
    datasets.Dataset.from_list([{"image": path.read_bytes(), "question": "?", "answer": "a"}]).to_parquet(
        str(tmp_path / "bytes.parquet")
    )
    found = [
        read_jsonl(tmp_path / "a.jsonl")[0].sample().image,
        open_pool(DatasetSource(path=str(tmp_path / "decoded.parquet"), split="train")).sample(0).image,
        open_pool(DatasetSource(path=str(tmp_path / "bytes.parquet"), split="train")).sample(0).image,
        _media(str(path))["image"],
        _media(Image.open(path))["image"],
    ]
    for image in found:
        assert np.array_equal(np.asarray(image), expected)


# -- more than 8 bits -----------------------------------------------------------------------------

DEEP = np.random.default_rng(0).integers(0, 65536, (9, 14)).astype(np.uint16)
DEEP[0, :2] = 0, 65535


def chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def colour_png(values):
    """A PNG with 16 bits per colour, which Pillow reads and cannot write."""
    header = values.shape[1].to_bytes(4, "big") + values.shape[0].to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    rows = b"".join(b"\0" + np.repeat(row[:, None], 3, axis=1).astype(">u2").tobytes() for row in values)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_16_bits_of_grey_are_read_as_16_bits_of_colour_are(tmp_path):
    """The same greys as a colour image, which transformers reads right: ``value // 256``."""
    (tmp_path / "colour.png").write_bytes(colour_png(DEEP))
    expected = np.asarray(load_image(str(tmp_path / "colour.png")))
    Image.fromarray(DEEP).save(tmp_path / "grey.png")
    Image.fromarray(DEEP).save(tmp_path / "grey.tiff")
    (tmp_path / "grey.pgm").write_bytes(b"P5 14 9 65535\n" + DEEP.astype(">u2").tobytes())
    for name in ("colour.png", "grey.png", "grey.tiff", "grey.pgm"):
        assert np.array_equal(np.asarray(read_image(tmp_path / name, "here")), expected), name


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.linspace(0, 1, 126, dtype=np.float32), np.round(np.linspace(0, 1, 126) * 255)),
        (np.arange(126, dtype=np.float32), np.arange(126)),
        (np.arange(126, dtype=np.int32) * 2, np.arange(126) * 2),
    ],
)
def test_floats_and_integers_of_a_known_range_are_scaled(values, expected, tmp_path):
    Image.fromarray(values.reshape(9, 14)).save(tmp_path / "a.tiff")
    found = np.asarray(read_image(tmp_path / "a.tiff", "here"))
    assert np.abs(found[:, :, 1].ravel() - expected).max() <= 1e-6 + (values.dtype == np.float32 and values.max() <= 1)


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(-1, 1, 126, dtype=np.float32),
        np.linspace(0, 4000, 126, dtype=np.float32),
        np.full(126, np.nan, dtype=np.float32),
        np.arange(126, dtype=np.int32) * 1000,
        np.arange(126, dtype=np.uint16),
    ],
    ids=["signed", "large", "nan", "integers", "8 bits in 16"],
)
def test_a_range_that_says_nothing_about_brightness_is_refused(values, tmp_path):
    Image.fromarray(values.reshape(9, 14)).save(tmp_path / "a.tiff")
    with pytest.raises(
        DataError, match=r"here: cannot read the image '.*a\.tiff' \(.*; save it with 8.*fix or drop it"
    ):
        read_image(tmp_path / "a.tiff", "here")


# -- no image -------------------------------------------------------------------------------------


def test_pipes_devices_and_folders_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero"), tmp_path):
        for read in (read_image, check_image):
            with pytest.raises(DataError, match=r"not a regular file"):
                read(path, "here")
    with pytest.raises(DataError, match=r"no such file"):
        read_image(tmp_path / "absent.png", "here")
    with pytest.raises(DataError, match=r"here: an image is needed, but got list"):
        read_image([Image.new("RGB", (2, 2))], "here")


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path):
    header = (30_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(png)
    for read in (read_image, check_image):
        with pytest.raises(DataError, match=r"decompression bomb"):
            read(tmp_path / "bomb.png", "here")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_bytes_are_an_image_or_refused_in_words(data):
    """Damaged files of every format: what is read is what transformers reads, where that reads anything."""
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "none"]))
    buffer = io.BytesIO()
    if kind != "none":
        options = rotated(data.draw(st.integers(0, 9))) if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
        picture(size=(5, 4)).save(buffer, kind, **options)
    content = buffer.getvalue()
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(content)))
        content = content[:at] + data.draw(st.binary(max_size=6)) + content[at + data.draw(st.integers(0, 9)) :]
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    try:
        image = read_image(content, "here")
    except DataError:
        return
    assert image.mode == "RGB"
    if Image.open(io.BytesIO(content)).mode[0] not in "IF":
        assert np.array_equal(np.asarray(image), np.asarray(load_image(Image.open(io.BytesIO(content)))))
