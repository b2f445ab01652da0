"""What every supported architecture must pass, for the tests and for the sweep over timm and transformers."""

import copy
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from hf_ttame import TTameModel
from hf_ttame.features import classify, listed
from hf_ttame.losses import ttame_loss
from hf_ttame.masking import apply_mask, resize_maps
from hf_ttame.saving import fingerprint

# Rows and columns of a 7 x 7 lattice over the image, chosen so that a transposed, mirrored or scrambled grid fails.
SPOTS = ((0, 3), (2, 6), (5, 1), (6, 4), (3, 0), (1, 1))


@torch.no_grad()
def settle(module: nn.Module, size: tuple[int, int, int]) -> nn.Module:
    """Give random weights a working network's scale and place: without it there would be nothing left to check.

    Signals die out or blow up through a deep network of random weights: batch norms see noise once. Thirty random
    depthwise convolutions, or a grid that shrinks by attention alone, mix the whole image evenly: depthwise
    convolutions get a heavier centre, LeViT's attention looks at its own place.
    """
    for child in module.modules():
        if isinstance(child, nn.Conv2d) and child.groups == child.in_channels > 1:
            child.weight[:, :, child.kernel_size[0] // 2, child.kernel_size[1] // 2] += 1
    for name, parameter in module.named_parameters():
        if name.endswith("attention_biases"):
            parameter[:, 0] = 30.0
    linear = next((m for m in reversed(list(module.modules())) if isinstance(m, nn.Linear)), None)
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    module.eval()
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    noise = torch.randn(4, *size, generator=torch.Generator().manual_seed(3))
    if norms:
        module(noise)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    module.eval()
    if linear is not None:
        linear.weight /= max(1.0, classify(module, noise).std().item())  # logits of a working classifier's size
    return module


@torch.no_grad()
def misplaced(model: TTameModel, backgrounds: int = 6) -> list[str]:
    """Paint a spot: the tapped features must change most at that place, to within one cell.

    A cell counts relative to how much it changes on average, since borders and mixing over the whole image make some
    cells restless. Random weights are noisy: up to six backgrounds are averaged, and two spots of six may miss.

    Returns:
        one line per spot and layer that is wrong; empty where every layer passes.
    """
    height, width = model.config.image_size
    channels = len(model.config.pixel_scale)
    totals: list[torch.Tensor] = []
    wrong: dict[str, list[str]] = {}
    for seed in range(backgrounds):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(1, channels, height, width, generator=generator).repeat(len(SPOTS) + 1, 1, 1, 1)
        for image, (row, column) in zip(images[1:], SPOTS, strict=True):
            y, x = (
                slice(row * height // 7, (row + 1) * height // 7),
                slice(column * width // 7, (column + 1) * width // 7),
            )
            image[:, y, x] = 3 * torch.randn(image[:, y, x].shape, generator=generator)
        _, features = model.features(images)
        changes = [(maps[1:] - maps[:1]).float().abs().mean(dim=1) for maps in features]  # (spots, h, w)
        totals = changes if not totals else [a + b for a, b in zip(totals, changes, strict=True)]
        wrong = {}
        for layer, change in zip(model.layers, totals, strict=True):
            h, w = change.shape[-2:]
            relative = change / (change.mean(dim=0) + change.mean())
            for spot, (row, column) in zip(relative, SPOTS, strict=True):
                peak = int(spot.argmax())
                y, x = (peak // w + 0.5) / h, (peak % w + 0.5) / w
                if abs(y - (row + 0.5) / 7) > 0.5 / 7 + 1 / h or abs(x - (column + 0.5) / 7) > 0.5 / 7 + 1 / w:
                    place = f"({7 * y - 0.5:.1f}, {7 * x - 0.5:.1f})"
                    wrong.setdefault(layer.name, []).append(
                        f"{layer.name}: spot ({row}, {column}) of 7 x 7 shows at {place}"
                    )
        if not wrong:
            break
    return [line for lines in wrong.values() if len(lines) > 2 for line in lines]


def check_trains(model: TTameModel) -> None:
    """A step against the gradient lowers the loss; only the head has gradients, the backbone stays as it is."""
    before = fingerprint(model.backbone)
    start = copy.deepcopy(model.head.state_dict())
    model.train()
    generator = torch.Generator().manual_seed(1)
    height, width = model.config.image_size
    images = torch.randn(2, len(model.config.pixel_scale), height, width, generator=generator)
    with torch.no_grad():
        logits, features = model.features(images)
    targets = logits.argmax(dim=1)
    classes, position, counts = targets.unique(return_inverse=True, return_counts=True)

    def loss() -> torch.Tensor:
        masks = model.head(features, classes).sigmoid()
        own = masks[torch.arange(len(images)), position]
        masked_logits = model.classify(apply_mask(images, resize_maps(own, (height, width)), model.fill()))
        return ttame_loss(masked_logits, targets, masks, counts=counts).total

    first = loss()
    first.backward()
    parameters = [p for p in model.head.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters]
    size = torch.stack([g.norm() for g in gradients]).norm()
    assert 0 < size.item() < float("inf")
    assert all(p.grad is None for p in model.backbone.parameters())
    losses = []
    with torch.no_grad():
        for step in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):  # random weights bend the loss sharply: a short step must do
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= step * gradient / size
            losses.append(loss().item())
            if losses[-1] < first.item():
                break
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter += step * gradient / size
    model.head.load_state_dict(start)
    model.eval()
    assert losses[-1] < first.item(), (first.item(), losses)
    assert fingerprint(model.backbone) == before


def picture(seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((90, 70), Image.Resampling.BICUBIC)


def check_attached(model: TTameModel) -> list[str]:
    """Three layers or fewer, the placement check, and an explanation.

    Returns:
        layers whose place random weights do not show. Only for a module's own NCHW output, which is used as it is: a
        deep stack of random convolutions can mix the whole image. Where tokens or axes are reordered, it is an error.
    """
    assert 1 <= len(model.layers) <= 3
    wrong = misplaced(model)
    as_it_is = {x.name for x in model.layers if x.layout == "NCHW" and listed(x.name) is None}
    reordered = [line for line in wrong if line.split(": ")[0] not in as_it_is]
    assert not reordered, reordered
    (explanation,) = model.explain(picture())
    assert explanation.map.shape == (70, 90)
    assert np.isfinite(explanation.map).all()
    assert explanation.map.max() <= 1
    return list(dict.fromkeys(line.split(": ")[0] for line in wrong))


def check_trains_and_reloads(model: TTameModel, folder: Path) -> None:
    """A step that lowers the loss, an untouched backbone, and a head-only reload that is equal to the bit."""
    check_trains(model)
    model.save_pretrained(folder, include_backbone=False)
    assert not (folder / "backbone").exists()
    again = TTameModel.from_pretrained(folder, backbone=model.backbone)
    size = (2, len(model.config.pixel_scale), *model.config.image_size)
    images = torch.randn(size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        one, two = model(images, class_ids="all"), again(images, class_ids="all")
    assert torch.equal(one.logits, two.logits)
    assert torch.equal(one.map_logits, two.map_logits)
