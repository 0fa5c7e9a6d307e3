"""Tests load_image: every kind of source gives the same pixels, and every mistake one line that names the source."""

import base64
import functools
import io
import struct
import threading
import zlib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from vica.data import images
from vica.data.images import check_enlarged, load_image, pad_to_square
from vica.utils.errors import ViCAError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(PIXELS).save(path)
    return path


@pytest.fixture
def server(tmp_path):
    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            """Keeps stderr clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=tmp_path))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def complaint(source) -> str:
    with pytest.raises(ViCAError) as error:
        load_image(source)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 350
    return message


def png_header(width: int, height: int) -> bytes:
    """Returns a PNG of that size whose pixels are missing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_every_kind_of_source(picture):
    content = picture.read_bytes()
    with picture.open("rb") as file:
        sources = [
            picture,
            str(picture),
            content,
            bytearray(content),
            file,
            io.BytesIO(content),
            Image.open(picture),
            "data:image/png;base64," + base64.b64encode(content).decode(),
            PIXELS,
            torch.from_numpy(PIXELS),
        ]
        for source in sources:
            image = load_image(source)
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), PIXELS)


def test_a_long_path_is_shown_by_its_end(tmp_path):
    path = tmp_path / ("folder" * 30) / "broken.png"
    path.parent.mkdir()
    path.write_bytes(b"no picture")
    for source in (path, str(path)):
        assert "broken.png': not an image" in complaint(source) and "image '..." in complaint(source)
    assert "broken.png': no such file" in complaint(path.parent / "none" / path.name)
    assert "data:image/png;base64,AAAA" in complaint("data:image/png;base64," + "A" * 400)


def test_download(picture, server):
    np.testing.assert_array_equal(np.asarray(load_image(f"{server}/{picture.name}")), PIXELS)


def test_download_errors(picture, server, monkeypatch):
    assert "the server answered 404" in complaint(f"{server}/absent.png")
    monkeypatch.setattr(images, "DOWNLOAD_BYTES", picture.stat().st_size - 1)
    assert "larger than" in complaint(f"{server}/{picture.name}")
    monkeypatch.setattr(images, "DOWNLOAD_BYTES", picture.stat().st_size)
    load_image(f"{server}/{picture.name}")
    assert "cannot be downloaded" in complaint("http://127.0.0.1:9/picture.png")
    assert "cannot be" in complaint("http://")


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_any_mode_becomes_rgb_as_pillow_converts(mode):
    image = Image.fromarray(PIXELS).convert(mode)
    loaded = load_image(image)
    assert loaded.mode == "RGB"
    assert loaded.tobytes() == image.convert("RGB").tobytes()


def test_exif_orientation_is_left_alone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.fromarray(PIXELS).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "turned.png")), PIXELS)


def test_unreadable_images_are_errors(picture, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:60])
    empty = tmp_path / "empty.png"
    empty.touch()
    assert complaint(tmp_path / "absent.png") == f"image '{tmp_path / 'absent.png'}': no such file"
    assert complaint(str(tmp_path)) == f"image '{tmp_path}': is a directory, not an image file"
    assert complaint(text) == f"image '{text}': not an image in a format that Pillow reads"
    assert f"image '{broken}': cannot be read (" in complaint(broken)
    assert f"image '{empty}': not an image" in complaint(empty)
    assert "image of 8 bytes: not an image" in complaint(b"no image")
    assert "image of type BytesIO: not an image" in complaint(io.BytesIO(b"no image"))
    assert "image of type int: is neither a path, a URL" in complaint(3)
    assert "image of type NoneType" in complaint(None)
    assert "cannot be read (" in complaint("a\0b")
    assert "..." in complaint("a" * 5000)


def test_lazily_opened_truncated_image(picture):
    assert "image of type PngImageFile: cannot be read" in complaint(Image.open(io.BytesIO(picture.read_bytes()[:60])))


def test_broken_data_urls():
    assert "must read data:image/<type>;base64" in complaint("data:image/png,abc")
    assert "must read data:image/<type>;base64" in complaint("data:image/png;base64")
    assert "its base64 content is broken" in complaint("data:image/png;base64,a")
    assert "its base64 content is broken" in complaint("data:image/png;base64,abc$d")
    message = complaint("data:image/png;base64," + base64.b64encode(b"no image" * 1000).decode())
    assert message.startswith("image 'data:image/png;base64,bm8ga")
    assert message.endswith("...: not an image in a format that Pillow reads")


def test_a_source_that_fails_in_several_lines():
    class Failing(io.BytesIO):
        def read(self, *_):
            raise OSError("the disk\nis gone")

    assert complaint(Failing()) == "image of type Failing: cannot be read (the disk is gone)"


def test_arrays_of_another_shape_or_type():
    assert "must be uint8 [height, width, 3], got float32 [5, 7, 3]" in complaint(PIXELS.astype(np.float32))
    assert "got uint8 [3, 5, 7]" in complaint(PIXELS.transpose(2, 0, 1))
    assert "got uint8 [5, 7]" in complaint(PIXELS[..., 0])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(30000, 30000), (10000, 10000)])
def test_decompression_bomb_is_refused_before_decoding(size, tmp_path):
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_header(*size))
    message = complaint(bomb)
    assert message.startswith(f"image '{bomb}'")
    assert f"more than PIL.Image.MAX_IMAGE_PIXELS = {Image.MAX_IMAGE_PIXELS} pixels" in message


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_is_pillows_and_exact(picture, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 35)
    load_image(picture)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 34)
    assert "MAX_IMAGE_PIXELS = 34" in complaint(picture)
    assert "MAX_IMAGE_PIXELS = 34" in complaint(PIXELS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    load_image(picture)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_the_limit_where_warnings_are_errors(picture, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 34)
    assert "MAX_IMAGE_PIXELS = 34" in complaint(picture)


@pytest.mark.parametrize(("height", "width", "top", "left"), [(5, 8, 1, 0), (8, 5, 0, 1), (7, 2, 0, 2), (4, 4, 0, 0)])
def test_pad_to_square(height, width, top, left):
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    side = max(height, width)
    expected = np.full((side, side, 3), (122, 116, 104), dtype=np.uint8)
    expected[top : top + height, left : left + width] = pixels
    padded = pad_to_square(Image.fromarray(pixels), (122, 116, 104))
    np.testing.assert_array_equal(np.asarray(padded), expected)


def test_a_thin_long_image_is_not_padded_into_a_bomb():
    with pytest.raises(ViCAError, match="16000x1 is too long to be padded"):
        pad_to_square(Image.new("RGB", (16000, 1)), (0, 0, 0))


@pytest.mark.parametrize("size", [(60000, 1), (1, 60000)])
def test_a_thin_long_image_is_not_enlarged_into_a_bomb(size):
    check_enlarged(Image.new("RGB", (600, 1)), 336)
    with pytest.raises(ViCAError, match=f"{size[0]}x{size[1]} is too long to be resized to 336 pixels"):
        check_enlarged(Image.new("RGB", size), 336)
