"""What a GPU may do otherwise than a CPU: the same maps, measures, checks and training steps on both.

Run with `pytest -m gpu -n 0`; skipped where there is none.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hf_ttame import TTameModel
from hf_ttame.baselines import MapBank, MethodSettings, expand_names, make_method
from hf_ttame.baselines.rise import random_masks
from hf_ttame.evaluation import compare
from hf_ttame.evaluation_plan import Plan
from hf_ttame.evaluation_rows import read_rows
from hf_ttame.metrics import impute, judge_by, road_curves
from hf_ttame.metrics.insertion_deletion import blur
from hf_ttame.precision import passes_in
from hf_ttame.sanity_checks import run_checks
from training import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def pictures_of(count: int, side: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_imputed_pixels_and_blur_are_those_of_the_cpu(recwarn: pytest.WarningsRecorder) -> None:
    images = pictures_of(4, 224)
    removed = torch.rand(4, 224, 224, generator=torch.Generator().manual_seed(1)) < 0.7
    torch.testing.assert_close(impute(images.cuda(), removed.cuda()).cpu(), impute(images, removed), rtol=0, atol=2e-3)
    torch.testing.assert_close(blur(images.cuda(), 5).cpu(), blur(images, 5), rtol=0, atol=2e-2)
    assert not [warning for warning in recwarn if "imputation" in str(warning.message)]


def test_masks_of_rise_are_those_of_the_cpu() -> None:
    drawn = [
        random_masks(32, (224, 224), torch.Generator().manual_seed(0), device=device) for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(drawn[1].cpu(), drawn[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["timm_cnn", "timm_vit"])
def test_every_method_draws_the_map_that_it_draws_on_the_cpu(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = TTameModel.from_backbone(copy.deepcopy(request.getfixturevalue(kind)))
    there = copy.deepcopy(here).cuda()
    images = pictures_of(3)
    ids, indices = torch.tensor([0, 1, 2]), torch.arange(3)
    bank = MapBank(torch.rand(6, *here.config.map_size), torch.tensor([0, 1, 2, 0, 1, 2]))
    for name in expand_names(["all"], here):
        # PyTorch's default would round the passes of all but the one method that switches it off.
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", name == "ablationcam")
        settings = MethodSettings(rise_masks=64, batch_size=8)
        maps = [
            make_method(name, model, settings, bank).at(indices)(images.to(model.device), ids.to(model.device))
            for model in (here, there)
        ]
        assert maps[1].device.type == "cuda"
        span = float(maps[0].max() - maps[0].min()) or 1.0
        agree = (maps[1].cpu() - maps[0]).abs() <= 0.02 * span
        assert agree.float().mean() > 0.98, name  # a sign or an order may turn where two values are all but equal


def test_road_is_that_of_the_cpu(timm_cnn: nn.Module) -> None:
    here = TTameModel.from_backbone(copy.deepcopy(timm_cnn))
    there = copy.deepcopy(here).cuda()
    images, maps = pictures_of(4), torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(3))
    ids = here.classify(images).argmax(dim=1)
    curves = [
        road_curves(judge_by(model.classify), images.to(model.device), ids.to(model.device), maps.to(model.device))
        for model in (here, there)
    ]
    for name in ("morf confidence", "lerf confidence"):
        torch.testing.assert_close(curves[1][name].cpu(), curves[0][name], rtol=0, atol=0.03)


def test_a_comparison_with_its_sanity_checks(
    timm_cnn: nn.Module, photo: Callable[..., Image.Image], tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(24):
        photo(70 + seed, 64, seed).save(folder / f"{seed:02d}.png")
    model = TTameModel.from_backbone(copy.deepcopy(timm_cnn))
    what = Plan(
        str(folder),
        methods=("gradcam", "scorecam"),
        slow_limit=3,
        curve_limit=2,
        mosaics=2,
        mosaic_confidence=0.0,
        settings=MethodSettings(rise_masks=8, batch_size=8),
    )
    found, sanity = {}, {}
    for device in ("cpu", "cuda"):
        model.to(device)
        checks = run_checks(model, what, images=24, steps=3, say=lambda _: None)
        sanity[device] = {name: check["figures"] for name, check in checks.items()}
        compare(model, what, tmp_path / device, progress=False, sanity=lambda _, made=checks: made)
        found[device] = read_rows(tmp_path / device / "per_image.parquet")
    assert found["cpu"].keys() == found["cuda"].keys()
    for check, figure in (("a: random layers, same head", "25 % of layers"), ("g: stability", "noise of 0.02")):
        here, there = (figures[check][figure]["mean"] for figures in sanity.values())
        assert abs(here - there) < 0.1, check
    for measure in ("p", "AD soft 100", "mean mask"):
        here, there = (np.array([row[measure] for row in rows.values() if measure in row]) for rows in found.values())
        assert np.median(np.abs(here - there)) < 0.01 * np.abs(here).max(), measure


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_passes_in_lower_precision(timm_cnn: nn.Module, precision: str) -> None:
    model = TTameModel.from_backbone(copy.deepcopy(timm_cnn)).cuda()
    images = pictures_of(4).cuda()
    with torch.no_grad():
        exact = model(images)
        with passes_in(model, precision):
            rounded = model(images)
    assert rounded.logits.dtype == rounded.map_logits.dtype == torch.float32
    torch.testing.assert_close(rounded.logits, exact.logits, rtol=0.1, atol=0.2)


@pytest.mark.parametrize("mixed", ["no", "bf16", "fp16"])
def test_training(vit_folder: Path, twelve_pictures: Path, tmp_path: Path, mixed: str, fresh_accelerate: None) -> None:
    run = tmp_path / "run"
    arguments = ["--backbone", str(vit_folder), "--dataset", str(twelve_pictures), "--output", str(run)]
    arguments += ["--batch_size", "4", "--steps", "4", "--save_every", "2", "--log_every", "1"]
    assert not train.main([*arguments, "--holdout", "0.3", "--validate_every", "2", "--mixed_precision", mixed])
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [line["total"] for line in lines if "total" in line]
    assert losses
    assert np.isfinite(losses).all()
    assert (run / "explainer" / "training.json").exists()
