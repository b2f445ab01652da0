"""Sanity: rank correlation by hand, thresholds, and each check on tiny backbones."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_vit, vit_processor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from hf_ttame import TTameModel
from hf_ttame import sanity_checks as checks
from hf_ttame.backbones import Backbone
from hf_ttame.evaluation import Plan, Scan
from hf_ttame.metrics import sanity


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


def test_thresholds_are_those_that_were_set_before_the_first_run() -> None:
    assert sanity.RANDOMISED_CORRELATION_BELOW == 0.3
    assert sanity.CHANCE_GRID_POINTING == 25
    assert sanity.WATERMARK_ENERGY_AT_LEAST == 80


def test_figures_are_held_against_the_thresholds() -> None:
    def passed(check: sanity.Check) -> bool:
        return check.passed

    many = np.full(50, 1.0)
    assert passed(sanity.check_randomised({"25 %": many, "100 %": 0.29 * many}, many))
    assert not passed(sanity.check_randomised({"25 %": 0 * many, "100 %": 0.31 * many}, 0 * many))
    assert "with another image's true map 0.50" in sanity.check_randomised({"100 %": many}, many / 2).value
    assert passed(sanity.check_no_prior(np.array([20.0, 30.0] * 10)))
    assert not passed(sanity.check_no_prior(np.array([40.0, 42.0] * 10)))
    assert passed(sanity.check_class_on_mosaics(np.array([40.0, 42.0] * 10)))
    assert not passed(sanity.check_class_on_mosaics(np.array([20.0, 30.0] * 10)))
    assert passed(sanity.check_watermark(80 * many))
    assert not passed(sanity.check_watermark(79 * many))
    assert passed(sanity.check_other_class(many))
    assert not passed(sanity.check_other_class(np.array([-1.0, 1.0] * 10)))
    assert passed(sanity.check_not_worse({"a": -many, "b": np.array([-1.0, 1.0] * 10)}, "x"))
    assert not passed(sanity.check_not_worse({"a": -many, "b": many}, "x"))
    assert passed(sanity.check_stable({"shift": 0.9 * many}, 0.0))
    assert not passed(sanity.check_stable({"shift": 0.9 * many}, 1e-3))
    assert not passed(sanity.check_stable({"shift": 0.9 * many, "noise": 0.7 * many}, 0.0))


def test_randomising_goes_from_the_classifier_downwards(model: TTameModel, images: torch.Tensor) -> None:
    order = checks.modules_in_order(model.backbone, images)
    assert order[0] is model.backbone.timm_model.conv1 or isinstance(order[0], nn.Conv2d)
    assert order[-1] is model.backbone.timm_model.fc
    other = copy.deepcopy(model)
    checks.randomise(other.backbone, 0.5, images)
    changed = [
        not all(
            torch.equal(a, b)
            for a, b in zip(mine.parameters(recurse=False), his.parameters(recurse=False), strict=True)
        )
        for mine, his in zip(order, checks.modules_in_order(other.backbone, images), strict=True)
    ]
    half = len(order) - -(-len(order) // 2)
    assert not any(changed[:half])
    assert sum(changed[half:]) > 0.8 * len(changed[half:])
    assert other.classify(images).isfinite().all()
    assert not any(module.training for module in other.backbone.modules())
    # The same seed, the same backbone.
    again = copy.deepcopy(model)
    checks.randomise(again.backbone, 0.5, images)
    assert torch.equal(again.classify(images), other.classify(images))


def test_position_embeddings_of_a_transformer_are_randomised_last() -> None:
    vit = make_vit()
    order = checks.modules_in_order(vit, torch.randn(1, 3, 64, 64))
    assert order[-1] is vit.classifier
    assert any(hasattr(module, "position_embeddings") for module in order[:2])


def test_cascade_measures_every_share_and_leaves_the_model_alone(
    model: TTameModel, images: torch.Tensor, targets: torch.Tensor
) -> None:
    before = checks.explain(model, images, targets)
    found = checks.cascading_randomisation(model, images, targets)
    shares = ["25 % of layers", "50 % of layers", "75 % of layers", "100 % of layers"]
    assert list(found.figures) == [*shares, "all layers, another image's true map"]
    assert all(-1 <= figures["mean"] < 0.99 for figures in found.figures.values())
    assert torch.equal(checks.explain(model, images, targets), before)


def test_a_map_that_ignores_the_backbone_fails_the_cascade(
    model: TTameModel, images: torch.Tensor, targets: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = images.mean(dim=1)[:, ::8, ::8]
    monkeypatch.setattr(checks, "explain", lambda *_: picture)  # an edge detector, so to speak
    found = checks.cascading_randomisation(model, images, targets)
    assert not found.passed
    assert found.figures["100 % of layers"]["mean"] == pytest.approx(1.0)
    assert found.figures["all layers, another image's true map"]["mean"] < 0.99


def test_a_head_is_trained_on_the_random_backbone(model: TTameModel, images: torch.Tensor) -> None:
    scan, groups = scanned(model, images)
    before = copy.deepcopy(model.head.state_dict())
    found = checks.retrained_on_random(model, images, scan, groups, steps=3, batch_size=4)
    assert found.figures["n"] == 2
    assert 0 <= found.figures["mean"] <= 100
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.head.state_dict().values(), strict=True))
    assert checks.class_on_mosaics(model, scan, groups).figures["n"] == 2


def test_fitting_lowers_the_loss_and_starts_where_it_is_told(model: TTameModel, images: torch.Tensor) -> None:
    own = copy.deepcopy(model)
    checks.fresh_head(own)
    with torch.no_grad():
        _, features = own.features(images)
        mean = own.head(features).mean(dim=(2, 3))
    # test_resnet averages its last map: the fresh head is the class activation map again.
    assert torch.allclose(mean, own.classify(images), atol=1e-3)
    area = checks.explain(own, images, own.classify(images).argmax(dim=1)).mean()
    checks.fit_head(own, lambda _: images, 40, 1e-2)
    assert not own.head.training
    assert checks.explain(own, images, own.classify(images).argmax(dim=1)).mean() != area


def test_second_class_fills_and_stability(model: TTameModel, images: torch.Tensor, targets: torch.Tensor) -> None:
    assert checks.second_class(model, images).figures["n"] == 8
    fills = checks.held_out_fills(model, images, targets)
    assert list(fills.figures) == [
        f"{fill} {share}" for fill in ("black", "mean", "blur", "road") for share in (50, 15)
    ]
    stable = checks.stability(model, images, targets)
    assert stable.figures["repeat"] == 0
    assert stable.figures["noise of 0.02"]["mean"] > 0.5


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
    images, labels, regions = checks.watermarked(12, 64, 24, torch.Generator().manual_seed(0))
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


def test_all_checks_on_a_dataset(
    model: TTameModel, photo: Callable[..., Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        photo(seed=number).save(tmp_path / f"{number}.png")
    monkeypatch.setattr(checks, "watermark", lambda **_: sanity.check_watermark(np.array([90.0])))  # has its own test
    said: list[str] = []
    plan = Plan(str(tmp_path), mosaics=2)
    found = checks.run_checks(model, plan, images=4, steps=2, say=said.append)
    assert set(found) >= {"a: random layers, same head", "c: second class", "d: planted watermark", "g: stability"}
    assert all({"value", "must", "passed", "figures"} == entry.keys() for entry in found.values())
    assert any("no --judge given" in line for line in said)


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
    planted = [lambda **_: sanity.check_watermark(np.array([90.0]))]  # has its own test
    monkeypatch.setattr(checks, "watermark", lambda **_: planted[0]())
    real = checks.stability
    monkeypatch.setattr(checks, "stability", lambda *_: (_ for _ in ()).throw(ValueError("killed here")))
    command = ["compare", explainer, "--dataset", pictures, "--methods", "ones", "--metrics", "confidence,sanity"]
    command += ["--sanity-images", 4, "--sanity-steps", 2, "--output", output]
    assert ttame(*command).returncode == 1
    first = json.loads((output / "sanity.json").read_text())["checks"]
    assert "d: planted watermark" in first
    monkeypatch.setattr(checks, "stability", real)
    planted[0] = lambda **_: sanity.check_watermark(np.array([10.0]))
    done = ttame(*command)
    assert done.returncode == 0, done.stderr
    assert "d: planted watermark: kept from an earlier run" in done.stdout
    report = json.loads((output / "report.json").read_text())
    assert report["sanity"]["d: planted watermark"] == first["d: planted watermark"]
    assert report["sanity"].keys() - first.keys() == {"g: stability"}
    assert "## Sanity" in (output / "report.md").read_text()
    ttame(*command, "--sanity-steps", 3)  # another experiment
    assert json.loads((output / "sanity.json").read_text())["checks"]["d: planted watermark"]["value"].startswith("10")
