"""Backbones whose input is not RGB: 1, 4 and 13 channels."""

import numpy as np
import pytest
import torch
from conftest import make_timm
from transformers import ConvNextConfig, ConvNextForImageClassification, ViTImageProcessor

from hf_ttame import TTameModel
from hf_ttame.image_processing import load_picture, shown


def timm_of(channels: int) -> torch.nn.Module:
    cfg = {"input_size": (3, 64, 64), "mean": (0.4,) * channels, "std": (0.2,) * channels, "crop_pct": 0.8}
    return make_timm("test_resnet", in_chans=channels, pretrained_cfg_overlay=cfg)


def bands(channels: int, height: int = 70, width: int = 90) -> np.ndarray:
    coarse = np.random.default_rng(0).random((7, 9, channels))
    return np.kron(coarse, np.ones((height // 7, width // 9, 1))).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_other_channel_counts(channels, tmp_path):
    model = TTameModel.from_backbone(timm_of(channels))
    assert len(model.config.pixel_scale) == channels
    np.testing.assert_allclose(model.config.pixel_scale, 1 / 0.2, rtol=1e-4)
    np.testing.assert_allclose(model.config.pixel_shift, -0.4 / 0.2, rtol=1e-4)
    (explanation,) = model.explain(bands(channels))
    assert explanation.map.shape == (70, 90)
    assert not explanation.seen[35, 0]  # the centre crop cuts the sides away
    assert explanation.seen[35, 45]
    assert explanation.overlay().size == (90, 70)
    model.save_pretrained(tmp_path)
    again = TTameModel.from_pretrained(tmp_path)
    (same,) = again.explain(bands(channels))
    assert np.array_equal(same.map, explanation.map)
    with torch.no_grad():
        pixel_values = torch.randn(2, channels, 64, 64)
        assert torch.equal(again(pixel_values).map_logits, model(pixel_values).map_logits)


def test_transformers_backbone_of_four_channels():
    torch.manual_seed(0)
    config = ConvNextConfig(num_channels=4, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], num_labels=3)
    processor = ViTImageProcessor(
        size={"height": 96, "width": 96}, image_mean=[0.5] * 4, image_std=[0.5] * 4, do_convert_rgb=False
    )
    model = TTameModel.from_backbone(ConvNextForImageClassification(config).eval(), processor=processor)
    (explanation,) = model.explain(bands(4))
    assert explanation.seen.all()


def test_grey_pictures_for_one_channel(photo):
    model = TTameModel.from_backbone(timm_of(1))
    from_colour, from_array = model.explain([photo(), np.asarray(photo().convert("L"))])
    np.testing.assert_allclose(from_colour.map, from_array.map, atol=1e-5)


def test_wrong_input_is_refused_with_words(photo, tmp_path):
    model = TTameModel.from_backbone(timm_of(13))
    with pytest.raises(ValueError, match=r"takes arrays \(H, W, 13\), got shape \(70, 90, 4\)"):
        model.explain(bands(4))
    photo().save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="takes 13 channels; give an array"):
        model.explain(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"mean for 3; make it with pretrained_cfg_overlay"):
        TTameModel.from_backbone(make_timm("test_resnet", in_chans=13))


def test_values_of_other_types():
    sixteen = np.full((5, 6, 4), 65535, dtype=np.uint16)
    assert load_picture(sixteen, 4).max() == 255
    assert load_picture(np.ones((5, 6, 4), dtype=np.float64), 4).max() == 255
    assert shown(load_picture(np.zeros((5, 6, 2), dtype=np.uint8), 2)).mode == "RGB"
    with pytest.raises(ValueError, match=r"floats must be finite and in \[0, 1\]"):
        load_picture(np.full((5, 6, 4), 300.0), 4)
