"""Other explainers on tiny backbones: the contract, the passes they cost, and their formulas done slowly."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import vit_processor
from torch import nn

from hf_ttame import TTameModel
from hf_ttame.baselines import ALL, Cost, MapBank, MethodSettings, cam_layer, expand_names, make_method
from hf_ttame.baselines.attention import AttentionRecorder
from hf_ttame.baselines.rise import random_masks
from hf_ttame.features import extract, inner_module
from hf_ttame.masking import min_max, resize_maps

SETTINGS = MethodSettings(rise_masks=10, integration_steps=4, batch_size=8)
B = 2


@pytest.fixture(scope="module")
def cnn(timm_cnn: nn.Module) -> TTameModel:
    return TTameModel.from_backbone(copy.deepcopy(timm_cnn))  # its memory format is changed


@pytest.fixture(scope="module")
def vit(hf_vit: nn.Module) -> TTameModel:
    return TTameModel.from_backbone(hf_vit, processor=vit_processor())


def pixels(model: TTameModel, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(B, 3, 8, 8, generator=generator)
    return F.interpolate(coarse, size=tuple(model.config.image_size), mode="bicubic")


def bank(model: TTameModel) -> MapBank:
    return MapBank(torch.rand(4, *model.config.map_size), torch.tensor([1, 2, 1, 3]))


def hooks_of(module: nn.Module) -> int:
    return sum(len(child._forward_hooks) + len(child._backward_hooks) for child in module.modules())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_every_method_keeps_the_contract_and_costs_what_it_must(
    kind: str, name: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    if kind == "cnn" and name in ("rollout", "gradient-attention"):
        with pytest.raises(ValueError, match="vision transformer"):
            make_method(name, model)
        return
    x, ids = pixels(model), torch.tensor([1, 3])
    method = make_method(name, model, SETTINGS, bank(model))
    before = hooks_of(model.backbone)
    with Cost(model.backbone) as cost:
        maps = method.at(torch.arange(B))(x, ids)
    assert hooks_of(model.backbone) == before
    assert maps.ndim == 3
    assert len(maps) == B
    assert maps.isfinite().all()
    assert not maps.requires_grad
    if name not in ("ones", "gaussian"):
        assert (maps.std(dim=(1, 2)) > 0).any()
    assert not any(parameter.grad is not None for parameter in model.backbone.parameters())
    channels = cam_layer(model).channels
    forward, backward = {
        "ttame": (1, 0),
        **dict.fromkeys(("gradcam", "gradcam++", "layercam", "hirescam", "xgradcam", "gradient-attention"), (1, 1)),
        **dict.fromkeys(("eigencam", "rollout", "random-blob"), (1, 0)),
        "gradcam-blurred": (1, 1),
        "scorecam": (channels + 1, 0),
        "ablationcam": (channels + 2, 0),  # one for the activations, one for the score of the whole image
        "integrated-gradients": (4, 4),
        "rise": (10, 0),
        **dict.fromkeys(("ones", "gaussian", "class-mean", "other-image"), (0, 0)),
        # Squares of 9 pixels every 4 over 64: at 0, 4, ..., 52 and at the border, along each side; one whole image.
        "occlusion": (15 * 15 + 1, 0),
    }[name]
    if name == "occlusion":  # captum looks at the whole image once more or less, by version
        assert abs(cost.forward / B - forward) <= 1
    else:
        assert (cost.forward / B, cost.backward / B) == (forward, backward)
    assert cost.seconds > 0


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_gradcam_is_its_formula_on_any_layout(kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    x, ids = pixels(model), torch.tensor([0, 4])
    layer = cam_layer(model)
    kept = []
    module = inner_module(model.backbone).get_submodule(layer.name)
    handle = module.register_forward_hook(lambda _m, _a, out: kept.append(out[0] if isinstance(out, tuple) else out))
    asking = x.clone().requires_grad_()
    logits = model.classify(asking)
    handle.remove()
    gradients = torch.autograd.grad(logits.gather(1, ids[:, None]).sum(), kept)[0]
    features, gradients = layer.to_maps(kept[0]), layer.to_maps(gradients)
    weights = gradients.mean(dim=(2, 3), keepdim=True)
    expected = min_max(resize_maps(min_max((weights * features).sum(dim=1).clamp(min=0)).detach(), x.shape[-2:]))
    found = make_method("gradcam", model).explain(x, ids)
    assert torch.allclose(found, expected, atol=2e-3)


def test_ablation_cam_is_its_formula(cnn: TTameModel) -> None:
    """Weight of a channel: the relative drop of the logit without it (Desai and Ramaswamy 2020)."""
    x, ids = pixels(cnn)[:1], torch.tensor([2])
    layer = cam_layer(cnn)
    module = inner_module(cnn.backbone).get_submodule(layer.name)
    with torch.no_grad():
        logits, (features,) = extract(cnn.backbone, x, [layer])
        weights = []
        for channel in range(layer.channels):

            def zero(_m: nn.Module, _a: object, out: torch.Tensor, channel: int = channel) -> torch.Tensor:
                out = out.clone()
                out[:, channel] = 0
                return out

            handle = module.register_forward_hook(zero)
            weights.append((logits[0, 2] - cnn.classify(x)[0, 2]) / logits[0, 2])
            handle.remove()
    cam = (torch.stack(weights)[None, :, None, None] * features).sum(dim=1).clamp(min=0)
    found = make_method("ablationcam", cnn, SETTINGS).explain(x, ids)
    assert torch.allclose(found, min_max(resize_maps(min_max(cam), x.shape[-2:])), atol=2e-3)


def test_cams_read_the_layer_they_are_given(cnn: TTameModel) -> None:
    x, ids = pixels(cnn), torch.tensor([0, 1])
    first = cnn.layers[0].name
    method = make_method(f"gradcam@{first}", cnn)
    assert method.layer == first
    assert not torch.allclose(method.explain(x, ids), make_method("gradcam", cnn).explain(x, ids))
    with pytest.raises(ValueError, match="nearest"):
        make_method("gradcam@no.such.layer", cnn)


def test_rollout_is_the_product_of_the_library_s_own_attention(vit: TTameModel) -> None:
    x = pixels(vit)
    vit.backbone.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = vit.backbone(x, output_attentions=True).attentions
    finally:
        vit.backbone.set_attn_implementation("sdpa")
    product = torch.eye(17)
    for weights in attentions:
        product = (0.5 * weights.mean(dim=1) + 0.5 * torch.eye(17)) @ product
    found = make_method("rollout", vit).explain(x, torch.tensor([0, 1]))
    assert torch.allclose(found, product[:, 0, 1:].reshape(B, 4, 4), atol=1e-5)


def test_attention_in_two_steps_changes_no_logit_and_gradients_choose_the_class(vit: TTameModel) -> None:
    x = pixels(vit)
    with torch.no_grad():
        plain = vit.classify(x)
        with AttentionRecorder(17) as recorder:
            recorded = vit.classify(x)
    assert torch.allclose(plain, recorded, atol=1e-5)
    assert len(recorder.found) == 4
    method = make_method("gradient-attention", vit)
    a, b = method.explain(x, torch.tensor([0, 0])), method.explain(x, torch.tensor([1, 1]))
    assert (a >= 0).all()
    assert not torch.allclose(a, b)


def test_rise_does_not_depend_on_batches(cnn: TTameModel) -> None:
    x, ids = pixels(cnn), torch.tensor([0, 1])
    together = make_method("rise", cnn, MethodSettings(rise_masks=40, batch_size=64)).explain(x, ids)
    alone = make_method("rise", cnn, MethodSettings(rise_masks=40, batch_size=7)).explain(x[1:], ids[1:])
    assert torch.allclose(together[1:], alone, atol=1e-5)
    other = make_method("rise", cnn, MethodSettings(rise_masks=40, batch_size=64, seed=1)).explain(x, ids)
    assert not torch.allclose(together, other)


def test_rise_masks_are_smooth_and_keep_half() -> None:
    masks = random_masks(200, (30, 45), torch.Generator().manual_seed(0))
    assert masks.shape == (200, 30, 45)
    assert masks.min() >= 0
    assert masks.max() <= 1
    assert masks.mean().item() == pytest.approx(0.5, abs=0.02)
    assert (masks.diff(dim=2).abs().max() < 0.3).item()
    assert masks.std(dim=0).min() > 0.2  # every pixel is sometimes there and sometimes not


def test_random_blob_has_the_reference_s_values_elsewhere(cnn: TTameModel) -> None:
    x, ids = pixels(cnn), torch.tensor([0, 1])
    own = make_method("ttame", cnn).explain(x, ids)
    method = make_method("random-blob", cnn)
    blob = method.at(torch.tensor([5, 6]))(x, ids)
    assert torch.allclose(own.flatten(1).sort().values, blob.flatten(1).sort().values)
    assert not torch.allclose(own, blob)
    alone = method.at(torch.tensor([6]))(x[1:], ids[1:])
    assert torch.allclose(blob[1:], alone, atol=1e-5)  # by position, not by batch
    with pytest.raises(ValueError, match="position"):
        method.explain(x, ids)


def test_borrowed_maps_are_never_the_image_s_own() -> None:
    maps = torch.arange(5.0)[:, None, None].expand(5, 2, 2)
    borrowed = MapBank(maps, torch.tensor([7, 7, 8, 7, 9]))
    x = torch.zeros(3, 3, 4, 4)
    indices, ids = torch.tensor([0, 2, 1]), torch.tensor([7, 8, 7])
    means = borrowed.class_mean(indices)(x, ids)
    # Class 7 has the images 0, 1, 3; image 2 is alone in class 8 and gets the mean of all others.
    assert means[:, 0, 0].tolist() == pytest.approx([2.0, (0 + 1 + 3 + 4) / 4, 1.5])
    others = borrowed.another_image(indices)(x, ids)[:, 0, 0].tolist()
    assert others == [2.0, 4.0, 3.0]
    with pytest.raises(ValueError, match="at least 2"):
        MapBank(maps[:1], torch.tensor([0]))
    with pytest.raises(ValueError, match="bank"):
        make_method("class-mean", TTameModel.from_backbone("test_resnet", pretrained=False))


def test_names(cnn: TTameModel, vit: TTameModel) -> None:
    assert expand_names(["gradcam", "gradcam"], cnn) == ["ttame", "gradcam"]
    assert "rollout" in expand_names(["all"], vit)
    assert "rollout" not in expand_names(["all"], cnn)
    with pytest.raises(ValueError, match="nearest: gradcam"):
        expand_names(["grad-cam"], cnn)
    with pytest.raises(ValueError, match="read one layer"):
        expand_names(["rise@layer4"], cnn)
