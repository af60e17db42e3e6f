"""Pictures of every depth and mode become what they show, in 8 bits and the channels asked for."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models
from torchvision.transforms import functional as F

from retrofit import RetrofitError
from retrofit.pictures.batches import PictureBatches
from retrofit.pictures.eight_bits import eight_bits
from retrofit.pictures.preprocessing import preprocessing
from retrofit.pictures.sources import open_pictures

RAMP = np.linspace(0, 65535, 24 * 32).round().astype(np.uint16).reshape(24, 32)
WANTED = np.rint(RAMP / 65535 * 255)  # by floats
PRESET = models.VGG16_Weights.DEFAULT.transforms


def saved(pixels, kind):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def tiff(values, bits, *, photometric=1, sample_format=1, data=None):
    """A grey TIFF of kinds that PIL does not write: signed, or of 12 bits, or where white is 0."""
    (height, width), data = values.shape, data or values.tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1,
            278: height, 279: len(data), 339: sample_format}  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


def png(values, colour_type):
    """A PNG of 16 bits with any number of channels, which PIL does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    size = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)
    parts = {b"IHDR": size, b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts.items()
    )


GREY = {
    "16 bits, PNG": saved(RAMP, "PNG"),
    "16 bits, TIFF": saved(RAMP, "TIFF"),
    "16 bits, TIFF, big-endian": saved(RAMP.astype(">u2"), "TIFF"),
    "16 bits, PGM": b"P5 32 24 65535\n" + RAMP.astype(">u2").tobytes(),
    "16 bits, TIFF, white is zero": tiff(65535 - RAMP, 16, photometric=0),
    "32 bits, TIFF": saved(RAMP.astype(np.int32), "TIFF"),
    "floats, TIFF": saved((RAMP / 65535).astype(np.float32), "TIFF"),
    "floats, TIFF, white is zero": tiff(
        (1 - RAMP / 65535).astype(np.float32), 32, photometric=0, sample_format=3
    ),
}


@pytest.mark.parametrize("content", GREY.values(), ids=GREY)
@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_grey_pictures_of_every_depth_are_scaled_and_not_cut_off(content, channels, mode):
    picture = eight_bits(Image.open(io.BytesIO(content)), channels)
    assert picture.mode == mode
    assert np.array_equal(np.asarray(picture.convert("L")), WANTED)


def test_of_12_bits_white_is_4095():
    bits = "".join(f"{value >> 4:012b}" for value in RAMP.flat)
    content = tiff(RAMP, 12, data=int(bits, 2).to_bytes(len(bits) // 8, "big"))
    seen = np.asarray(eight_bits(Image.open(io.BytesIO(content)), 1))
    assert np.array_equal(seen, np.rint((RAMP >> 4) / 4095 * 255))


def test_a_dark_picture_stays_dark_where_its_format_says_what_is_white():
    dark = (RAMP // 400).astype(np.uint16)
    for content in (saved(dark, "PNG"), b"P5 32 24 65535\n" + dark.astype(">u2").tobytes()):
        assert np.asarray(eight_bits(Image.open(io.BytesIO(content)), 1)).max() == 1


@pytest.mark.parametrize("alpha", [False, True])
def test_of_16_bit_colours_pil_takes_the_high_bytes_which_is_right(alpha):
    colours = np.random.default_rng(0).integers(0, 65536, (24, 32, 4 if alpha else 3))
    picture = Image.open(io.BytesIO(png(colours, 6 if alpha else 2)))
    seen = np.asarray(eight_bits(picture, 4 if alpha else 3)).astype(int)
    assert np.array_equal(seen, colours >> 8)
    assert np.abs(seen - colours / 257).max() <= 1


MODES = ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "RGBX", "La", "RGBa"]
STEPS = {"La": ("LA",), "RGBa": ("RGBA",), "RGBA": ("RGBA",), "PA": ("P",)}


@pytest.mark.parametrize("mode", MODES)
def test_8_bit_modes_are_converted_as_pil_does(mode):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 9, 4), dtype=np.uint8))
    if mode == "LAB":  # which PIL converts nothing to
        picture = Image.merge("LAB", noise.split()[:3])
    else:
        for step in STEPS.get(mode, ("RGB",)):
            noise = noise.convert(step)
        picture = noise.convert(mode)
    # PIL takes premultiplied colours back to plain ones only.
    plain = picture.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode))
    assert np.array_equal(eight_bits(picture), plain.convert("RGB"))
    in_grey = plain.convert("RGB").convert("L") if mode == "LAB" else plain.convert("L")
    assert np.array_equal(eight_bits(picture, 1), in_grey)


def test_arrays_of_other_channels_than_the_network_takes_are_refused():
    for channels, takes in ((2, 3), (3, 1), (1, 2)):
        with pytest.raises(ValueError, match=rf"it has {channels} channels?, and .* takes {takes}"):
            eight_bits(np.zeros((8, 9, channels), np.uint8), takes)
    assert np.asarray(eight_bits(np.zeros((8, 9, 1), np.uint8), 3)).shape == (8, 9, 3)


def test_a_network_of_four_channels_sees_the_alpha_and_needs_one():
    rgba = np.random.default_rng(0).integers(0, 256, (8, 9, 4), dtype=np.uint8)
    assert np.array_equal(eight_bits(Image.fromarray(rgba), 4), rgba)
    grey = Image.fromarray(rgba[:, :, 0]).convert("LA")
    assert np.asarray(eight_bits(grey, 4)).shape == (8, 9, 4)
    palette = Image.new("P", (4, 4))
    palette.info["transparency"] = 0
    assert not np.asarray(eight_bits(palette, 4))[..., 3].any()
    for mode in ("RGB", "L", "CMYK", "I;16"):
        with pytest.raises(
            ValueError, match=f"it is {mode}, without alpha, and the network takes 4"
        ):
            eight_bits(Image.new(mode, (4, 4)), 4)


WHITE_UNKNOWN = [
    (np.array([[0, 1.1]], np.float32), r"its floats are from 0 to 1.1: scale them to 0 .* to 1 "),
    (np.array([[-0.5, 0.5]], np.float32), "its floats are from -0.5 to 0.5"),
    (np.array([[0, np.nan]], np.float32), "NaN or Inf"),
    (np.array([[0, np.inf]], np.float32), "NaN or Inf"),
    (
        np.array([[0, 65536]], np.int32),
        "its integers are from 0 to 65536, and what is white cannot",
    ),
    (np.array([[-1, 300]], np.int32), "its integers are from -1 to 300"),
    (np.array([[0, 255]], np.int32), r"its integers are from 0 to 255.* with 8 bits, or with 16"),
]


@pytest.mark.parametrize(("values", "message"), WHITE_UNKNOWN)
def test_numbers_whose_white_cannot_be_told_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        eight_bits(Image.open(io.BytesIO(saved(values, "TIFF"))))
    with pytest.raises(ValueError, match=message):
        eight_bits(values[:, :, None])


def test_signed_numbers_of_16_bits_are_refused_below_zero():
    content = tiff(np.array([[-1, 300]], np.int16), 16, sample_format=2)
    with pytest.raises(ValueError, match="its integers are from -1 to 300"):
        eight_bits(Image.open(io.BytesIO(content)))


ARRAYS = {
    "uint16": RAMP,
    "uint16, big-endian": RAMP.astype(">u2"),
    "float64": RAMP / 65535,
    "float32": (RAMP / 65535).astype(np.float32),
    "beyond by rounding": (RAMP / 65535) * (1 + 1e-7),
}


@pytest.mark.parametrize("values", ARRAYS.values(), ids=ARRAYS)
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_are_scaled_too(values, channels):
    picture = eight_bits(values[:, :, None], channels)
    assert len(picture.getbands()) == channels
    assert np.array_equal(np.asarray(picture.convert("L")), WANTED)


def test_black_and_white_arrays_are_0_and_255():
    assert np.array_equal(eight_bits(RAMP[:, :, None] > 99, 1), 255 * (RAMP > 99))


# --- through the transform ---------------------------------------------------------------------


def first_batch(path, *, channels=3, count=4, **options):
    transform = preprocessing(crop=24, channels=channels, **options)
    pictures = open_pictures(path)
    batches = PictureBatches(
        pictures, range(count), transform, batch_size=count, workers=0, channels=channels
    )
    return next(iter(batches))


def test_ordinary_pictures_come_out_as_torchvisions_preset_makes_them(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (4, 30, 40, 3), dtype=np.uint8)
    np.save(tmp_path / "colours.npy", colours)
    np.save(tmp_path / "grey.npy", colours[..., :1])
    (tmp_path / "files").mkdir()
    for i, pixels in enumerate(colours):
        Image.fromarray(pixels).save(tmp_path / "files" / f"{i}.png")
    preset = PRESET(crop_size=24, resize_size=24)
    wanted = torch.stack([preset(Image.fromarray(pixels)) for pixels in colours])
    assert torch.equal(first_batch(tmp_path / "files"), wanted)
    assert torch.equal(first_batch(tmp_path / "colours.npy"), wanted)
    grey = [preset(Image.fromarray(pixels[..., 0]).convert("RGB")) for pixels in colours]
    assert torch.equal(first_batch(tmp_path / "grey.npy"), torch.stack(grey))


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 12])
def test_arrays_of_any_number_of_channels_are_resized_cropped_and_normalised(tmp_path, channels):
    values = np.random.default_rng(0).integers(0, 256, (4, 48, 60, channels), dtype=np.uint8)
    np.save(tmp_path / "a.npy", values)
    mean, std = np.linspace(0.2, 0.6, channels), np.linspace(0.1, 0.4, channels)
    batch = first_batch(tmp_path / "a.npy", channels=channels, mean=list(mean), std=list(std))
    # In floats, each channel on its own.
    small = F.resize(torch.from_numpy(values).permute(0, 3, 1, 2).double() / 255, 24)
    wanted = F.center_crop(small, 24).sub(torch.tensor(mean)[:, None, None])
    wanted = wanted / torch.tensor(std)[:, None, None]
    assert (batch - wanted).abs().max() < 1.01 * 0.5 / 255 / std.min() + 1 / 255 / std.min()


def test_one_mean_and_std_are_for_all_channels(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((4, 30, 40, 3)))
    one = first_batch(tmp_path / "a.npy", mean=[0.5], std=[0.25])
    assert torch.equal(one, first_batch(tmp_path / "a.npy", mean=[0.5] * 3, std=[0.25] * 3))


def test_a_state_is_of_as_many_channels_as_it_was_taken_with(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 30, 40), dtype=np.uint8))

    def batches(channels):
        transform = preprocessing(crop=24, channels=3, mean=[0.5], std=[0.5])
        options = {"batch_size": 2, "workers": 0, "channels": channels}
        return PictureBatches(open_pictures(tmp_path / "a.npy"), range(4), transform, **options)

    with pytest.raises(RetrofitError, match=r"another data set: .*, of 1 channel, not"):
        batches(3).load_state_dict(batches(1).state_dict())


def test_the_first_frame_of_several_is_used(tmp_path):
    frames = [Image.fromarray(np.full((8, 8), value, np.uint16)) for value in (51400, 0)]
    for name in ("a.gif", "a.tif"):
        first, second = frames if name == "a.tif" else [eight_bits(f, 1) for f in frames]
        first.save(tmp_path / name, save_all=True, append_images=[second])
        with Image.open(tmp_path / name) as opened:
            assert (np.asarray(eight_bits(opened)) == 200).all()


@pytest.mark.parametrize("kind", [">u2", ">f4", ">f8", ">f2"])
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_arrays_of_the_other_byte_order_hold_the_same_pictures(tmp_path, kind, suffix):
    numbers = np.random.default_rng(0).integers(0, 256, (4, 30, 40, 3))
    scaled = numbers * 257 if kind == ">u2" else numbers / 255
    np.save(tmp_path / "bytes.npy", numbers.astype(np.uint8))
    arrays = {"pictures": scaled.astype(kind), "labels": np.arange(4, dtype=">i4")}
    if suffix == "npy":
        np.save(tmp_path / "other.npy", arrays["pictures"])
    else:
        np.savez(tmp_path / "other.npz", **arrays)
    same = first_batch(tmp_path / f"other.{suffix}")
    assert torch.equal(same, first_batch(tmp_path / "bytes.npy"))


def test_numbers_of_8_bits_are_noticed_in_either_byte_order(tmp_path):
    np.save(tmp_path / "a.npy", np.full((4, 30, 40), 200, dtype=">u2"))
    with pytest.raises(RetrofitError, match="uint16, where 65535 is white, and all below 256"):
        first_batch(tmp_path / "a.npy")
