import pytest
import timm
import torch
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

from hf_ttame.backbones import wrap_backbone
from hf_ttame.features import FeatureLayer, capture, check_names, classify, extract, probe_layers
from hf_ttame.layer_choice import default_layers, find_pooled_classifier

SMALL = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "num_labels": 5}


class Toy(nn.Module):
    """Convolutions whose output is also shown as NHWC, and overwritten in place."""

    output_fmt = "NCHW"

    def __init__(self, channels: int = 6):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, channels, 4, stride=4)
        self.relu = nn.ReLU(inplace=True)
        self.nhwc = nn.Identity()
        self.pooled = nn.Identity()
        self.twice = nn.Identity()
        self.windows = nn.Identity()
        self.flat_tokens = nn.Identity()
        self.odd_tokens = nn.Identity()
        self.tuple_out = Pair()
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.relu(self.stem(x))
        self.nhwc(maps.permute(0, 2, 3, 1))
        self.twice(maps), self.twice(maps)
        self.windows(maps.repeat(4, 1, 1, 1))
        self.flat_tokens(maps.flatten(2).transpose(1, 2))
        self.odd_tokens(maps.flatten(2).transpose(1, 2)[:, 3:])
        self.tuple_out(maps)
        return self.fc(self.pooled(maps.mean(dim=(2, 3))))


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[list[torch.Tensor], str]:
        return [x], "more"


@pytest.fixture
def toy() -> Toy:
    return Toy().eval()


@pytest.fixture(scope="module")
def registers() -> nn.Module:
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2, image_size=56, patch_size=14, num_register_tokens=3)
    return Dinov2WithRegistersForImageClassification(config).eval()


@pytest.fixture(scope="module")
def deit() -> nn.Module:
    torch.manual_seed(0)
    return DeiTForImageClassification(DeiTConfig(**SMALL, intermediate_size=48, image_size=64, patch_size=16)).eval()


def noise(batch: int = 2, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def hooks(module: nn.Module) -> int:
    return sum(len(child._forward_hooks) for child in module.modules())


# ---- capture ------------------------------------------------------------------------------------------------------


def test_capture_collects_and_removes_its_hooks(toy):
    with capture(toy, {"stem": False, "tuple_out": False, "twice": False}) as found:
        assert hooks(toy) == 3
        toy(noise())
    assert [len(found[name]) for name in ("stem", "tuple_out", "twice")] == [1, 1, 2]
    assert found["tuple_out"][0].shape == (2, 6, 16, 16)
    assert hooks(toy) == 0


def test_capture_removes_its_hooks_after_an_error(toy):
    broken = torch.zeros(1, 5, 64, 64)
    with pytest.raises(RuntimeError, match="channels"), capture(toy, {"stem": False, "fc": True}):
        toy(broken)
    assert hooks(toy) == 0
    with pytest.raises(AttributeError), capture(toy, {"stem": False, "nothing": False}):
        pass
    assert hooks(toy) == 0


def test_probing_leaves_no_hooks(toy):
    probe_layers(toy, ["stem"], noise())
    find_pooled_classifier(toy, noise())
    with pytest.raises(ValueError, match="pooled"):
        probe_layers(toy, ["pooled"], noise())
    with pytest.raises(RuntimeError):
        probe_layers(toy, ["stem"], torch.zeros(1, 5, 64, 64))
    with pytest.raises(RuntimeError):
        find_pooled_classifier(toy, torch.zeros(1, 5, 64, 64))
    assert hooks(toy) == 0


# ---- default layers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vgg16", ["features.16", "features.23", "features.30"]),
        ("resnet50", ["layer2", "layer3", "layer4"]),
        ("vit_base_patch16_224", ["blocks.9.norm1", "blocks.10.norm1", "blocks.11.norm1"]),
    ],
)
def test_default_layers_are_the_papers(name, expected):
    with torch.device("meta"):
        assert default_layers(timm.create_model(name), noise(2, 224, 224).to("meta")) == expected


def test_default_layers_of_transformers_models(hf_vit, dinov2, registers, deit, hf_resnet):
    blocks = [f"vit.layers.{i}.layernorm_before" for i in (1, 2, 3)]
    found = default_layers(hf_vit, noise())
    assert [name.split(".", 1)[1].split(".")[-2:] for name in found] == [name.split(".")[-2:] for name in blocks]
    assert default_layers(dinov2, noise(2, 56, 56)) == [f"dinov2.encoder.layer.{i}.norm1" for i in (1, 2, 3)]
    assert [name.split(".")[-2:] for name in default_layers(registers, noise(2, 56, 56))] == [
        [i, "norm1"] for i in "123"
    ]
    assert [name.split(".")[-2:] for name in default_layers(deit, noise())] == [[i, "layernorm_before"] for i in "123"]
    assert default_layers(hf_resnet, noise()) == [f"resnet.encoder.stages.{i}" for i in (1, 2, 3)]


def test_default_layers_look_inside_the_wrapper(timm_cnn, timm_vit):
    assert default_layers(wrap_backbone(timm_cnn).model, noise()) == ["layer2", "layer3", "layer4"]
    assert default_layers(timm_vit, noise()) == [f"blocks.{len(timm_vit.blocks) - i}.norm1" for i in (3, 2, 1)]


def test_no_default_layers(toy):
    with pytest.raises(ValueError, match="no default layers are known for Toy; pass feature_layers="):
        default_layers(toy, noise())


def test_default_layers_of_a_library_s_own_intermediates():
    config = SwinConfig(embed_dim=12, depths=[1, 1, 1], num_heads=[1, 1, 2], window_size=2, image_size=32)
    swin = SwinForImageClassification(config).eval()
    assert default_layers(swin, noise(2, 32, 32)) == [f"reshaped_hidden_states[{i}]" for i in (0, 1, 3)]


# ---- probing ------------------------------------------------------------------------------------------------------


def test_facts_of_a_cnn(timm_cnn):
    layers = probe_layers(timm_cnn, ["layer2", "layer4"], noise())
    assert layers == [
        FeatureLayer("layer2", 48, (8, 8), "NCHW", 0, False),
        FeatureLayer("layer4", 96, (2, 2), "NCHW", 0, False),
    ]
    assert [FeatureLayer.from_dict(layer.to_dict()) for layer in layers] == layers


def test_facts_of_non_square_maps(timm_cnn, toy):
    (layer,) = probe_layers(timm_cnn, ["layer2"], noise(2, 64, 96))
    assert (layer.channels, layer.grid) == (48, (8, 12))
    toy.output_fmt = "NHWC"
    (layer,) = probe_layers(toy, ["nhwc"], noise(2, 64, 96))
    assert (layer.channels, layer.grid, layer.layout) == (6, (16, 24), "NHWC")


def test_facts_of_nhwc(toy):
    (layer,) = probe_layers(toy, ["nhwc"], noise())
    assert layer == FeatureLayer("nhwc", 6, (16, 16), "NHWC", 0, False)
    _, (maps,) = extract(toy, noise(), [layer])
    assert torch.equal(maps, toy.relu(toy.stem(noise())))


@pytest.mark.parametrize(("output_fmt", "name"), [("NCHW", "relu"), ("NHWC", "nhwc")])
def test_as_many_channels_as_rows_follow_the_model(output_fmt, name):
    toy = Toy(channels=16).eval()
    toy.output_fmt = output_fmt
    (layer,) = probe_layers(toy, [name], noise())
    assert (layer.layout, layer.grid) == (output_fmt, (16, 16))


def test_facts_of_tokens(hf_vit, dinov2, registers, deit):
    for backbone, prefix in ((hf_vit, 1), (dinov2, 1), (registers, 4), (deit, 2)):
        side = backbone.config.image_size
        layers = probe_layers(backbone, default_layers(backbone, noise(2, side, side)), noise(2, side, side))
        assert {(x.channels, x.grid, x.layout, x.prefix_tokens, x.clone) for x in layers} == {
            (24, (4, 4), "tokens", prefix, False)
        }


def test_prefix_tokens_are_dropped_and_patches_laid_out_by_row(registers):
    (layer,) = probe_layers(registers, default_layers(registers, noise(2, 56, 56))[-1:], noise(2, 56, 56))
    with capture(registers, {layer.name: False}) as found:
        registers(noise(2, 56, 56))
    tokens = found[layer.name][0]
    maps = layer.to_maps(tokens)
    assert tokens.shape == (2, 20, 24)
    assert maps.shape == (2, 24, 4, 4)
    for row, column in ((0, 0), (0, 3), (2, 1)):
        assert torch.equal(maps[:, :, row, column], tokens[:, 4 + 4 * row + column])


def test_class_token_multiply():
    layer = FeatureLayer("x", 3, (2, 2), "tokens", 2, False)
    tokens = torch.randn(1, 6, 3)
    expected = (tokens[:, 2:] * tokens[:, :1]).transpose(1, 2).reshape(1, 3, 2, 2)
    assert torch.equal(layer.to_maps(tokens, "multiply"), expected)
    assert not torch.equal(layer.to_maps(tokens), expected)


def test_class_token_multiply_without_prefix_changes_nothing():
    layer = FeatureLayer("x", 3, (2, 2), "tokens", 0, False)
    tokens = torch.randn(1, 4, 3)
    assert torch.equal(layer.to_maps(tokens, "multiply"), layer.to_maps(tokens))


def test_unknown_names(timm_cnn):
    with pytest.raises(ValueError, match=r"'layer44' is not in the backbone; nearest: .*layer4"):
        check_names(timm_cnn, ["layer2", "layer44"])
    for names in ([], ["layer2", "layer2"]):
        with pytest.raises(ValueError, match="one or more different module names"):
            check_names(timm_cnn, names)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pooled", "tap a layer before the pooling"),
        ("twice", "must run once per pass"),
        ("windows", "keep the batch"),
        ("odd_tokens", "253 tokens, which fit no grid"),
    ],
)
def test_layers_without_spatial_output(toy, name, message):
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        probe_layers(toy, [name], noise())


def test_layer_that_does_not_run(toy):
    toy.unused = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match=r"unused.*got 0 outputs"):
        probe_layers(toy, ["unused"], noise())


def test_overwritten_output_is_cloned(toy):
    layers = probe_layers(toy, ["stem", "relu"], noise())
    assert [layer.clone for layer in layers] == [True, False]
    logits, (before, after) = extract(toy, noise(), layers)
    expected = toy.stem(noise())
    assert expected.min() < 0
    assert torch.equal(before, expected)
    assert torch.equal(after, expected.relu())
    assert torch.equal(logits, toy(noise()))


# ---- right place --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("which", ["timm_cnn", "timm_vit", "hf_vit", "dinov2", "nhwc", "vgg"])
def test_a_changed_corner_changes_the_features_there(which, corner, request):
    backbone = Toy().eval() if which == "nhwc" else request.getfixturevalue(which)
    side = 56 if which == "dinov2" else 64
    image = noise(1, side, side)
    name = "nhwc" if which == "nhwc" else default_layers(backbone, image)[0]
    changed = image.clone()
    quarter = side // 4
    y, x = (c * (side - quarter) for c in corner)
    changed[..., y : y + quarter, x : x + quarter] += 3
    layers = probe_layers(backbone, [name], image)
    with torch.no_grad():
        (a,), (b,) = extract(backbone, image, layers)[1], extract(backbone, changed, layers)[1]
    moved = (a - b).abs().sum(dim=1)[0]
    row, column = divmod(int(moved.argmax()), moved.shape[1])
    assert (row >= moved.shape[0] / 2, column >= moved.shape[1] / 2) == tuple(map(bool, corner))


def test_extract_gives_the_classifiers_logits(hf_vit, timm_cnn):
    for backbone in (hf_vit, timm_cnn):
        layers = probe_layers(backbone, default_layers(backbone, noise()), noise())
        assert torch.equal(extract(backbone, noise(), layers)[0], classify(backbone, noise()))


# ---- pooled classifiers -------------------------------------------------------------------------------------------


def test_pooled_classifier_of_a_resnet(timm_cnn):
    found = find_pooled_classifier(timm_cnn, noise())
    assert found.layer == "layer4"
    assert found.non_negative
    assert torch.equal(found.weight, timm_cnn.fc.weight)
    assert torch.equal(found.bias, timm_cnn.fc.bias)


def test_pooled_classifier_of_an_efficientnet(timm_efficientnet):
    found = find_pooled_classifier(timm_efficientnet, noise())
    assert found.layer == "bn2"
    assert not found.non_negative
    assert torch.equal(found.weight, timm_efficientnet.classifier.weight)


def test_pooled_classifier_of_dinov2(dinov2):
    found = find_pooled_classifier(dinov2, noise(2, 56, 56))
    assert found.layer == "dinov2.layernorm"
    assert not found.non_negative
    assert torch.equal(found.weight, dinov2.classifier.weight[:, 24:])
    assert torch.equal(found.bias, dinov2.classifier.bias)


def test_pooled_classifier_without_bias():
    toy = Toy().eval()
    toy.fc = nn.Linear(6, 5, bias=False)
    found = find_pooled_classifier(toy, noise())
    assert found.bias is None
    assert found.layer in ("relu", "stem")


def test_no_pooled_classifier(vgg, hf_vit, timm_vit, deit):
    for backbone in (vgg, hf_vit, deit):
        assert find_pooled_classifier(backbone, noise()) is None
    assert timm_vit.global_pool != "token" or find_pooled_classifier(timm_vit, noise()) is None


def test_a_classifier_that_reads_the_class_token(vgg, hf_vit, deit, dinov2):
    found = find_pooled_classifier(hf_vit, noise(), or_class_token=True)
    assert (found.layer, found.reads, found.non_negative) == ("vit.layernorm", "token", False)
    assert torch.equal(found.weight, hf_vit.classifier.weight)
    assert find_pooled_classifier(dinov2, noise(2, 56, 56), or_class_token=True).reads == "mean"  # exact comes first
    assert find_pooled_classifier(deit, noise(), or_class_token=True).layer == "deit.layernorm"
    assert find_pooled_classifier(vgg, noise(), or_class_token=True) is None
