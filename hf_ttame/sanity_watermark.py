"""Sanity with a planted shortcut: a classifier that can only know its watermarks, and a head that must show them."""

import torch
from torch import nn

from .masking import min_max, resize_maps
from .metrics import energy_inside
from .metrics.sanity import Check, check_watermark
from .modeling_ttame import TTameModel
from .sanity_random import explain, fit_head


def _backgrounds(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Smooth random colours with grain, in [0, 1]."""
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    return (smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)


def watermarked(
    count: int, size: int, side: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures whose class is told by a watermark alone: stripes upright, level, or squares, anywhere.

    Returns:
        images (count, 3, size, size) in [0, 1], labels (count,), regions (count, size, size) bool.
    """
    images = _backgrounds(count, size, generator)
    labels = torch.randint(3, (count,), generator=generator)
    period = torch.arange(side) // max(1, side // 8) % 2
    patterns = torch.stack(
        [period[None].expand(side, -1), period[:, None].expand(-1, side), period[None] ^ period[:, None]]
    ).float()
    regions = torch.zeros(count, size, size, dtype=torch.bool)
    for row in range(count):
        top, left = torch.randint(size - side + 1, (2,), generator=generator).tolist()
        images[row, :, top : top + side, left : left + side] = patterns[labels[row]]
        regions[row, top : top + side, left : left + side] = True
    return images, labels, regions


def watermark(
    *, steps: int = 150, size: int = 96, side: int = 32, images: int = 64, batch_size: int = 16, seed: int = 0
) -> Check:
    """(d) A small classifier that can only know its watermarks; a head trained on it must show them.

    The figures hold the classifier's accuracy: below 95 percent it did not take the shortcut and nothing was tested.
    """
    import timm

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        facts = {"input_size": (3, size, size), "mean": (0.5,) * 3, "std": (0.5,) * 3}
        classifier = timm.create_model("test_resnet", num_classes=3, pretrained_cfg_overlay=facts)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(steps, 2))
    classifier.train()
    for _ in range(steps):
        x, labels, _ = watermarked(batch_size, size, side, generator)
        # A classifier that never saw dim pictures answers at random under a soft mask, and no head can learn from it.
        x = x * torch.rand(batch_size, 1, 1, 1, generator=generator)
        nn.functional.cross_entropy(classifier(2 * x - 1), labels).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    # Cells of a map must be finer than the mark: those of the first stage are 4 pixels wide.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TTameModel.from_backbone(classifier.eval(), feature_layers=["layer1", "layer2"])
    fit_head(model, lambda _: 2 * watermarked(batch_size, size, side, generator)[0] - 1, steps, 5e-3)
    x, labels, regions = watermarked(images, size, side, generator)
    with torch.no_grad():
        predicted = model.classify(2 * x - 1).argmax(dim=1)
    accuracy = float((predicted == labels).float().mean())
    maps = min_max(resize_maps(explain(model, 2 * x - 1, predicted), (size, size)))
    found = check_watermark(100 * energy_inside(maps, regions).cpu().numpy())
    area = float(regions.float().mean())
    figures = {**found.figures, "accuracy": accuracy, "area": area}
    return Check(
        found.value, f"{found.must} on {100 * area:.0f} % of the area", found.passed and accuracy >= 0.95, figures
    )
