"""Other explainers on tiny backbones: the contract, the passes they cost, and their formulas done slowly."""

import copy

import pytest
import torch
import torch.nn.functional as F
from architectures import make_small_timm
from conftest import CLASSES, vit_processor
from torch import nn
from transformers import SwinConfig, SwinForImageClassification

from hf_ttame import TTameModel
from hf_ttame.baselines import (
    ALL,
    FROM_THE_HEAD,
    Cost,
    MapBank,
    MethodSettings,
    cam_layer,
    cams,
    expand_names,
    make_method,
)
from hf_ttame.baselines.attention import AttentionRecorder
from hf_ttame.baselines.rise import random_masks
from hf_ttame.features import extract, first_tensor, inner_module
from hf_ttame.masking import min_max, resize_maps

SETTINGS = MethodSettings(rise_masks=10, integration_steps=4, batch_size=8)
GRADIENT_CAMS = ("gradcam", "gradcam++", "layercam", "hirescam", "xgradcam")
B = 2


@pytest.fixture(scope="module")
def cnn(timm_cnn: nn.Module) -> TTameModel:
    return TTameModel.from_backbone(copy.deepcopy(timm_cnn))  # its memory format is changed


@pytest.fixture(scope="module")
def vit(hf_vit: nn.Module) -> TTameModel:
    return TTameModel.from_backbone(hf_vit, processor=vit_processor())


@pytest.fixture(scope="module")
def overwritten(timm_cnn: nn.Module) -> TTameModel:
    """Layers whose output is overwritten: by an activation in place, and by the addition of the skip connection."""
    names = ["layer3.0.bn1", "layer4.0.bn2"]
    model = TTameModel.from_backbone(copy.deepcopy(timm_cnn), feature_layers=names, head_init="random")
    assert all(layer.clone for layer in model.layers)
    return model


@pytest.fixture(scope="module")
def nhwc() -> TTameModel:
    shrunk = {"window_size": 2, "depths": (1, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 1, 2, 2)}
    backbone, processor = make_small_timm("swin_tiny_patch4_window7_224", 64, **shrunk)
    model = TTameModel.from_backbone(backbone, processor=processor)
    assert {layer.layout for layer in model.layers} == {"NHWC"}
    return model


@pytest.fixture(scope="module")
def tuples() -> TTameModel:
    """Stages that return tuples, of tokens without a class token."""
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, num_labels=CLASSES
    )
    stages = ["swin.encoder.layers.1", "swin.encoder.layers.2.blocks.0"]
    return TTameModel.from_backbone(
        SwinForImageClassification(config), processor=vit_processor(), feature_layers=stages
    )


def pixels(model: TTameModel, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(B, 3, 8, 8, generator=generator)
    return F.interpolate(coarse, size=tuple(model.config.image_size), mode="bicubic")


def predicted(model: TTameModel, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.classify(x).argmax(dim=1)


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
    x = pixels(model)
    ids, layer = predicted(model, x), cam_layer(model)
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
    assert found.max() > 0.9, "not an empty map"
    assert torch.allclose(found, expected, atol=2e-3)


class AskingAtThePixels(cams.TappedClassifier):
    """Gradients of the pixels, as one would ask for them first: those of the layer are met on the way."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return super().forward(pixel_values.clone().requires_grad_())

    def _through_tap(self, module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        if isinstance(output, tuple):
            return self._through_tap(module, args, output[0]), *output[1:]
        return self.tap(output).clone()


@pytest.mark.parametrize("name", GRADIENT_CAMS)
@pytest.mark.parametrize("kind", ["cnn", "vit", "overwritten", "nhwc", "tuples"])
def test_gradients_that_begin_at_the_layer_are_those_met_on_the_way_to_the_pixels(
    kind: str, name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = request.getfixturevalue(kind)
    x = pixels(model)
    ids, shown = predicted(model, x), 0
    for layer in model.layers:
        method = f"{name}@{layer.name}"
        found = make_method(method, model).explain(x, ids)
        shown += int((found.amax(dim=(1, 2)) > 0.9).sum())  # not empty, as a map of negative values alone would be
        with monkeypatch.context() as patched:
            patched.setattr(cams, "TappedClassifier", AskingAtThePixels)
            expected = make_method(method, model).explain(x, ids)
        assert torch.allclose(found, expected, atol=1e-4)
    assert shown


@pytest.mark.parametrize("name", GRADIENT_CAMS)
@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_cams_are_those_of_the_plain_package(kind: str, name: str, request: pytest.FixtureRequest) -> None:
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = request.getfixturevalue(kind)
    layer = cam_layer(model)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = model.backbone

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.backbone(pixel_values).logits

    x = pixels(model)
    ids = predicted(model, x)
    module = inner_module(model.backbone).get_submodule(layer.name)
    reshape = None if layer.layout == "NCHW" else layer.to_maps
    with getattr(pytorch_grad_cam, cams.NAMES[name])(Plain(), [module], reshape_transform=reshape) as method:
        expected = method(x.clone().requires_grad_(), [ClassifierOutputTarget(int(i)) for i in ids])
    assert expected.max() > 0.9
    assert torch.allclose(make_method(name, model).explain(x, ids), torch.from_numpy(expected), atol=1e-4)


@pytest.mark.parametrize("name", [*GRADIENT_CAMS, "eigencam"])
@pytest.mark.parametrize("kind", ["cnn", "vit", "overwritten", "nhwc", "tuples"])
def test_no_module_before_the_layer_takes_part_in_the_backward_pass(
    kind: str, name: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    x, ids = pixels(model), torch.tensor([0, 1])
    layer = model.layers[-1].name
    followed: list[tuple[str, bool]] = []  # modules in the order in which they end, and whether autograd follows

    def note(module_name: str):
        def hook(_module: nn.Module, _args: object, output: object) -> None:
            if (tensor := first_tensor(output)) is not None:
                followed.append((module_name, tensor.requires_grad))

        return hook

    modules = inner_module(model.backbone).named_modules()
    handles = [module.register_forward_hook(note(module_name)) for module_name, module in modules if module_name]
    try:
        with Cost(model.backbone) as cost:
            make_method(f"{name}@{layer}", model).explain(x, ids)
    finally:
        for handle in handles:
            handle.remove()
    place = [module_name for module_name, _ in followed].index(layer)
    assert place > 0
    assert not any(asked for _, asked in followed[: place + 1])
    assert followed[-1][1] == (name != "eigencam")
    assert (cost.forward, cost.backward) == (B, 0 if name == "eigencam" else B)


def test_score_cam_is_its_formula(cnn: TTameModel) -> None:
    """Weights: softmax over the channels of what each as a mask adds to the logit (Wang et al., arXiv 1910.01279)."""
    x, ids = pixels(cnn)[:1], torch.tensor([2])
    layer = cam_layer(cnn)
    with torch.no_grad():
        _, (features,) = extract(cnn.backbone, x, [layer])
        without = cnn.classify(torch.zeros_like(x))[0, 2]  # 0 is the mean colour: pixels are normalised
        added = []
        for channel in range(layer.channels):
            mask = features[:, channel : channel + 1]
            mask = F.interpolate(mask, size=x.shape[-2:], mode="bilinear", align_corners=True)
            mask = (mask - mask.min()) / (mask.max() - mask.min() + 1e-8)
            added.append(cnn.classify(x * mask)[0, 2] - without)
    weights = torch.stack(added).exp() / torch.stack(added).exp().sum()
    cam = sum(weight * features[:, channel] for channel, weight in enumerate(weights))
    cam = cam.clamp(min=0)
    found = make_method("scorecam", cnn, SETTINGS).explain(x, ids)
    assert torch.allclose(found, min_max(resize_maps(min_max(cam), x.shape[-2:])), atol=2e-3)
    assert found.max() > 0.9


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
    assert found.max() > 0.9, "not an empty map"
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


def test_gradient_attention_is_its_formula_on_the_library_s_own_attention(vit: TTameModel) -> None:
    """Per block A = mean over heads of relu(dA * A), and R <- R + A R from R = 1 (Chefer et al., arXiv 2103.15679)."""
    x, ids = pixels(vit), torch.tensor([3, 1])
    found = make_method("gradient-attention", vit).explain(x, ids)
    vit.backbone.set_attn_implementation("eager")
    try:
        for image, class_id, one_map in zip(x, ids, found, strict=True):
            output = vit.backbone(image[None].clone().requires_grad_(), output_attentions=True)
            for attention in output.attentions:
                attention.retain_grad()
            output.logits[0, class_id].backward()
            relevance = torch.eye(17)
            for attention in output.attentions:
                heads = [
                    (gradient * weights).clamp(min=0)
                    for gradient, weights in zip(attention.grad[0], attention[0].detach(), strict=True)
                ]
                relevance = relevance + sum(heads) / len(heads) @ relevance
            assert torch.allclose(one_map, relevance[0, 1:].reshape(4, 4), rtol=1e-3, atol=1e-6)
    finally:
        vit.backbone.set_attn_implementation("sdpa")


def test_gradient_attention_goes_back_to_the_first_attention_and_no_further(vit: TTameModel) -> None:
    reached: list[str] = []

    def follow(name: str):
        def hook(_module: nn.Module, _args: object, output: torch.Tensor) -> None:
            output.register_hook(lambda _: reached.append(name))

        return hook

    modules = dict(vit.backbone.named_modules())
    norms = [name for name in modules if name.endswith("layernorm_before")]
    first = [name for name in modules if name.endswith("projection")]
    handles = [modules[name].register_forward_hook(follow(name)) for name in [*first, *norms]]
    try:
        make_method("gradient-attention", vit).explain(pixels(vit), torch.tensor([3, 1]))
    finally:
        for handle in handles:
            handle.remove()
    assert len(norms) == 4
    assert reached == norms[:0:-1]  # not the embedding of the patches, and not what the first attention is made of


def test_rise_is_its_formula(cnn: TTameModel) -> None:
    """S = sum of f(I * M_i) M_i over N times the share of ones (Petsiuk et al., arXiv 1806.07421, equation 6)."""
    x, class_id, count = pixels(cnn)[:1], 2, 40
    seen: list[torch.Tensor] = []
    handle = cnn.backbone.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        found = make_method("rise", cnn, MethodSettings(rise_masks=count, batch_size=7, seed=3)).explain(
            x, torch.tensor([class_id])
        )
    finally:
        handle.remove()
    shift, scale = (torch.tensor(values)[:, None, None] for values in (cnn.config.pixel_shift, cnn.config.pixel_scale))
    picture = (x[0] - shift) / scale  # 0 is black
    generator = torch.Generator().manual_seed(3)
    masks = torch.cat([random_masks(32, (64, 64), generator), random_masks(32, (64, 64), generator)])[:count]
    total = torch.zeros(64, 64)
    for mask, passed in zip(masks, torch.cat(seen), strict=True):
        masked = picture * mask * scale + shift
        assert torch.allclose(passed, masked, atol=1e-5)
        with torch.no_grad():
            total += cnn.classify(masked[None]).softmax(dim=1)[0, class_id] * mask
    assert torch.allclose(found[0], total / (count * 0.5), atol=1e-5)


def test_rise_masks_are_enlarged_and_shifted_as_published() -> None:
    """h x w zeros and ones, enlarged bilinearly to (h + 1) C_H x (w + 1) C_W, cropped up to a cell further on."""
    count, height, width, grid = 5, 9, 14, 3
    found = random_masks(count, (height, width), torch.Generator().manual_seed(4), grid=grid, share=0.3)
    generator = torch.Generator().manual_seed(4)
    ones = (torch.rand(count, 1, grid, grid, generator=generator) < 0.3).float()[:, 0]
    cell_h, cell_w = 3, 5  # 9 / 3 and 14 / 3, rounded up
    tops = torch.randint(cell_h, (count,), generator=generator).tolist()
    lefts = torch.randint(cell_w, (count,), generator=generator).tolist()

    def between(pixel: int, cells_wide: int) -> tuple[int, int, float]:
        """The two cells beside a pixel of the enlarged grid, and how far it is from the first to the second."""
        place = min(max((pixel + 0.5) * grid / cells_wide - 0.5, 0), grid - 1)
        return int(place), min(int(place) + 1, grid - 1), place - int(place)

    for number, (top, left) in enumerate(zip(tops, lefts, strict=True)):
        cells = ones[number].tolist()
        for y in range(height):
            for x in range(width):
                a, b, down = between(y + top, (grid + 1) * cell_h)
                c, d, right = between(x + left, (grid + 1) * cell_w)
                upper = cells[a][c] * (1 - right) + cells[a][d] * right
                lower = cells[b][c] * (1 - right) + cells[b][d] * right
                assert found[number, y, x].item() == pytest.approx(upper * (1 - down) + lower * down, abs=1e-5)


def test_rise_does_not_depend_on_batches(cnn: TTameModel) -> None:
    x, ids = pixels(cnn), torch.tensor([0, 1])
    together = make_method("rise", cnn, MethodSettings(rise_masks=40, batch_size=64)).explain(x, ids)
    alone = make_method("rise", cnn, MethodSettings(rise_masks=40, batch_size=7)).explain(x[1:], ids[1:])
    assert torch.allclose(together[1:], alone, atol=1e-5)
    other = make_method("rise", cnn, MethodSettings(rise_masks=40, batch_size=64, seed=1)).explain(x, ids)
    assert not torch.allclose(together, other)


def test_rise_on_pixels_of_double_precision(cnn: TTameModel) -> None:
    double, (x, ids) = copy.deepcopy(cnn).double(), (pixels(cnn), torch.tensor([0, 1]))
    found = make_method("rise", double, MethodSettings(rise_masks=40)).explain(x.double(), ids)
    expected = make_method("rise", cnn, MethodSettings(rise_masks=40)).explain(x, ids)
    assert torch.allclose(found, expected, atol=1e-5)


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
    with pytest.raises(ValueError, match="1 of them of readable"):
        MapBank(maps[:2], torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="bank"):
        make_method("class-mean", TTameModel.from_backbone("test_resnet", pretrained=False))


@pytest.mark.parametrize("readable", [(0, 1), (2, 3, 6), (0, 4), (0, 1, 2, 3, 5, 6)])
def test_an_unreadable_picture_lends_no_map(readable: tuple[int, ...]) -> None:
    maps, targets = torch.zeros(7, 2, 2), torch.full((7,), -1)
    for place in readable:
        maps[place], targets[place] = place + 1, 8 + place % 2
    borrowed = MapBank(maps, targets)
    for index in (*readable, -1, -6):  # mosaics have negative positions
        for class_id in (8, 9, 10, -1):  # no image is of class 10, and none is asked for -1
            at, x = torch.tensor([index]), torch.zeros(1, 3, 4, 4)
            lent = borrowed.another_image(at)(x, torch.tensor([class_id]))[0, 0, 0].item() - 1
            assert lent in set(readable) - {index}
            others = [place for place in readable if place != index]
            mean = borrowed.class_mean(at)(x, torch.tensor([class_id]))[0, 0, 0].item()
            expected = [place for place in others if 8 + place % 2 == class_id] or others
            assert mean == pytest.approx(sum(expected) / len(expected) + 1)


def test_another_head_changes_exactly_the_maps_that_are_measured_anew(cnn: TTameModel) -> None:
    """`FROM_THE_HEAD`; the other head has maps of another size too."""
    other = TTameModel.from_backbone(cnn.backbone, feature_layers=[layer.name for layer in cnn.layers[-2:]])
    assert other.config.map_size != cnn.config.map_size
    x, ids = pixels(cnn), torch.tensor([1, 1])
    maps: dict[str, list[torch.Tensor]] = {}
    for model in (cnn, other):
        own = make_method("ttame", model).explain
        lent = torch.cat([own(pixels(model, seed), ids) for seed in (0, 1)])
        for name in expand_names(["all"], model):
            method = make_method(name, model, SETTINGS, MapBank(lent, torch.tensor([1, 1, 1, 2])))
            maps.setdefault(name, []).append(method.at(torch.arange(B))(x, ids))
    changed = {name for name, (a, b) in maps.items() if a.shape != b.shape or not torch.allclose(a, b, atol=1e-4)}
    assert changed == set(FROM_THE_HEAD)


def test_names(cnn: TTameModel, vit: TTameModel) -> None:
    assert expand_names(["gradcam", "gradcam"], cnn) == ["ttame", "gradcam"]
    assert "rollout" in expand_names(["all"], vit)
    assert "rollout" not in expand_names(["all"], cnn)
    with pytest.raises(ValueError, match="nearest: gradcam"):
        expand_names(["grad-cam"], cnn)
    with pytest.raises(ValueError, match="read one layer"):
        expand_names(["rise@layer4"], cnn)
