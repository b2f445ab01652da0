"""The parts of training: the loss of one batch, schedules, averages, validation, coverage, reports."""

import copy
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from hf_ttame import TTameModel
from hf_ttame.image_processing import preprocess
from hf_ttame.losses import LossWeights, ttame_loss
from hf_ttame.masking import apply_mask, resize_maps
from hf_ttame.metrics import judge_by
from hf_ttame.metrics.confidence import drops, masked_confidence
from hf_ttame.records import check_folder
from hf_ttame.visualization import plot_curves, plot_intervals
from training.arguments import Arguments, check
from training.checkpoints import check_same, checkpoints
from training.report import add_samples, coverage, read_log
from training.train import blurred, finished, make_optimizer, make_schedule
from training.train import masking_losses as losses_of
from training.validation import HeldOut, collapse, intervals, summary, validate

ARGUMENTS = Arguments("backbone", "dataset", "output")


@pytest.fixture
def model(timm_cnn: nn.Module) -> TTameModel:
    """Its classifier is centred, so that it predicts several classes."""
    classifier = copy.deepcopy(timm_cnn)
    with torch.no_grad():
        classifier.fc.weight.mul_(20)
        classifier.fc.bias.sub_(classifier(noise(32, seed=1)).mean(dim=0))
    torch.manual_seed(0)
    return TTameModel.from_backbone(classifier, head_init="random").train()


def noise(batch: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fill", ["black", "mean"])
def test_the_loss_is_the_published_one(model: TTameModel, fill: str) -> None:
    """A = M[:, y] with its duplicates, from the maps of all classes."""
    model.eval()
    x = noise(6)
    with torch.no_grad():
        logits, features = model.features(x)
        every = model.head(features).sigmoid()
    y = logits.argmax(dim=1)
    assert 1 < len(y.unique()) < 6, "the batch must hold duplicates"
    a = every[:, y]
    own = torch.stack([every[i, y[i]] for i in range(6)])
    masked = apply_mask(x, resize_maps(own, (64, 64)), model.fill(fill))
    expected = ttame_loss(model.classify(masked), y, a)
    found = losses_of(model, model.head, x, fill=model.fill(fill))
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(found.terms, name), value, rtol=1e-5, atol=1e-6)
    assert found.mask_area.item() == pytest.approx(own.mean().item(), rel=1e-5)
    assert torch.equal(found.targets, y)


def test_only_the_head_gets_gradients(model: TTameModel) -> None:
    losses_of(model, model.head, noise(3), fill=model.fill()).terms.total.backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.head.parameters())


def test_the_class_set_is_that_of_all_processes(model: TTameModel) -> None:
    """Two processes of three images: the mean of their losses is the loss of one of six."""
    model.eval()
    x = noise(6)
    whole = losses_of(model, model.head, x, fill=model.fill())
    parts = x.split(3)
    halves = [losses_of(model, model.head, part, fill=model.fill(), gather=lambda _: whole.targets) for part in parts]
    alone = [losses_of(model, model.head, part, fill=model.fill()) for part in parts]
    for name, value in whole.terms._asdict().items():
        mean = sum(getattr(half.terms, name) for half in halves) / 2
        torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-6)
    area = sum(half.terms.area for half in alone) / 2
    assert abs(area - whole.terms.area) > 1e-5, "accumulation, with a class set per micro-step, is not a large batch"


def test_own_class_set_and_blurred_fill(model: TTameModel) -> None:
    model.eval()
    x = noise(4)
    found = losses_of(model, model.head, x, fill=None, class_set="own")
    with torch.no_grad():
        logits, features = model.features(x)
        masks = model.head(features, logits.argmax(dim=1)[:, None]).sigmoid()
        full = resize_maps(masks, (64, 64))
        masked = full * x + (1 - full) * blurred(x)
        expected = ttame_loss(model.classify(masked), logits.argmax(dim=1), masks)
    torch.testing.assert_close(found.terms.total, expected.total, rtol=1e-4, atol=1e-5)


def test_blurring_keeps_colour_and_loses_shape() -> None:
    flat = torch.full((1, 3, 30, 45), 0.3)
    torch.testing.assert_close(blurred(flat), flat)
    stripes = torch.arange(64).remainder(2).float().expand(1, 3, 64, 64)
    assert blurred(stripes).std() < 0.1
    assert blurred(stripes).shape == stripes.shape


def test_the_authors_schedule_keeps_its_momentum(model: TTameModel) -> None:
    arguments = Arguments("b", "d", "o", optimizer="sgd", steps=20)
    optimizer = make_optimizer(arguments, model.head.parameters())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 0.0]
    assert all(p.ndim == 1 for p in optimizer.param_groups[1]["params"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.head.parameters()))
    schedule = make_schedule(arguments, optimizer)
    rates, momenta = [], set()
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.add(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        schedule.step() if len(rates) < 20 else None
    assert momenta == {0.9}
    assert optimizer.param_groups[0]["nesterov"]
    assert max(rates) == pytest.approx(1e-3, rel=0.05)
    assert rates[-1] < 1e-6 < rates[0] < 1e-4


def test_a_finished_head_is_a_copy_in_eval_mode(model: TTameModel) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    head = accelerator.prepare(model.head)  # bf16 replaces its forward: the copy must use its own weights
    copied = finished(head, accelerator)
    assert not copied.training
    assert head.training
    nn.init.zeros_(copied.fuser.weight)
    nn.init.zeros_(copied.fuser.bias)
    with torch.no_grad():
        _, features = model.features(noise(2))
        assert not copied(features).any()
        assert head(features).any()


def test_validation_measures_what_explain_shows(
    model: TTameModel, photo: Callable[..., Image.Image], tmp_path: Path
) -> None:
    pictures = [photo(seed=seed) for seed in range(5)]
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index}.png")
    held_out = HeldOut(model, [*(str(path) for path in sorted(tmp_path.glob("*.png"))), "absent.png"])
    assert len(held_out) == 5
    model.eval()
    found = validate(model, held_out, Accelerator(cpu=True), batch_size=2)
    x = preprocess(model.image_processor, pictures)
    with torch.no_grad():
        output = model(x)
        y = output.class_ids[:, 0]
        p = output.logits.softmax(dim=1)[torch.arange(5), y]
        maps = model.scale_maps(output.map_logits[:, 0])
        masked = masked_confidence(judge_by(model.classify), x, y, maps, model.fill())
    torch.testing.assert_close(found["AD soft 50"], drops(p, masked["soft 50"]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found["mask area"], output.map_logits.sigmoid().mean(dim=(1, 2, 3)))
    means = summary(found)
    assert set(found) | {"score"} == set(means)
    assert intervals(found)["AD soft 50"][0] <= means["AD soft 50"] <= intervals(found)["AD soft 50"][1]
    with pytest.raises(ValueError, match="none of the 1 pictures"):
        HeldOut(model, ["absent.png"])


def test_collapse_is_told_with_advice() -> None:
    assert collapse(0.5) is None
    assert "--area_weight" in (collapse(0.99) or "")
    assert "all ones" in (collapse(0.99) or "")
    assert "all zeros" in (collapse(0.001) or "")


def test_unseen_classes_warn_once(model: TTameModel, photo: Callable[..., Image.Image], tmp_path: Path) -> None:
    model.eval()
    model.explain(photo(), class_ids=2)  # nothing is recorded: no warning
    model.head.class_counts[[0, 1]] = 3
    model.save_pretrained(tmp_path / "counted")
    loaded = TTameModel.from_pretrained(tmp_path / "counted")
    assert loaded.head.class_counts.tolist() == [3, 3, 0, 0, 0, 0, 0]
    loaded.explain(photo(), class_ids=[0, 1])
    with pytest.warns(UserWarning, match="without a single picture of .*5 of 7 classes"):
        loaded.explain(photo(), class_ids=[0, 2])
    loaded.explain(photo(), class_ids=3)


def test_heads_without_counts_load(model: TTameModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.pop("head.class_counts").dtype == torch.int64
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert not TTameModel.from_pretrained(tmp_path).head.class_counts.any()
    bare = {name.removeprefix("head."): tensor for name, tensor in weights.items()}
    model.head.class_counts[0] = 1
    model.head.load_state_dict(bare)
    assert not model.head.class_counts.any()


def test_a_run_is_shipped_as_a_small_head(model: TTameModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "training" / "recipes"))
    from ship import ship

    model.head.class_counts[4] = 9
    model.eval().save_pretrained(tmp_path / "run" / "explainer")
    (tmp_path / "run" / "explainer" / "training.json").write_text("{}")
    ship(tmp_path / "run", tmp_path / "shipped")
    assert not (tmp_path / "shipped" / "backbone").exists()
    weights = load_file(tmp_path / "shipped" / "model.safetensors")
    assert {t.dtype for name, t in weights.items() if "num_batches" not in name and "counts" not in name} == {
        torch.half
    }
    assert weights["head.class_counts"].tolist() == [0, 0, 0, 0, 9, 0, 0]
    check_folder(tmp_path / "shipped")  # the record names the head in its new dtype
    sys.modules.pop("ship")


def test_checkpoints_are_complete_or_none(tmp_path: Path) -> None:
    for name, complete in (("checkpoint-00000010", True), ("checkpoint-00000020", False), ("other", True)):
        (tmp_path / name).mkdir()
        if complete:
            (tmp_path / name / "progress.json").write_text("{}")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000010"]
    check_same({"seed": 1, "output": "a"}, {"seed": 1, "output": "b"}, {})
    with pytest.raises(ValueError, match="--seed was 1, now 2"):
        check_same({"seed": 1}, {"seed": 2}, {})
    with pytest.raises(ValueError, match="--new was None, now 3"):
        check_same({}, {"new": 3}, {})
    shutil.rmtree(tmp_path / "checkpoint-00000020")
    with pytest.raises(ValueError, match="continue it with --resume"):
        check(Arguments("b", "d", str(tmp_path)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optimizer": "adam"}, "one of adamw, sgd, got 'adam'"),
        ({"min_crop": 0.0}, "min_crop must be positive"),
        ({"min_crop": 1.5}, r"\(0, 1\]"),
        ({"fill": "white"}, "black, mean, blur"),
        ({"steps": 0}, "at least 1"),
        ({"workers": -1}, "at least 0"),
        ({"clip_norm": 0.0}, "positive"),
        ({"holdout": 1.0}, r"\[0, 1\)"),
        ({"max_unreadable": 1.5}, "max_unreadable"),
        ({"holdout": 0.1, "validation": "x"}, "not both"),
        ({"dataset": "./no/such"}, "the dataset './no/such' does not exist"),
        ({"backbone": "./no/such"}, "the backbone './no/such' does not exist"),
        ({"validation": "./no/such"}, "the dataset './no/such' does not exist"),
    ],
)
def test_bad_arguments_are_refused_at_once(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(Arguments(**{**vars(ARGUMENTS), **changed}))


def test_coverage_names_what_was_never_predicted() -> None:
    found = coverage(torch.tensor([4, 0, 7, 0]), {0: "a", 1: "b", 2: "c", 3: "d"})
    assert (found["explained"], found["classes"], found["pictures"], found["fewest"]) == (2, 4, 11, 4)
    assert found["never"] == ["b", "d"]


def test_a_log_that_was_cut_short_is_read(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2]
    assert read_log(tmp_path / "absent.jsonl") == []


def test_samples_stand_side_by_side(tmp_path: Path) -> None:
    for step, colour in ((10, "red"), (20, "blue")):
        add_samples(tmp_path, step, [Image.new("RGB", (30, 30), colour)] * 3)
    with Image.open(tmp_path / "samples.png") as sheet:
        assert sheet.getpixel((15, 60)) == (255, 0, 0)
        assert sheet.getpixel((15 + 34, 60)) == (0, 0, 255)


def test_pictures_of_curves_and_intervals() -> None:
    line = [(float(x), float(x)) for x in range(50)]
    curves = plot_curves({"rising": {"a": line}, "empty": {"b": []}, "broken": {"c": [(0, math.nan), (1, 2.0)]}})
    assert curves.size == (880, 600)
    blue = (0x2B, 0x63, 0xE3)
    left, right = 58, 440 - 14
    assert curves.getpixel((left + 30, 274 - 20)) == blue, "low on the left"
    assert curves.getpixel((right - 30, 38 + 19)) == blue, "high on the right"
    bars = plot_intervals("title", [("first", 1.0, 0.0, 2.0), ("second", 3.0, 2.0, 4.0)])
    row = [bars.getpixel((x, 34 + 12)) == blue for x in range(bars.width)]
    other = [bars.getpixel((x, 34 + 36)) == blue for x in range(bars.width)]
    assert max(x for x, hit in enumerate(row) if hit) < min(x for x, hit in enumerate(other) if hit) + 8
    with pytest.raises(ValueError, match="at least one row"):
        plot_intervals("title", [])


def test_loss_weights_and_exponent_reach_the_loss(model: TTameModel) -> None:
    model.eval()
    x = noise(3)
    weights = LossWeights(cross_entropy=0.5, area=3.0, variation=0.0, area_exponent=1.0)
    terms = losses_of(model, model.head, x, weights, fill=model.fill()).terms
    torch.testing.assert_close(terms.total, 0.5 * terms.cross_entropy + 3 * terms.area)
    with torch.no_grad():
        logits, features = model.features(x)
        a = model.head(features).sigmoid()[:, logits.argmax(dim=1)]
    torch.testing.assert_close(terms.area, a.mean() + weights.area_offset)
