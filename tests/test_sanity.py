"""Sanity: rank correlation by hand, thresholds, and each check on tiny backbones."""

import copy
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_vit, vit_processor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from hf_ttame import TTameModel, sanity_watermark
from hf_ttame import sanity_checks as checks
from hf_ttame import sanity_random as random_checks
from hf_ttame.backbones import Backbone
from hf_ttame.card_figures import figures, normalised
from hf_ttame.evaluation_images import Scan
from hf_ttame.evaluation_plan import Plan
from hf_ttame.metrics import sanity
from hf_ttame.metrics.localization import quadrants
from hf_ttame.records import head_fingerprint


@pytest.fixture(scope="module")
def model(timm_cnn: nn.Module) -> TTameModel:
    return TTameModel.from_backbone(timm_cnn)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    coarse = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size=(64, 64), mode="bicubic")


@pytest.fixture(scope="module")
def targets(model: TTameModel, images: torch.Tensor) -> torch.Tensor:
    return model.classify(images).argmax(dim=1)


def scanned(model: TTameModel, images: torch.Tensor) -> tuple[Scan, list[list[int]]]:
    tiles = F.interpolate(images, size=(32, 32), mode="bilinear")
    classes = torch.arange(8) % 4
    return Scan(torch.arange(8), classes, torch.ones(8), torch.zeros(8, 8, 8), tiles, torch.arange(8)), [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]


def test_rank_correlation_by_hand() -> None:
    a = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert sanity.rank_correlation(a, a.exp()).item() == pytest.approx(1.0)
    assert sanity.rank_correlation(a, -a).item() == pytest.approx(-1.0)
    # Ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15).
    assert sanity.rank_correlation(a, torch.tensor([[[2.0, 1.0], [4.0, 3.0]]])).item() == pytest.approx(0.6)
    assert sanity.rank_correlation(a, torch.ones_like(a)).item() == 0
    assert sanity.ranks(torch.tensor([[5.0, 1.0, 5.0]])).tolist() == [[2.5, 1.0, 2.5]]


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_rank_correlation_ignores_increasing_changes(seed: int) -> None:
    a, b = torch.rand(2, 1, 5, 4, generator=torch.Generator().manual_seed(seed))
    found = sanity.rank_correlation(a, b)
    assert torch.allclose(sanity.rank_correlation(a**3, b * 7 + 1), found, atol=1e-5)
    assert torch.allclose(sanity.rank_correlation(b, a), found, atol=1e-5)
    assert found.abs().item() <= 1 + 1e-6


def test_thresholds_are_the_numbers_that_the_module_has_had_from_its_start() -> None:
    """The numbers alone: what (a), (b) and (d) hold against them has changed, as the module says."""
    assert sanity.RANDOMISED_CORRELATION_BELOW == 0.3
    assert sanity.CHANCE_GRID_POINTING == 25
    assert sanity.WATERMARK_ENERGY_AT_LEAST == 80


def test_figures_are_held_against_the_thresholds() -> None:
    def passed(check: sanity.Check) -> bool:
        assert check.passed is not None
        return check.passed

    many, even, falling = np.full(50, 1.0), np.full(20, 25.0), [2.0, 1.0]
    assert passed(sanity.check_randomised({"25 %": many, "100 %": 0.29 * many}, many))
    assert not passed(sanity.check_randomised({"25 %": 0 * many, "100 %": 0.31 * many}, 0 * many))
    assert "with another image's true map 0.50" in sanity.check_randomised({"100 %": many}, many / 2).value
    assert passed(sanity.check_no_prior(np.array([20.0, 30.0] * 10), falling, even))
    assert not passed(sanity.check_no_prior(np.array([40.0, 42.0] * 10), falling, even))
    assert not passed(sanity.check_no_prior(np.array([20.0, 30.0] * 10), [1.0, 1.0], even))  # it learned nothing
    noise = [2.0, 1.0] * 50  # tenths of ten steps: the last is no lower than the first
    assert not passed(sanity.check_no_prior(np.array([20.0, 30.0] * 10), [*noise, *[1.9, 1.0] * 50], even))
    assert passed(sanity.check_class_on_mosaics(np.array([40.0, 42.0] * 10)))
    assert not passed(sanity.check_class_on_mosaics(np.array([20.0, 30.0] * 10)))
    assert passed(sanity.check_watermark(80 * many))
    assert not passed(sanity.check_watermark(79 * many))
    assert passed(sanity.check_other_class(many))
    assert not passed(sanity.check_other_class(np.array([-1.0, 1.0] * 10)))
    assert passed(sanity.check_not_worse({"a": -many, "b": np.array([-1.0, 1.0] * 10)}, "x"))
    assert not passed(sanity.check_not_worse({"a": -many, "b": many}, "x"))
    assert passed(sanity.check_not_worse({"a": -many, "b": many}, "x", shown_only=["b"]))
    assert passed(sanity.check_stable({"shift": 0.9 * many}, 0.0))
    assert not passed(sanity.check_stable({"shift": 0.9 * many}, 1e-3))
    assert not passed(sanity.check_stable({"shift": 0.9 * many, "noise": 0.7 * many}, 0.0))


@pytest.mark.parametrize(
    ("check", "fewest"),
    [
        (lambda n: sanity.check_randomised({"100 %": np.zeros(n)}, np.zeros(n)), 10),
        (lambda n: sanity.check_no_prior(np.full(n, 25.0), [2.0, 1.0], np.full(n, 25.0)), 20),
        (lambda n: sanity.check_class_on_mosaics(np.full(n, 90.0)), 10),
        (lambda n: sanity.check_other_class(np.ones(n)), 10),
        (lambda n: sanity.check_watermark(np.full(n, 90.0)), 10),
        (lambda n: sanity.check_not_worse({"a": -np.ones(n)}, "x"), 20),
        (lambda n: sanity.check_stable({"shift": np.ones(n)}, 0.0), 10),
    ],
)
def test_few_images_are_not_judged(check: Callable[[int], sanity.Check], fewest: int) -> None:
    assert check(fewest).passed is True
    few = check(fewest - 1)
    assert few.passed is None
    assert re.match(f"too few to judge, {fewest - 1} of {fewest} (images|mosaics[a-z ]*): ", few.value)
    assert few.figures
    assert few.must == check(fewest).must


def test_each_random_backbone_needs_its_mosaics() -> None:
    chance = np.full(40, 25.0)
    assert sanity.check_no_prior(chance, [2.0, 1.0], chance).passed is True
    assert sanity.check_no_prior(chance, [2.0, 1.0], chance, backbones=3).passed is None


def test_randomising_goes_from_the_classifier_downwards(model: TTameModel, images: torch.Tensor) -> None:
    order = random_checks.modules_in_order(model.backbone, images)
    assert order[0] is model.backbone.timm_model.conv1 or isinstance(order[0], nn.Conv2d)
    assert order[-1] is model.backbone.timm_model.fc
    other = copy.deepcopy(model)
    random_checks.randomise(other.backbone, 0.5, images)
    changed = [
        not all(
            torch.equal(a, b)
            for a, b in zip(mine.parameters(recurse=False), his.parameters(recurse=False), strict=True)
        )
        for mine, his in zip(order, random_checks.modules_in_order(other.backbone, images), strict=True)
    ]
    half = len(order) - -(-len(order) // 2)
    assert not any(changed[:half])
    assert sum(changed[half:]) > 0.8 * len(changed[half:])
    assert other.classify(images).isfinite().all()
    assert not any(module.training for module in other.backbone.modules())
    # The same seed, the same backbone.
    again = copy.deepcopy(model)
    random_checks.randomise(again.backbone, 0.5, images)
    assert torch.equal(again.classify(images), other.classify(images))


def test_position_embeddings_of_a_transformer_are_randomised_last() -> None:
    vit = make_vit()
    order = random_checks.modules_in_order(vit, torch.randn(1, 3, 64, 64))
    assert order[-1] is vit.classifier
    assert any(hasattr(module, "position_embeddings") for module in order[:2])


def test_cascade_measures_every_share_and_leaves_the_model_alone(
    model: TTameModel, images: torch.Tensor, targets: torch.Tensor
) -> None:
    before = checks.explain(model, images, targets)
    found = random_checks.cascading_randomisation(model, images, targets)
    shares = ["25 % of layers", "50 % of layers", "75 % of layers", "100 % of layers"]
    assert list(found.figures) == [*shares, "all layers, another image's true map"]
    assert all(-1 <= figures["mean"] < 0.99 for figures in found.figures.values())
    assert torch.equal(checks.explain(model, images, targets), before)


def test_a_map_that_ignores_the_backbone_fails_the_cascade(
    model: TTameModel, images: torch.Tensor, targets: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = images.mean(dim=1)[:, ::8, ::8]
    monkeypatch.setattr(random_checks, "explain", lambda *_: picture)  # an edge detector, so to speak
    found = random_checks.cascading_randomisation(model, images, targets)
    assert not found.passed
    assert found.figures["100 % of layers"]["mean"] == pytest.approx(1.0)
    assert found.figures["all layers, another image's true map"]["mean"] < 0.99


def test_the_loss_of_the_training_is_shown_by_its_tenths() -> None:
    found = sanity.check_no_prior(np.array([20.0, 30.0]), [4.0, 2.0, *[9.0] * 16, 1.0, 1.5], np.array([40.0, 60.0]))
    assert (found.figures["loss at the beginning"], found.figures["loss at the end"]) == (3.0, 1.25)
    assert found.value.endswith("; loss 3 to 1.25")
    assert "; what the quarter adds to the answer beyond the others 50.00 (" in found.value
    assert found.figures["the quarter adds"]["mean"] == 50.0
    assert "loss" in found.must


@pytest.mark.parametrize("kind", ["timm_cnn", "hf_vit"])
def test_a_random_backbone_gives_different_answers(
    kind: str, images: torch.Tensor, request: pytest.FixtureRequest
) -> None:
    """A plain tensor of a timm model, the output object of one of transformers."""
    backbone = copy.deepcopy(request.getfixturevalue(kind))
    random_checks.randomise(backbone, 1.0, images)
    random_checks.spread_answers(backbone, images)
    logits = random_checks.classify(backbone, images)
    assert torch.allclose(logits.mean(dim=0), torch.zeros(logits.shape[1]), atol=1e-3)
    assert torch.allclose(logits.std(dim=0), torch.ones(logits.shape[1]), atol=1e-2)
    assert len(logits.argmax(dim=1).unique()) > 2


def test_answers_in_an_output_object_without_logits_spread_too(images: torch.Tensor) -> None:
    class Plain(nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> BaseModelOutput:
            return BaseModelOutput(last_hidden_state=pixel_values.mean(dim=(2, 3)) + 5)

    backbone = Plain()
    random_checks.spread_answers(backbone, images)
    assert torch.allclose(random_checks.classify(backbone, images).std(dim=0), torch.ones(3), atol=1e-2)


def test_a_head_is_trained_on_the_random_backbone(model: TTameModel, images: torch.Tensor) -> None:
    before = copy.deepcopy(model.head.state_dict())
    logits = model.classify(images)
    found = random_checks.retrained_on_random(model, images.repeat(2, 1, 1, 1), steps=40, batch_size=8)
    assert found.figures["n"] >= 2
    assert 0 <= found.figures["mean"] <= 100
    assert found.figures["loss at the beginning"] > found.figures["loss at the end"]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.head.state_dict().values(), strict=True))
    assert torch.equal(model.classify(images), logits)  # no hook is left on it


def test_shapley_values_by_hand() -> None:
    """Sets in the order {}, {a}, {b}, {a, b}, then the same with c."""
    gloves = torch.tensor([0.0, 0, 0, 1, 0, 1, 0, 1])  # a holds the left one, b and c a right one each: a pair is 1
    assert torch.allclose(sanity.shapley_values(gloves), torch.tensor([4 / 6, 1 / 6, 1 / 6]))
    alone = torch.tensor([5.0, 7, 4, 6])  # a adds 2, b takes 1, whatever is there
    assert torch.allclose(sanity.shapley_values(torch.stack([alone, 2 * alone])), torch.tensor([[2.0, -1], [4, -2]]))
    for wrong in (torch.zeros(6), torch.zeros(1), torch.zeros(0), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="2 \\*\\* n"):
            sanity.shapley_values(wrong)


@given(st.lists(st.floats(-10, 10), min_size=16, max_size=16))
def test_shapley_values_share_out_the_whole(worth: list[float]) -> None:
    parts = sanity.shapley_values(torch.tensor(worth, dtype=torch.float64))
    assert float(parts.sum()) == pytest.approx(worth[15] - worth[0], abs=1e-9)
    orders = list(itertools.permutations(range(4)))  # as it is defined: the mean over all orders of coming
    for player in range(4):
        added = []
        for order in orders:
            before = sum(1 << other for other in order[: order.index(player)])
            added.append(worth[before | 1 << player] - worth[before])
        assert float(parts[player]) == pytest.approx(np.mean(added), abs=1e-9)


def test_what_a_tile_adds_by_hand() -> None:
    def classify(pixel_values: torch.Tensor) -> torch.Tensor:
        """Class k: three times the brightness of quarter k, once that of the next; class 4 never changes; class 5 only
        where quarters 0 and 1 are both there."""
        quarters = (pixel_values[:, :1] * quadrants((8, 8))).mean(dim=(-2, -1)) * 4
        logits = 3 * quarters + quarters.roll(-1, dims=1)
        together = quarters[:, :1] * quarters[:, 1:2]
        return torch.cat([logits, torch.ones(len(logits), 1), together], dim=1)

    config = SimpleNamespace(image_size=(8, 8))
    model: Any = SimpleNamespace(classify=classify, config=config, device="cpu", fill=lambda: torch.zeros(3))
    tiles, groups = torch.ones(8, 3, 4, 4), [[0, 1, 2, 3], [4, 5, 6, 7]]

    def adds(*classes: int) -> list[float]:
        return random_checks._own_tile_adds(model, tiles, torch.tensor(classes), groups).tolist()

    assert adds(0, 1, 2, 3, 0, 1, 2, 3) == pytest.approx([3 - 1 / 3, 3 - 1 / 3])
    assert adds(4, 4, 4, 4, 1, 1, 1, 1) == pytest.approx([0, 0], abs=1e-5), "answers of no tile, and all of the same"
    # Class 1 in quarter 0: 0 - 4 / 3; class 0 in quarter 1: 1 - 3 / 3.
    assert adds(1, 0, 4, 4, 0, 4, 4, 4) == pytest.approx([-4 / 3 / 4, (3 - 1 / 3) / 4])
    # Blacking out either of two that are needed takes all away: each adds a half.
    assert adds(5, 4, 4, 4, 4, 5, 4, 4) == pytest.approx([(1 / 2 - 1 / 6) / 4] * 2)
    assert tiles.eq(1).all()


def test_the_retrained_head_is_asked_for_classes_that_it_was_trained_on(
    model: TTameModel, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    asked: list[torch.Tensor] = []
    choose, show = random_checks.choose_targets, random_checks.explain

    def choosing(*arguments: Any) -> torch.Tensor:
        targets = choose(*arguments)
        trained.extend(targets.tolist())
        return targets

    def explaining(model: TTameModel, pixel_values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        asked.append(targets)
        return show(model, pixel_values, targets)

    monkeypatch.setattr(random_checks, "choose_targets", choosing)
    monkeypatch.setattr(random_checks, "explain", explaining)
    random_checks.retrained_on_random(model, images.repeat(2, 1, 1, 1), steps=6, batch_size=16)
    assert len(asked) >= 2
    assert all(len(set(classes.tolist())) == 4 for classes in asked)
    assert {int(c) for classes in asked for c in classes} <= set(trained)


@pytest.mark.parametrize(("finds", "passed"), [("nothing", True), ("its tile", False)])
def test_one_tile_of_each_mosaic_counts_for_the_prior_and_all_four_for_the_class(
    model: TTameModel, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch, finds: str, passed: bool
) -> None:
    """A map that ignores the class has 25 % in the mean of the four tiles, whatever it shows."""

    def maps(_model: TTameModel, pixel_values: torch.Tensor, _targets: torch.Tensor) -> torch.Tensor:
        if finds == "nothing":
            corner = torch.linspace(1, 0, 64).square()
            return (corner[:, None] * corner).expand(4, -1, -1)
        return quadrants((64, 64)).float()

    monkeypatch.setattr(random_checks, "explain", maps)
    monkeypatch.setattr(random_checks, "fit_head", lambda *_: [2.0, 1.0])
    views = [images, images.flip(-1), images.flip(-2), images.flip(-1, -2)]
    monkeypatch.setattr(sanity, "FEWEST", 5)  # mosaics of each backbone; 64 pictures do not make 20
    views += [view.roll(16, -1) for view in views]
    found = random_checks.retrained_on_random(model, torch.cat(views), steps=2)
    assert found.figures["n"] >= 15
    assert found.passed == passed
    if finds == "nothing":
        assert found.figures["high"] - found.figures["low"] > 10
    on_mosaics = checks.class_on_mosaics(model, *scanned(model, images))
    assert on_mosaics.figures["n"] == 2
    assert on_mosaics.figures["mean"] == pytest.approx(25 if finds == "nothing" else 100, abs=1e-3)


def test_checks_that_cannot_be_made_say_so(model: TTameModel, images: torch.Tensor, targets: torch.Tensor) -> None:
    scan, groups = scanned(model, images)
    for found, why in (
        (
            random_checks.retrained_on_random(model, images[:4], steps=2),
            "of four different answers of the random backbone",
        ),
        (checks.class_on_mosaics(model, scan, groups[:1]), "of four different confident classes are needed, got 1"),
        (checks.independent_judge(model, images, targets, None), "no --judge given"),
    ):
        assert found.passed is None
        assert found.value.startswith("not made: ")
        assert why in found.value
        assert found.must
        assert found.figures == {}


def test_a_fresh_head_can_learn_where_features_are_large(
    timm_cnn: nn.Module, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = TTameModel.from_backbone(copy.deepcopy(timm_cnn), head_init="random")
    features = own.features

    def large(pixel_values: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        logits, found = features(pixel_values)
        return logits, [1e4 * maps for maps in found]

    monkeypatch.setattr(own, "features", large)
    random_checks.fresh_head(own)
    with torch.no_grad():
        assert own.head.eval()(own.features(images)[1]).square().mean().sqrt() < 8


def test_fitting_lowers_the_loss_and_starts_where_it_is_told(model: TTameModel, images: torch.Tensor) -> None:
    own = copy.deepcopy(model)
    random_checks.fresh_head(own)
    with torch.no_grad():
        _, features = own.features(images)
        mean = own.head(features).mean(dim=(2, 3))
    # test_resnet averages its last map: the fresh head is the class activation map again.
    assert torch.allclose(mean, own.classify(images), atol=1e-3)
    losses = random_checks.fit_head(own, lambda _: images, 40, 1e-2)
    assert len(losses) == 40
    assert not own.head.training
    assert losses[-1] < 0.9 * losses[0]


def test_second_class_fills_and_stability(model: TTameModel, images: torch.Tensor, targets: torch.Tensor) -> None:
    assert checks.second_class(model, images).figures["n"] == 8
    fills = checks.held_out_fills(model, images, targets)
    assert list(fills.figures) == [
        f"{fill} {share}" for fill in ("black", "mean", "blur", "road") for share in (50, 15)
    ]
    stable = checks.stability(model, images, targets)
    assert stable.figures["repeat"] == 0
    assert stable.figures["noise of 0.02"]["mean"] > 0.5


class _Bright(nn.Module):
    """Class k of two: how bright half k of the picture is; the halves of `images` below are white and black."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        half = pixel_values.shape[-1] // 2
        return torch.stack([pixel_values[..., :half].mean((1, 2, 3)), pixel_values[..., half:].mean((1, 2, 3))], dim=1)


def planted(*, reverse: bool = False) -> tuple[Any, torch.Tensor, torch.Tensor, Callable[..., torch.Tensor]]:
    """A stub explainer of `_Bright`, pictures, their classes, and maps that are right, or exactly wrong."""
    classify = lambda x: 20 * _Bright()(x)  # noqa: E731
    config = SimpleNamespace(classifier_outputs="softmax", pixel_scale=[1.0] * 3, pixel_shift=[0.0] * 3)
    model: Any = SimpleNamespace(
        classify=classify, config=config, device=torch.device("cpu"), fill=lambda *_: torch.zeros(3)
    )
    images, targets = torch.full((24, 3, 16, 16), 0.3), torch.arange(24) % 2
    for row, target in enumerate(targets.tolist()):
        images[row, ..., 8 * target : 8 * target + 8] = 1.0

    def explain(_model: Any, _pixel_values: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
        maps = torch.zeros(len(class_ids), 16, 16)
        for row, wanted in enumerate(class_ids.tolist()):
            wanted = 1 - wanted if reverse else wanted
            maps[row, :, 8 * wanted : 8 * wanted + 8] = 1.0
        return maps

    return model, images, targets, explain


@pytest.mark.parametrize("reverse", [False, True])
def test_signs_of_the_checks_on_planted_maps(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right maps beside a Grad-CAM that is exactly wrong, and the other way round."""
    model, images, targets, explain = planted(reverse=reverse)
    _, _, _, other = planted(reverse=not reverse)
    monkeypatch.setattr(checks, "explain", explain)
    monkeypatch.setattr(checks, "_gradcam", other)
    monkeypatch.setattr(checks, "impute", lambda x, gone: x * ~gone[:, None])  # flat halves: it would give them away
    fills = checks.held_out_fills(model, images, targets)
    assert fills.passed is not reverse
    assert fills.figures["mean 50"]["mean"] > 30 if reverse else fills.figures["mean 50"]["mean"] < -30
    second = checks.second_class(model, images)
    assert second.passed is not reverse
    monkeypatch.setattr(
        checks, "judge_of", lambda *_: (checks.judge_by(model.classify), lambda x: model.classify(x).argmax(dim=1))
    )
    judge = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(architecture="resnet50")))
    judged = checks.independent_judge(model, images, targets, judge)  # type: ignore[arg-type]
    assert "resnet50" in judged.must
    assert judged.passed is not reverse


def test_the_fill_of_the_training_is_not_judged(
    model: TTameModel, images: torch.Tensor, targets: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checks.trained_fill(model) == "black", "no record"
    model.save_pretrained(tmp_path)
    record = {"head_fingerprint": head_fingerprint(model.head.state_dict()), "arguments": {"fill": "blur"}}
    (tmp_path / "training.json").write_text(json.dumps(record))
    assert checks.trained_fill(TTameModel.from_pretrained(tmp_path)) == "blur"
    judged: list[str] = []

    def noted(differences: dict[str, np.ndarray], what: str, shown_only: list[str]) -> sanity.Check:
        judged.extend(name for name in differences if name not in shown_only)
        return sanity.check_not_worse(differences, what, shown_only)

    monkeypatch.setattr(checks, "check_not_worse", noted)
    checks.held_out_fills(model, images, targets, "blur")
    assert {name.split()[0] for name in judged} == {"black", "mean", "road"}


def test_a_map_that_moves_with_the_picture_is_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, targets, _ = planted()
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(checks, "explain", lambda _m, x, _t: x.mean(dim=1))
    found = checks.stability(model, images + noise, targets)
    assert found.figures["shift by 4 px"]["mean"] == pytest.approx(1.0)
    assert found.figures["repeat"] == 0
    still = noise.mean(dim=1)
    monkeypatch.setattr(checks, "explain", lambda *_: still)  # it stays where it is
    assert checks.stability(model, images, targets).figures["shift by 4 px"]["mean"] < 0.5


def test_the_judge_s_outputs_are_read_as_its_config_says(model: TTameModel, images: torch.Tensor) -> None:
    other = Backbone(make_vit(seed=3), vit_processor())
    other.model.config.problem_type = "multi_label_classification"
    judge, predict = checks.judge_of(model, other)
    own = predict(images)
    shift, scale = (torch.tensor(v)[:, None, None] for v in (model.config.pixel_shift, model.config.pixel_scale))
    with torch.no_grad():
        logits = other.model(((images - shift) / scale - 0.5) / 0.5).logits
    assert torch.allclose(judge(images, own).confidence, logits.max(dim=1).values.sigmoid(), atol=1e-5)


def test_another_judge_sees_the_same_pixels(model: TTameModel, images: torch.Tensor, targets: torch.Tensor) -> None:
    other = Backbone(make_vit(seed=3), vit_processor())
    judge, predict = checks.judge_of(model, other)
    pixels = (images - torch.tensor(model.config.pixel_shift)[:, None, None]) / torch.tensor(model.config.pixel_scale)[
        :, None, None
    ]
    with torch.no_grad():
        direct = other.model((pixels - 0.5) / 0.5).logits
    own = predict(images)
    assert torch.equal(own, direct.argmax(dim=1))
    confidence = judge(images, own).confidence
    assert torch.allclose(confidence, direct.softmax(dim=1).max(dim=1).values, atol=1e-5)
    found = checks.independent_judge(model, images, targets, other)
    assert list(found.figures) == ["binary 50", "binary 15"]


def test_watermarked_pictures_tell_the_class_in_the_region_alone() -> None:
    images, labels, regions = sanity_watermark.watermarked(12, 64, 24, torch.Generator().manual_seed(0))
    assert regions.sum(dim=(1, 2)).eq(24 * 24).all()
    for image, label, region in zip(images, labels, regions, strict=True):
        mark = image[:, region].reshape(3, 24, 24)
        assert set(mark.unique().tolist()) == {0.0, 1.0}
        upright, level = bool((mark == mark[:, :1]).all()), bool((mark == mark[:, :, :1]).all())
        assert (upright, level) == [(True, False), (False, True), (False, False)][int(label)]


def test_the_watermark_experiment_runs() -> None:
    found = checks.watermark(steps=4, size=64, side=24, images=4, batch_size=4)
    assert found.figures["n"] == 4
    assert not found.passed  # four steps teach nothing: the classifier's accuracy says so
    assert found.figures["accuracy"] < 0.95


@pytest.mark.slow
def test_the_watermark_is_found() -> None:
    found = checks.watermark()
    assert found.passed, found
    assert found.figures["accuracy"] > 0.95
    assert found.figures["mean"] > 7 * 100 * found.figures["area"]


def test_all_checks_on_a_dataset(
    model: TTameModel, photo: Callable[..., Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        photo(seed=number).save(tmp_path / f"{number}.png")
    monkeypatch.setattr(checks, "watermark", lambda **_: sanity.check_watermark(np.full(10, 90.0)))  # has its own test
    said: list[str] = []
    plan = Plan(str(tmp_path), mosaics=2)
    found = checks.run_checks(model, plan, images=4, steps=2, say=said.append)
    assert [name[0] for name in found] == list("abccdefg")
    assert all({"value", "must", "passed", "figures", "with"} == entry.keys() for entry in found.values())
    left_out = {name for name, entry in found.items() if not entry["figures"]}
    assert all(entry["passed"] is None for name, entry in found.items() if name[0] != "d")  # four images
    assert left_out == {"b: head retrained on a random backbone", "c: class on mosaics", "f: independent judge"}
    assert any("not made: no --judge given" in line for line in said)


def test_checks_that_were_made_are_kept(
    vit_folder: Path,
    photo: Callable[..., Image.Image],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ttame: Callable[..., CompletedProcess[str]],
) -> None:
    pictures, explainer, output = tmp_path / "pictures", tmp_path / "explainer", tmp_path / "out"
    pictures.mkdir()
    for number in range(4):
        photo(seed=number).save(pictures / f"{number}.png")
    TTameModel.from_backbone(vit_folder).save_pretrained(explainer)
    planted = [lambda **_: sanity.check_watermark(np.full(10, 90.0))]  # has its own test
    monkeypatch.setattr(checks, "watermark", lambda **_: planted[0]())
    real = checks.stability
    monkeypatch.setattr(checks, "stability", lambda *_: (_ for _ in ()).throw(ValueError("killed here")))
    command = ["compare", explainer, "--dataset", pictures, "--methods", "ones", "--metrics", "confidence,sanity"]
    command += ["--sanity-images", 4, "--sanity-steps", 2, "--output", output]
    assert ttame(*command).returncode == 1
    first = json.loads((output / "sanity.json").read_text())["checks"]
    assert "d: planted watermark" in first
    monkeypatch.setattr(checks, "stability", real)
    planted[0] = lambda **_: sanity.check_watermark(np.full(10, 10.0))
    done = ttame(*command)
    assert done.returncode == 0, done.stderr
    assert "d: planted watermark: kept from an earlier run" in done.stdout
    report = json.loads((output / "report.json").read_text())
    assert report["sanity"]["d: planted watermark"].items() >= first["d: planted watermark"].items()
    assert report["sanity"]["d: planted watermark"]["note"] == sanity.NOTES["d"]
    made = {name for name, check in report["sanity"].items() if check["figures"]}
    assert json.loads((output / "sanity.json").read_text())["checks"].keys() == report["sanity"].keys()
    assert report["sanity"].keys() - first.keys() == {"g: stability"}
    not_made = report["sanity"].keys() - made
    assert len(not_made) == 3
    assert all(f"{name}: kept from" not in done.stdout and f"{name}: not made" in done.stdout for name in not_made)
    lines = (output / "report.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("| f: independent judge |")]
    assert "| not made: no --judge given |" in line
    assert line.endswith("| not made |")
    card = figures({}, normalised(report))
    assert "- f: independent judge: not made: no --judge given (4 images)" in card.splitlines()
    assert card.count("**not passed**") == sum(check["passed"] is False for check in report["sanity"].values())
    assert f"- d: planted watermark: {sanity.NOTES['d']}" in lines
    assert sanity.NOTES["d"][:40] in card
    # A retry that is killed loses none of those that it did not come to.
    before = json.loads((output / "sanity.json").read_text())["checks"]
    with monkeypatch.context() as killed:
        killed.setattr(checks, "class_on_mosaics", lambda *_: (_ for _ in ()).throw(ValueError("killed here")))
        assert "killed here" in ttame(*command).stderr
    assert json.loads((output / "sanity.json").read_text())["checks"] == before
    # A later run without the checks does not drop them from the report, nor that some could not be made.
    without = [word if word != "confidence,sanity" else "confidence" for word in command]
    done = ttame(*without)
    assert done.returncode == 0, done.stderr
    again = json.loads((output / "report.json").read_text())["sanity"]
    assert again == report["sanity"]
    # Another number concerns only the checks that hang on it, and a judge that is none is told before all of them.
    done = ttame(*command, "--sanity-steps", 3)
    remade = [name for name in report["sanity"] if f"{name}: kept from an earlier run" not in done.stdout]
    assert remade == sorted(not_made)  # (b) was not made before
    page = (output / "report.md").read_text()
    assert "| b: head retrained on a random backbone | 4 images, 3 steps | not made: " in page
    assert "| g: stability | 4 images | " in page
    assert "| d: planted watermark |  | " in page
    wrong = ttame(*command, "--judge", tmp_path / "nothing")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    wrong = ttame(*command, "--judge", pictures)  # it is there, and no classifier
    assert (wrong.returncode, wrong.stdout) == (1, "")
    done = ttame(*command, "--judge", vit_folder)
    assert done.returncode == 0, done.stderr
    assert (
        f"| f: independent judge | 4 images, judge {vit_folder.name} | too few to judge, 4 of 20 images: "
        in (output / "report.md").read_text()
    )
    assert "d: planted watermark: kept from an earlier run" in done.stdout
    judged = json.loads((output / "report.json").read_text())["sanity"]["f: independent judge"]
    assert "f: independent judge: not made: no --judge given; the earlier result stays" in ttame(*command).stdout
    assert json.loads((output / "report.json").read_text())["sanity"]["f: independent judge"] == judged
    done = ttame(*command, "--judge", vit_folder, "--sanity-images", 3)
    kept_ones = [name for name in report["sanity"] if f"{name}: kept from an earlier run" in done.stdout]
    assert kept_ones == ["d: planted watermark"]  # of classifiers of its own
    kept = json.loads((output / "sanity.json").read_text())
    kept["settings"]["experiments"] -= 1  # made when the checks were others
    (output / "sanity.json").write_text(json.dumps(kept))
    assert "kept from an earlier run" not in ttame(*command).stdout
    assert json.loads((output / "sanity.json").read_text())["checks"]["d: planted watermark"]["value"].startswith("10")


# Each process notes that it made the checks, and how long it would wait for the others.
_PROCESS = """
import os, sys
from pathlib import Path

import numpy as np
import torch

from hf_ttame import cli, evaluation, sanity_checks
from hf_ttame.metrics.sanity import check_watermark

notes, rank = Path(sys.argv.pop(1)), os.environ["RANK"]
run_checks, compare = sanity_checks.run_checks, evaluation.compare


def running(*arguments, **options):
    (notes / f"checks-{rank}").touch()
    return run_checks(*arguments, **options)


def comparing(*arguments, **options):
    backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
    (notes / f"waits-{rank}").write_text(str(backend.options._timeout.total_seconds()))
    return compare(*arguments, **options)


sanity_checks.run_checks, evaluation.compare = running, comparing
sanity_checks.watermark = lambda **_: check_watermark(np.full(10, 90.0))
cli.main()
"""


def test_of_several_processes_one_makes_the_checks_and_the_others_wait(
    vit_folder: Path, photo: Callable[..., Image.Image], tmp_path: Path
) -> None:
    pictures, explainer, notes = tmp_path / "pictures", tmp_path / "explainer", tmp_path / "notes"
    pictures.mkdir()
    notes.mkdir()
    for number in range(4):
        photo(seed=number).save(pictures / f"{number}.png")
    TTameModel.from_backbone(vit_folder).save_pretrained(explainer)
    (tmp_path / "process.py").write_text(_PROCESS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [tmp_path / "process.py", notes, "compare", explainer, "--dataset", pictures, "--methods", "ones"]
    command += ["--metrics", "confidence,sanity", "--batch-size", 2, "--sanity-images", 4, "--sanity-steps", 2]
    command += ["--judge", vit_folder]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(
        [*map(str, command), "--output", str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert {file.name for file in notes.glob("checks-*")} == {"checks-0"}
    assert {file.name: float(file.read_text()) for file in notes.glob("waits-*")} == {
        "waits-0": 86400,
        "waits-1": 86400,
    }
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["images"] == 4
    assert report["sanity"]["g: stability"]["figures"]["repeat"] == 0
    assert report["sanity"]["f: independent judge"]["figures"]["binary 50"]["n"] == 4
