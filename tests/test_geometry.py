"""Inputs of other shapes than the training's square: every map must still lie where its pixels do."""

import pytest
import torch
from backbone_checks import misplaced
from conftest import make_timm, make_vit
from transformers import ConvNextConfig, ConvNextForImageClassification, ViTImageProcessor

from hf_ttame import TTameModel


def resize_to(height: int, width: int) -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": height, "width": width})


def convnext() -> torch.nn.Module:
    torch.manual_seed(0)
    return ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], num_labels=3)
    ).eval()


@pytest.mark.parametrize("size", [(64, 96), (128, 64), (96, 96)])
@pytest.mark.parametrize("which", ["timm_vit", "timm_cnn", "hf_vit", "hf_convnext"])
def test_other_input_shapes(which, size, photo, tmp_path):
    make = {
        "timm_vit": lambda: make_timm("test_vit", img_size=size),
        "timm_cnn": lambda: make_timm("test_resnet"),
        "hf_vit": make_vit,  # trained at 64 x 64: its position encoding is interpolated
        "hf_convnext": convnext,
    }[which]
    model = TTameModel.from_backbone(make(), processor=resize_to(*size))
    assert model.config.image_size == list(size)
    for layer in model.layers:
        assert layer.grid[0] * size[1] == layer.grid[1] * size[0]
    assert misplaced(model) == []
    (explanation,) = model.explain(photo())
    assert explanation.map.shape == (70, 90)
    assert explanation.seen.all()
    model.save_pretrained(tmp_path)
    again = TTameModel.from_pretrained(tmp_path)
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        assert torch.equal(again(images).map_logits, model(images).map_logits)


def test_many_classes_cost_only_the_rows_asked_for():
    """21,841 classes: no tensor is made that holds a map per class."""
    model = TTameModel.from_backbone(make_timm("test_resnet", classes=21841))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            nonlocal largest
            result = function(*arguments, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.ndim == 4 and result.shape[0] == 2:
                largest = max(largest, result.shape[1])
            return result

    with torch.no_grad(), Watch():
        output = model(torch.randn(2, 3, 64, 64), class_ids=torch.tensor([[3, 21840], [7, 0]]))
    assert output.map_logits.shape[1] == 2
    assert 0 < largest < 1000
