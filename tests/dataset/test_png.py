import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from userdiff.dataset.png import decode_png, encode_png, is_flat, is_remains, png_size, read_text_chunks


def noise(height, width, channels, seed=0, levels=256):
    return np.random.default_rng(seed).integers(0, levels, (height, width, channels), dtype=np.uint8)


@given(
    pixels=st.builds(
        noise, st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3, 4]), st.integers(0), st.integers(1, 256)
    ),
    text=st.dictionaries(
        st.from_regex(r"[a-z_]{1,20}", fullmatch=True), st.text(st.characters(codec="utf-8", exclude_characters="\0"))
    ),
    level=st.integers(0, 9),
    is_view=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_whatever_is_encoded_is_decoded_by_pillow_and_by_us(pixels, text, level, is_view):
    if is_view:  # of other strides
        pixels = pixels.transpose(1, 0, 2)[::2, ::-1]
    data = encode_png(pixels, text, level)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image).reshape(pixels.shape), pixels)
        assert image.text == text
    assert decode_png(data) == ((pixels.shape[1], pixels.shape[0]), text)
    assert png_size(data) == (pixels.shape[1], pixels.shape[0])


def test_the_fast_levels_choose_no_filter_and_cost_little():
    """Every row has the filter Sub; of a smooth image the file is about as large."""
    y, x = np.mgrid[0:128, 0:128]
    pixels = np.stack([x + y, 2 * x, 255 - y], axis=-1).clip(0, 255).astype(np.uint8)
    pixels += np.random.default_rng(0).integers(0, 4, pixels.shape, dtype=np.uint8)
    fast = encode_png(pixels, {"user_id": "1"}, 1)
    data = fast[fast.index(b"IDAT") + 4 : fast.index(b"IEND") - 8]
    rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(128, 1 + 3 * 128)
    assert set(rows[:, 0].tolist()) == {1}
    assert len(fast) < 1.3 * len(encode_png(pixels, {"user_id": "1"}))


@pytest.mark.parametrize("channels", [0, 2, 5])
def test_other_numbers_of_channels_are_refused(channels):
    with pytest.raises(ValueError, match=f"1, 3 or 4 channels.* {channels}$"):
        encode_png(np.zeros((4, 4, channels), dtype=np.uint8), {})


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


PIXELS = zlib.compress(b"\0\1\2\0\3\4")  # two rows of two grey pixels, each after its filter type


def crafted_png(*, width=2, height=2, extra=b"", pixels=PIXELS):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def with_bit_flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


WHOLE = encode_png(noise(8, 8, 3), {"user_id": "1"})
BROKEN = {
    "empty": b"",
    "text": b"an image",
    "jpeg": b"\xff\xd8\xff\xe0 JFIF",
    "pixels that are not deflated": crafted_png(pixels=b"none"),
    "an empty gamma": crafted_png(extra=chunk(b"gAMA", b"")),
    "no width": crafted_png(width=0),
    "a size that nobody can hold": crafted_png(width=60000, height=60000),
    "a changed header": with_bit_flipped(crafted_png(), 17),
    "a changed checksum of the pixels": with_bit_flipped(crafted_png(), -14),
    "a changed text": with_bit_flipped(crafted_png(extra=chunk(b"tEXt", b"a\0b")), 43),
    **{f"cut by {missing}": WHOLE[:-missing] for missing in (1, 4, 5, 12, 16, 29, len(WHOLE) // 2)},
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_what_is_no_intact_png_is_an_os_error(data):
    assert decode_png(crafted_png()) == ((2, 2), {})
    with pytest.raises(OSError, match=r"."):
        decode_png(data)


def test_text_is_read_off_a_png_and_of_a_broken_one_there_is_none(tmp_path):
    for data, text in ((WHOLE, {"user_id": "1"}), (WHOLE[:-30], {"user_id": "1"}), (WHOLE[:30], None), (b"text", None)):
        (tmp_path / "file").write_bytes(data)
        assert read_text_chunks(tmp_path / "file") == text
    assert read_text_chunks(tmp_path / "missing") is None


TEXT = {"user_id": "1", "userdiff_run": "ab"}
OURS = encode_png(noise(8, 8, 3), TEXT)


@pytest.mark.parametrize(
    "data",
    [*(OURS[:size] for size in (0, 3, 8, 20, 33, 40, 60, 100, len(OURS) - 1)), b"xx" + OURS[5:], bytes(10**6)],
)
def test_remains_of_an_image_are_known(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    assert is_remains(tmp_path / "file", TEXT)


OWN = encode_png(noise(64, 64, 3), {"Title": "my own"})


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff a photo",
        b"text",
        OWN,
        OWN + b"\n",
        OWN[:-1],
        OWN[:-200],
        OWN[:60],
        encode_png(noise(8, 8, 3), {"user_id": "2"})[:60],
        crafted_png(width=20000, height=20000),
        bytes(10**5) + b"text",
    ],
)
def test_a_file_of_somebody_is_no_remains(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    assert not is_remains(tmp_path / "file", TEXT)
    with open(tmp_path / "file", "wb") as file:
        file.truncate(10**12)  # zeros, and no room on the disk
    assert not is_remains(tmp_path / "file", TEXT)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_one_colour_is_flat_and_a_single_other_value_is_not(channels):
    pixels = np.tile(noise(1, 1, channels), (5, 7, 1))
    assert is_flat(pixels)
    pixels[4, 6, channels - 1] ^= 1
    assert not is_flat(pixels)
