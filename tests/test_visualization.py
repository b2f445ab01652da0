"""Overlays and sheets, pixel by pixel."""

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from hf_ttame.visualization import COLOURS, colour_map, contact_sheet, overlay

ANCHORS = COLOURS["spectrum"]
PHOTO = Image.fromarray(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 14)
MAP = np.linspace(0, 1, 6).reshape(2, 3).astype(np.float32)
SEEN = np.ones((2, 3), dtype=bool)


def test_colour_map_goes_through_its_anchors_from_end_to_end() -> None:
    found = colour_map(np.linspace(0, 1, 7))
    assert found.dtype == np.uint8
    assert np.array_equal(found, ANCHORS)
    assert np.array_equal(colour_map(np.array([-3.0, 7.0])), ANCHORS[[0, -1]])
    assert colour_map(np.zeros((2, 5))).shape == (2, 5, 3)


def test_colour_map_is_monotone_between_anchors() -> None:
    steps = colour_map(np.linspace(0, 1, 6 * 20 + 1)).astype(int)
    for index, (low, high) in enumerate(pairwise(ANCHORS)):
        change = np.diff(steps[20 * index : 20 * index + 21], axis=0)
        assert (change * np.sign(high - low) >= 0).all()
    halfway = colour_map(np.array(0.5 / 6))
    assert np.array_equal(halfway, np.rint((ANCHORS[0] + ANCHORS[1]) / 2))


def test_every_choice_of_colours_and_no_other() -> None:
    for name, anchors in COLOURS.items():
        assert np.array_equal(colour_map(np.array([0.0, 1.0]), name), anchors[[0, -1]])
    grey = overlay(PHOTO, MAP, SEEN, 1, "grey")
    assert np.array_equal(np.asarray(grey)[..., 0], np.rint(255 * MAP))
    with pytest.raises(ValueError, match="spectrum, viridis"):
        colour_map(MAP, "rainbow")


def test_overlay_blends_photo_and_colours() -> None:
    photo = np.asarray(PHOTO)
    assert np.array_equal(overlay(PHOTO, MAP, SEEN, 0), photo)
    assert np.array_equal(overlay(PHOTO, MAP, SEEN, 1), colour_map(MAP))
    mixed = overlay(PHOTO, MAP, SEEN, 0.25)
    assert (mixed.mode, mixed.size) == ("RGB", PHOTO.size)
    assert np.array_equal(mixed, np.rint(0.75 * photo + 0.25 * colour_map(MAP)))


@pytest.mark.parametrize("strength", [0.0, 0.55, 1.0])
def test_overlay_greys_what_was_not_seen(strength: float) -> None:
    seen = SEEN.copy()
    seen[0, 1] = False
    found = np.asarray(overlay(PHOTO, MAP, seen, strength))
    # The pixel (0, 1) is (42, 56, 70): its mean 56, halved and lifted by 64.
    assert found[0, 1].tolist() == [92, 92, 92]
    assert np.array_equal(found[seen], np.asarray(overlay(PHOTO, MAP, SEEN, strength))[seen])


@pytest.mark.parametrize("strength", [-0.01, 1.01, float("nan")])
def test_strength_outside_0_to_1_raises(strength: float) -> None:
    with pytest.raises(ValueError, match=r"strength must lie in \[0, 1\]"):
        overlay(PHOTO, MAP, SEEN, strength)


def test_contact_sheet_size() -> None:
    wide, square = Image.new("RGB", (60, 40), "red"), Image.new("RGB", (40, 40), "blue")
    sheet = contact_sheet([[(wide, "a"), (square, "b")], [(square, "c")]], height=100)
    # Widths at height 100 are 150 and 100; gaps of 8, captions of 16.
    assert sheet.size == (8 + 150 + 8 + 100 + 8, 8 + 2 * (100 + 16 + 8))
    assert sheet.getpixel((8, 8)) == sheet.getpixel((157, 107)) == (255, 0, 0)
    assert sheet.getpixel((166, 8)) == sheet.getpixel((265, 107)) == (0, 0, 255)
    assert sheet.getpixel((8, 8 + 124)) == (0, 0, 255)
    assert sheet.getpixel((7, 50)) == sheet.getpixel((160, 50)) == sheet.getpixel((200, 180)) == (255, 255, 255)


def test_long_captions_are_cut_to_their_picture() -> None:
    picture = Image.new("RGB", (50, 50), "red")

    def caption_ink(text: str) -> tuple[bool, bool]:
        sheet = contact_sheet([[(picture, text), (picture, "")]], height=100)
        band = np.asarray(sheet)[8 + 100 : 8 + 116] < 255
        return bool(band[:, :108].any()), bool(band[:, 108:].any())

    assert caption_ink("") == (False, False)
    assert caption_ink("owl") == (True, False)
    assert caption_ink("great horned owl " * 20) == (True, False)
