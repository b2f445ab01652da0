"""The loss against values worked by hand and a slow loop over the formula (arXiv 2403.04523, section III)."""

import math

import pytest
import torch

from hf_ttame.losses import LossTerms, LossWeights, ttame_loss

LITERAL = LossWeights(reference_classes=None)


def random_batch(batch: int, classes: int, maps: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(batch + 10 * maps)
    logits = torch.randn(batch, classes, generator=generator, dtype=dtype)
    targets = torch.randint(classes, (batch,), generator=generator)
    return logits, targets, torch.rand(batch, maps, 4, 3, generator=generator, dtype=dtype)


def slow_terms(logits: torch.Tensor, targets: torch.Tensor, masks: torch.Tensor) -> tuple[float, float, float]:
    """Cross-entropy, area, variation, one number at a time, each map counted once."""
    batch, maps, h, w = masks.shape
    cross_entropy = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        cross_entropy -= math.log(math.exp(row[target]) / sum(math.exp(value) for value in row)) / batch
    area = differences = border = 0.0
    for a in masks.flatten(0, 1).tolist():
        for i in range(h):
            for j in range(w):
                area += (a[i][j] + 0.0005) ** 0.3 / (batch * maps * h * w)
                if i + 1 < h:
                    differences += (a[i + 1][j] - a[i][j]) ** 2
                if j + 1 < w:
                    differences += (a[i][j + 1] - a[i][j]) ** 2
        border += sum(a[0][j] ** 2 for j in range(w)) + sum(a[h - 1][j] ** 2 for j in range(w))
        border += sum(a[i][0] ** 2 for i in range(h)) + sum(a[i][w - 1] ** 2 for i in range(h))
    return cross_entropy, area, (differences + 0.3 * border) / (2 * batch)


def values(terms: LossTerms) -> list[float]:
    return [term.item() for term in terms]


def test_a_2x2_mask_worked_by_hand() -> None:
    masks = torch.tensor([[[[0.0, 1.0], [0.5, 0.0]]]], dtype=torch.float64)
    logits = torch.zeros(1, 2, dtype=torch.float64)
    rows = 0.5**2 + 1.0**2
    columns = 1.0**2 + 0.5**2
    top, bottom, left, right = 1.0, 0.25, 0.25, 1.0
    variation = (rows + columns + 0.3 * (top + bottom + left + right)) / 2
    area = (2 * 0.0005**0.3 + 0.5005**0.3 + 1.0005**0.3) / 4
    assert variation == pytest.approx(1.625)

    terms = ttame_loss(logits, torch.tensor([0]), masks)
    scaled = 1.5 * math.log(2) + 2 * area + 0.01 * 32 * variation
    assert values(terms) == pytest.approx([scaled, math.log(2), area, variation], rel=1e-12)

    terms = ttame_loss(logits, torch.tensor([0]), masks, LITERAL)
    literal = 1.5 * math.log(2) + 2 * area + 0.01 * variation
    assert values(terms) == pytest.approx([literal, math.log(2), area, variation], rel=1e-12)


@pytest.mark.parametrize(
    ("mask", "variation"),
    [
        ([[0, 0, 0], [0, 1, 0], [0, 0, 0]], 4 / 2),  # four differences, no border
        ([[1, 0, 0], [0, 0, 0], [0, 0, 0]], (2 + 0.3 * 2) / 2),  # a corner is in two border lines
        ([[0, 1, 0], [0, 0, 0], [0, 0, 0]], (3 + 0.3 * 1) / 2),  # an edge is in one
        ([[1, 1, 1], [1, 1, 1], [1, 1, 1]], 0.3 * 12 / 2),  # four lines of three
        ([[0, 0, 0], [0, 0, 0], [0, 0, 0]], 0.0),
    ],
    ids=["centre", "corner", "edge", "ones", "zeros"],
)
def test_variation_of_3x3_masks_worked_by_hand(mask: list[list[int]], variation: float) -> None:
    masks = torch.tensor(mask, dtype=torch.float64)[None, None]
    found = ttame_loss(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([1]), masks).variation
    assert float(found) == pytest.approx(variation, abs=1e-12)


def test_two_images_of_two_classes_worked_by_hand() -> None:
    centre = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.float64)
    ones, zeros = torch.ones_like(centre), torch.zeros_like(centre)
    masks = torch.stack([torch.stack([centre, ones]), torch.stack([zeros, zeros])])
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]], dtype=torch.float64)
    cross_entropy = (math.log(4 / 3) + math.log(2)) / 2
    area = (10 * 1.0005**0.3 + 26 * 0.0005**0.3) / 36
    variation = (4 + 0.3 * 12) / (2 * 2)
    total = 1.5 * cross_entropy + 2 * area + 0.01 * (32 / 2) * variation
    found = ttame_loss(logits, torch.tensor([1, 0]), masks)
    assert values(found) == pytest.approx([total, cross_entropy, area, variation], rel=1e-12)

    # The first class twice: its maps weigh double in both terms, and N is 3.
    area = (11 * 1.0005**0.3 + 43 * 0.0005**0.3) / 54
    variation = (2 * 4 + 0.3 * 12) / (2 * 2)
    total = 1.5 * cross_entropy + 2 * area + 0.01 * (32 / 3) * variation
    found = ttame_loss(logits, torch.tensor([1, 0]), masks, counts=torch.tensor([2, 1]))
    assert values(found) == pytest.approx([total, cross_entropy, area, variation], rel=1e-12)


@pytest.mark.parametrize(("batch", "maps"), [(1, 1), (2, 5), (4, 4)])
@pytest.mark.parametrize("reference_classes", [32, 7, None])
def test_random_masks_equal_the_slow_loop(batch: int, maps: int, reference_classes: int | None) -> None:
    logits, targets, masks = random_batch(batch, 6, maps)
    cross_entropy, area, variation = slow_terms(logits, targets, masks)
    scale = 1.0 if reference_classes is None else reference_classes / maps
    total = 1.5 * cross_entropy + 2 * area + 0.01 * scale * variation
    found = ttame_loss(logits, targets, masks, LossWeights(reference_classes=reference_classes))
    assert values(found) == pytest.approx([total, cross_entropy, area, variation], rel=1e-12)


@pytest.mark.parametrize("weights", [LossWeights(), LITERAL], ids=["scaled", "literal"])
def test_counts_equal_the_duplicated_maps(weights: LossWeights) -> None:
    logits, _, every_class = random_batch(5, 7, 7)
    targets = torch.tensor([6, 2, 6, 0, 6])
    unique, counts = targets.unique(return_counts=True)
    assert counts.tolist() == [1, 1, 3]
    leaf = every_class.requires_grad_()
    literal = ttame_loss(logits, targets, leaf[:, targets], weights)
    weighted = ttame_loss(logits, targets, leaf[:, unique], weights, counts)
    assert values(weighted) == pytest.approx(values(literal), rel=1e-13)
    expected, found = (torch.autograd.grad(terms.total, leaf)[0] for terms in (literal, weighted))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_at_32_classes_the_scale_changes_nothing() -> None:
    logits, targets, masks = random_batch(2, 3, 32)
    assert ttame_loss(logits, targets, masks).total == ttame_loss(logits, targets, masks, LITERAL).total


def test_terms_are_unweighted_and_a_weight_of_zero_drops_its_term() -> None:
    logits, targets, masks = random_batch(3, 4, 3)
    default = ttame_loss(logits, targets, masks)
    only = {
        "cross_entropy": LossWeights(cross_entropy=1.0, area=0.0, variation=0.0),
        "area": LossWeights(cross_entropy=0.0, area=1.0, variation=0.0),
        "variation": LossWeights(cross_entropy=0.0, area=0.0, variation=1.0, reference_classes=None),
    }
    for name, weights in only.items():
        found = ttame_loss(logits, targets, masks, weights)
        assert values(found)[1:] == values(default)[1:]
        assert float(found.total) == pytest.approx(float(getattr(default, name)), rel=1e-12)


def test_gradient_flows_to_the_masks() -> None:
    logits, targets, masks = random_batch(2, 3, 2)
    masks[0, 0] = 0.0
    assert torch.autograd.gradcheck(lambda m: ttame_loss(logits, targets, m).total, masks[1:].clone().requires_grad_())
    masks.requires_grad_()
    logits.requires_grad_()
    ttame_loss(logits, targets, masks).total.backward()
    assert masks.grad.isfinite().all()
    assert (masks.grad != 0).all()
    # 1.5 * (softmax - one-hot) / B
    one_hot = torch.nn.functional.one_hot(targets, 3)
    torch.testing.assert_close(logits.grad, 1.5 * (logits.detach().softmax(dim=1) - one_hot) / 2)


def test_masks_without_a_class_dimension_raise() -> None:
    with pytest.raises(ValueError, match=r"\(B, N, h, w\), got shape \(2, 4, 4\)"):
        ttame_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), torch.zeros(2, 4, 4))
