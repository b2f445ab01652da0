import io
import math

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from transformers import BitImageProcessor, CLIPImageProcessorPil, ViTImageProcessor

from hf_ttame import image_processing
from hf_ttame.image_processing import (
    Placement,
    load_image,
    measure_normalisation,
    measure_placement,
    place_maps,
    preprocess,
    processor_from_timm,
)

SIZES = [(300, 200), (200, 300), (128, 128), (1, 1), (3, 5), (500, 333), (1600, 1200), (641, 97)]


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


# ---- load_image ---------------------------------------------------------------------------------------------------


def test_greyscale_fills_three_channels(tmp_path):
    values = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "grey.png")
    assert (pixels(load_image(tmp_path / "grey.png")) == values[..., None]).all()


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (16, 12), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    loaded = pixels(load_image(str(tmp_path / "a.jpg")))
    assert loaded.shape == (12, 16, 3)
    assert np.abs(loaded.astype(int) - (255, 0, 0)).max() < 12


def test_rgba_and_palette_keep_colours(tmp_path):
    Image.new("RGBA", (4, 4), (10, 20, 30, 128)).save(tmp_path / "a.png")
    assert (pixels(load_image(tmp_path / "a.png")) == (10, 20, 30)).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.save(tmp_path / "p.png")
    assert (pixels(load_image(tmp_path / "p.png")) == (200, 100, 50)).all()


def test_bilevel():
    assert (pixels(load_image(Image.new("1", (3, 2), 1))) == 255).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_is_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257, 32768], [1000, 40000, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    loaded = pixels(load_image(tmp_path / f"a.{suffix}"))
    assert (loaded[..., 0] == np.rint(values / 257)).all()
    assert loaded.max() == 255
    assert (loaded[..., 0] == 128).sum() == 1


@pytest.mark.parametrize("as_path", [True, False])
def test_exif_rotation_is_applied(tmp_path, as_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste((255, 255, 255), (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned 90 degrees clockwise: the left edge becomes the top
    image.save(tmp_path / "a.jpg", exif=exif)
    loaded = load_image(tmp_path / "a.jpg" if as_path else Image.open(tmp_path / "a.jpg"))
    assert loaded.size == (20, 40)
    assert pixels(loaded)[:6].min() > 200
    assert pixels(loaded)[16:].max() < 60


def test_one_pixel():
    assert load_image(Image.new("RGB", (1, 1), (1, 2, 3))).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_corrupt_file(tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad.png.*cannot be read"):
        load_image(tmp_path / "bad.png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated_file(tmp_path, photo, kind):
    buffer = io.BytesIO()
    photo(24, 20).save(buffer, kind)
    content = buffer.getvalue()
    path = tmp_path / "cut.img"
    refused = []
    for length in range(0, len(content) - 1, max(1, len(content) // 40)):
        path.write_bytes(content[:length])
        try:
            load_image(path)
        except ValueError as error:
            refused.append(str(error))
    assert all("cut.img" in message for message in refused)
    assert len(refused) > 10


def test_damaged_avif(damaged_avifs):
    by_pillow = set()
    for path in damaged_avifs(200):
        try:
            Image.open(path).load()
        except Exception as error:
            by_pillow.add(type(error))
            with pytest.raises(ValueError, match=r"bad\.avif"):
                load_image(path)
    assert RuntimeError in by_pillow  # which is no OSError


def test_truncated_picture_already_opened(tmp_path, photo):
    photo(64, 64).save(tmp_path / "a.jpg", quality=95)
    content = (tmp_path / "a.jpg").read_bytes()
    with pytest.raises(ValueError, match="cannot be read"):
        load_image(Image.open(io.BytesIO(content[: len(content) // 2])))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.png.*does not exist; check the path"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="cannot be read"):
        load_image(tmp_path)


def test_too_large_is_refused_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(image_processing, "MAX_PIXELS", 100)
    Image.new("RGB", (10, 10)).save(tmp_path / "fits.png")
    Image.new("RGB", (11, 10)).save(tmp_path / "large.png")
    assert load_image(tmp_path / "fits.png").size == (10, 10)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    for source in (tmp_path / "large.png", Image.new("RGB", (11, 10)), np.zeros((11, 10), np.uint8)):
        with pytest.raises(ValueError, match="between 1 and 100 are accepted"):
            load_image(source)


def test_too_thin():
    assert load_image(Image.new("RGB", (100, 1))).size == (100, 1)
    for size in ((101, 1), (2, 201)):
        with pytest.raises(ValueError, match="over 100 times the other; crop or pad it"):
            load_image(Image.new("RGB", size))


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.full((2, 3), 7, np.uint8), 7),
        (np.full((2, 3, 1), 7, np.uint8), 7),
        (np.full((2, 3, 3), 7, np.uint8), 7),
        (np.full((2, 3, 4), 7, np.uint8), 7),
        (np.full((2, 3), 0.5, np.float32), 128),
        (np.full((2, 3, 3), 1.0), 255),
        (np.full((2, 3), 0.2, np.float16), 51),
        (np.full((2, 3), 65535, np.uint16), 255),
        (np.full((2, 3, 3), 32768, np.uint16), 128),
        (np.ones((2, 3), bool), 255),
        (np.zeros((6, 4, 3), np.uint8)[::3, 1:], 0),
    ],
)
def test_arrays(array, expected):
    loaded = load_image(array)
    assert loaded.size == (3, 2)
    assert (pixels(loaded) == expected).all()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((2, 2), 1.5), "divide"),
        (np.full((2, 2), -0.1), "divide"),
        (np.full((2, 2), np.nan), "finite"),
        (np.zeros((2, 2), np.int64), "uint8, uint16, bool or float, got int64"),
        (np.zeros((2, 2), complex), "got complex128"),
        (np.zeros((3, 8, 8), np.uint8), "channels come last"),
        (np.zeros((1, 8, 8, 3), np.uint8), "channels come last"),
        (np.zeros(5, np.uint8), "channels come last"),
        (np.zeros((0, 4), np.uint8), "channels come last"),
    ],
)
def test_bad_arrays(array, message):
    with pytest.raises(ValueError, match=message):
        load_image(array)


@pytest.mark.parametrize("source", [None, 3, b"bytes", [1, 2]])
def test_other_types(source):
    with pytest.raises(TypeError, match="PIL image, a path or a numpy array"):
        load_image(source)


# ---- processors ---------------------------------------------------------------------------------------------------


def timm_cfg(size: int = 64, crop_pct: float = 0.875, **changes) -> dict:
    return {
        "input_size": (3, size, size),
        "crop_pct": crop_pct,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        **changes,
    }


def timm_transform(cfg: dict):
    return timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg))


@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.875), (64, 1.0), (90, 0.9), (64, 0.875)])
@pytest.mark.parametrize(("width", "height"), [(300, 200), (344, 256), (64, 64), (200, 300)])
def test_processor_from_timm_equals_timm_to_the_bit(photo, size, crop_pct, width, height):
    cfg = timm_cfg(size, crop_pct)
    image = photo(width, height)
    assert torch.equal(preprocess(processor_from_timm(cfg), [image])[0], timm_transform(cfg)(image))


@pytest.mark.parametrize(
    ("size", "crop_pct", "width", "height"),
    [(224, 0.875, 343, 256), (224, 0.95, 300, 200), (64, 0.95, 90, 90), (64, 1.0, 30, 41)],
)
def test_processor_from_timm_crops_an_odd_remainder_at_most_one_pixel_earlier(photo, size, crop_pct, width, height):
    cfg = timm_cfg(size, crop_pct)
    image = photo(width, height)
    ours, timms = preprocess(processor_from_timm(cfg), [image])[0], timm_transform(cfg)(image)
    shifted = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert any(torch.equal(ours[:, y:, x:], timms[:, : size - y, : size - x]) for y, x in shifted)


def test_processor_from_timm_squash(photo):
    cfg = timm_cfg(64, 1.0, crop_mode="squash")
    image = photo(120, 70)
    assert torch.equal(preprocess(processor_from_timm(cfg), [image])[0], timm_transform(cfg)(image))


@pytest.mark.parametrize("changes", [{"crop_mode": "border"}, {"input_size": (3, 64, 96)}])
def test_processor_from_timm_refuses_what_it_cannot_do(changes):
    with pytest.raises(ValueError, match="no equivalent processor; pass `processor=`"):
        processor_from_timm(timm_cfg(**changes))


def test_preprocess_takes_pictures_of_different_sizes(photo):
    images = [photo(90, 70), photo(40, 200)]
    processor = processor_from_timm(timm_cfg())
    both = preprocess(processor, images)
    assert both.shape == (2, 3, 64, 64)
    assert torch.equal(both[1:], preprocess(processor, images[1:]))


@pytest.mark.parametrize(
    "processor",
    [
        BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 48}),
        ViTImageProcessor(size={"height": 64, "width": 96}),
        CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
    ],
)
def test_measured_normalisation(processor):
    found = measure_normalisation(processor)
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    assert np.allclose(found.scale, 1 / std, atol=1e-5)
    assert np.allclose(found.shift, -mean / std, atol=1e-5)
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    assert found.size == (size["height"], size["width"])


def test_normalisation_refuses_mixed_channels(monkeypatch):
    class Grey(ViTImageProcessor):
        def __call__(self, images, **kwargs):
            return super().__call__(images.convert("L").convert("RGB"), **kwargs)

    with pytest.raises(ValueError, match="Grey does not treat the colour channels one by one"):
        measure_normalisation(Grey(size={"height": 32, "width": 32}))


def test_normalisation_refuses_other_shapes():
    class Five(ViTImageProcessor):
        def __call__(self, images, **kwargs):
            values = super().__call__(images, **kwargs)
            values["pixel_values"] = values["pixel_values"][:, None]
            return values

    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(3, 1, 3, 32, 32\) from Five"):
        measure_normalisation(Five(size={"height": 32, "width": 32}))


# ---- placement ----------------------------------------------------------------------------------------------------


def crop_placement(width: int, height: int, short: int, crop: int) -> list[tuple[float, float]]:
    """Exact (step, start) along x and y of a short-side resize and a centre crop, to half an input pixel."""
    scale = short / min(width, height)
    lines = []
    for length in (width, height):
        resized = short if length == min(width, height) else int(length * scale)
        step = length / resized
        lines.append((step, ((resized - crop) / 2 + 0.5) * step - 0.5))
    return lines


def squash_placement(width: int, height: int, out_w: int, out_h: int) -> list[tuple[float, float]]:
    return [(length / out, 0.5 * length / out - 0.5) for length, out in ((width, out_w), (height, out_h))]


def assert_placed(found: Placement, expected: list[tuple[float, float]], n: int, lengths, short=None, crop=None):
    for axis, (step, start) in enumerate(expected):
        got_step, got_start = (found.x_step, found.x_start) if axis == 0 else (found.y_step, found.y_start)
        # A crop starts at a whole pixel: half of an odd remainder is rounded up or down.
        odd = short is not None and (round(lengths[axis] / step) - crop) % 2
        starts = [start - step / 2, start + step / 2] if odd else [start]
        index = np.array([0, n - 1])
        off = min(np.abs((got_step - step) * index + got_start - s).max() / step for s in starts)
        assert off < 0.15, f"axis {axis}: {off:.3f} input pixels"


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("kind", [BitImageProcessor, CLIPImageProcessorPil])
@pytest.mark.parametrize(("short", "crop"), [(256, 224), (438, 384), (64, 56), (64, 64)])
def test_crop_is_placed(kind, width, height, short, crop):
    processor = kind(size={"shortest_edge": short}, crop_size={"height": crop, "width": crop})
    found = measure_placement(processor, measure_normalisation(processor), width, height)
    assert_placed(found, crop_placement(width, height, short, crop), crop, (width, height), short, crop)


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize(("out_w", "out_h"), [(224, 224), (64, 64), (96, 64)])
def test_squash_is_placed(width, height, out_w, out_h):
    processor = ViTImageProcessor(size={"height": out_h, "width": out_w})
    found = measure_placement(processor, measure_normalisation(processor), width, height)
    assert_placed(found, squash_placement(width, height, out_w, out_h), min(out_w, out_h), (width, height))


@pytest.mark.parametrize(("width", "height"), [(300, 200), (96, 480)])
def test_padding_is_refused(width, height):
    class Padding(ViTImageProcessor):
        def __call__(self, images, **kwargs):
            side = max(images.size)
            square = Image.new("RGB", (side, side))
            square.paste(images, ((side - images.width) // 2, (side - images.height) // 2))
            return super().__call__(square, **kwargs)

    processor = Padding(size={"height": 64, "width": 64})
    with pytest.raises(ValueError, match="Padding does more than resize and crop"):
        measure_placement(processor, measure_normalisation(processor), width, height)


def test_flip_is_refused():
    class Mirror(ViTImageProcessor):
        def __call__(self, images, **kwargs):
            return super().__call__(images.transpose(Image.Transpose.FLIP_LEFT_RIGHT), **kwargs)

    processor = Mirror(size={"height": 64, "width": 64})
    with pytest.raises(ValueError, match="cannot be placed"):
        measure_placement(processor, measure_normalisation(processor), 100, 100)


# ---- place_maps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "processor",
    [
        BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}),
        ViTImageProcessor(size={"height": 224, "width": 224}),
        CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}),
    ],
)
@pytest.mark.parametrize(("width", "height"), [(320, 200), (180, 260), (150, 150)])
def test_a_bright_square_lands_where_it_is(processor, width, height):
    left, top, side = width // 2 + 20, height // 2 - 40, 24
    image = Image.new("RGB", (width, height))
    image.paste((255, 255, 255), (left, top, left + side, top + side))
    normalisation = measure_normalisation(processor)
    values = preprocess(processor, [image])[0, :1]
    levels = (values - normalisation.shift[0]) / normalisation.scale[0]
    placement = measure_placement(processor, normalisation, width, height)
    maps, seen = place_maps(levels, placement, normalisation.size, width, height)
    placed = maps[0].clamp(0, 1).numpy()
    assert placed.shape == (height, width) == tuple(seen.shape)
    assert placed[top + 3 : top + side - 3, left + 3 : left + side - 3].min() > 0.9
    rows, columns = np.indices(placed.shape)
    assert abs((rows * placed).sum() / placed.sum() - (top + (side - 1) / 2)) < 0.5
    assert abs((columns * placed).sum() / placed.sum() - (left + (side - 1) / 2)) < 0.5
    outside = np.ones_like(placed, bool)
    outside[top - 3 : top + side + 3, left - 3 : left + side + 3] = False
    assert placed[outside].max() < 0.1


@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 300)])
def test_unseen_is_what_the_crop_cuts_away(width, height):
    processor = BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
    placement = measure_placement(processor, measure_normalisation(processor), width, height)
    maps, seen = place_maps(torch.ones(2, 7, 7), placement, (224, 224), width, height)
    kept = 224 * 200 / 256
    expected = np.zeros((height, width), bool)
    y0, x0 = (height - kept) / 2, (width - kept) / 2
    expected[math.ceil(y0) : math.floor(y0 + kept), math.ceil(x0) : math.floor(x0 + kept)] = True
    differs = np.argwhere(expected != seen.numpy())
    inner = expected.copy()
    inner[1:-1, 1:-1] &= expected[:-2, 1:-1] & expected[2:, 1:-1] & expected[1:-1, :-2] & expected[1:-1, 2:]
    assert len(differs) <= 4 * 200
    assert seen.numpy()[inner].all()
    assert not seen[: int(y0) - 1].any()
    assert not seen[:, : int(x0) - 1].any()
    assert maps.shape == (2, height, width)
    assert torch.allclose(maps, seen.float().expand(2, -1, -1), atol=1e-6)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_everything_is_seen_without_a_crop(width, height):
    processor = ViTImageProcessor(size={"height": 64, "width": 64})
    placement = measure_placement(processor, measure_normalisation(processor), width, height)
    maps, seen = place_maps(torch.rand(1, 4, 4), placement, (64, 64), width, height)
    assert seen.all()
    assert maps.min() >= 0
    assert maps.max() <= 1


def test_identity_placement_is_plain_resizing():
    maps = torch.rand(3, 8, 8)
    placed, seen = place_maps(maps, Placement(1.0, 0.0, 1.0, 0.0), (32, 32), 32, 32)
    expected = torch.nn.functional.interpolate(maps[None], size=(32, 32), mode="bilinear", align_corners=False)[0]
    assert seen.all()
    assert torch.allclose(placed, expected, atol=1e-5)


def test_a_ramp_stays_a_ramp():
    ramp = torch.linspace(0, 1, 16).expand(16, 16)[None]
    placed, _ = place_maps(ramp, Placement(2.0, 0.5, 2.0, 0.5), (16, 16), 32, 32)
    assert (placed[0].diff(dim=1) >= -1e-6).all()
    assert placed[0].diff(dim=0).abs().max() < 1e-6
