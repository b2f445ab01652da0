"""The experiments behind `metrics.sanity`: classes, other fills, another judge, stability; and all checks together.

Random backbones are in `sanity_random`, the planted shortcut in `sanity_watermark`.

Each check is a function that returns a `Check`; `run_checks` runs them all on the images of a plan.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .answers import class_logits
from .backbones import Backbone, load_backbone, outputs_of
from .baselines import make_method
from .evaluation_images import Images, Scan, scan
from .evaluation_plan import Plan
from .features import classify
from .image_processing import measure_normalisation
from .masking import apply_mask, keep_top, resize_maps
from .metrics import impute, judge_by
from .metrics.confidence import drops
from .metrics.insertion_deletion import empty_image
from .metrics.judging import Judge
from .metrics.localization import TILES
from .metrics.sanity import (
    ON_MOSAICS_MUST,
    Check,
    check_class_on_mosaics,
    check_not_worse,
    check_other_class,
    check_stable,
    not_made,
    not_worse_must,
    rank_correlation,
)
from .modeling_ttame import TTameModel
from .precision import passes_in
from .records import TRAINING, head_fingerprint, map_facts
from .sanity_random import cascading_randomisation, explain, pointing_per_tile, retrained_on_random, too_few
from .sanity_watermark import watermark
from .saving import write_whole

EXPERIMENTS = 5  # goes up when a check changes: what sanity.json holds of an earlier one does not count
FILE = "sanity.json"
SHIFT = 4  # pixels
PIXEL_NOISE = 0.02  # standard deviation, pixels in [0, 1]


# ---- classes ------------------------------------------------------------------------------------------------------


def class_on_mosaics(model: TTameModel, scanned: Scan, groups: Sequence[list[int]]) -> Check:
    """(c) On mosaics of four classes, the map of each lies in its own quarter.

    Args:
        model: the explainer.
        scanned: of the images, with the tiles of confident ones.
        groups: per mosaic four positions in `scanned.tiles`, of four different classes; fewer than 2: not made.
    """
    if len(groups) < 2:
        return not_made(ON_MOSAICS_MUST, too_few(len(groups), "confident classes"))
    classes = scanned.targets[scanned.tile_rows]
    return check_class_on_mosaics(pointing_per_tile(model, scanned.tiles, classes, groups).mean(axis=1))


def second_class(model: TTameModel, pixel_values: torch.Tensor) -> Check:
    """(c) The map of the second most likely class keeps that class better than the map of the first does.

    Both as binary masks of half the pixels, so that neither is brighter.

    Args:
        model: the explainer.
        pixel_values: (B, C, H, W), normalised.
    """
    with torch.no_grad():
        logits = torch.cat([model.classify(x) for x in pixel_values.split(32)])
    first, second = logits.topk(2, dim=1).indices.unbind(1)
    judge, size = (
        judge_by(model.classify, outputs=model.config.classifier_outputs),
        (pixel_values.shape[-2], pixel_values.shape[-1]),
    )
    confidence = []
    for class_ids in (first, second):
        masks = keep_top(resize_maps(explain(model, pixel_values, class_ids), size), 0.5, binary=True)
        confidence.append(judge(apply_mask(pixel_values, masks, model.fill()), second).confidence)
    return check_other_class(100 * (confidence[1] - confidence[0]).cpu().numpy())


# ---- other fills, another judge -----------------------------------------------------------------------------------


def _masked(
    model: TTameModel, pixel_values: torch.Tensor, maps: torch.Tensor, fill: str, fraction: float
) -> torch.Tensor:
    """Pictures of which a map's top pixels are left, the rest filled with "black", "mean", "blur" or "road"."""
    size = (pixel_values.shape[-2], pixel_values.shape[-1])
    kept = keep_top(resize_maps(maps, size), fraction, binary=True)
    if fill == "road":
        return impute(pixel_values, kept == 0)
    return torch.where(kept[:, None] == 1, pixel_values, empty_image(pixel_values, fill, model.fill()))


def _gradcam(model: TTameModel, pixel_values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    method = make_method("gradcam", model).explain
    return torch.cat([method(x, ids) for x, ids in zip(pixel_values.split(16), targets.split(16), strict=True)])


def trained_fill(model: TTameModel) -> str:
    """What masks left in the head's training, as the record beside it says; where none is, the default, "black"."""
    for name, record in model._records.of(head_fingerprint(model.head.state_dict()), model.config):
        if name == TRAINING:
            arguments = record.get("arguments", record)
            return str(arguments.get("fill", "black")) if isinstance(arguments, dict) else "black"
    return "black"


def held_out_fills(
    model: TTameModel, pixel_values: torch.Tensor, targets: torch.Tensor, trained: str = "black"
) -> Check:
    """(e) Trained with one fill, judged with the others and ROAD's noisy imputation: average drop against Grad-CAM's.

    Binary masks of half and of 15 percent of the pixels. The fill of the training stands beside the others and is not
    judged.

    Args:
        model: the explainer.
        pixel_values: (B, C, H, W), normalised.
        targets: (B,), the predicted classes.
        trained: "black", "mean" or "blur".
    """
    judge = judge_by(model.classify, outputs=model.config.classifier_outputs)
    p = judge(pixel_values, targets).confidence
    both = (explain(model, pixel_values, targets), _gradcam(model, pixel_values, targets))
    found = {}
    for fill in ("black", "mean", "blur", "road"):
        for fraction in (0.5, 0.15):
            ours, theirs = (
                drops(p, judge(_masked(model, pixel_values, maps, fill, fraction), targets).confidence).cpu().numpy()
                for maps in both
            )
            found[f"{fill} {100 * fraction:.0f}"] = ours - theirs
    shown_only = [name for name in found if name.startswith(f"{trained} ")]
    return check_not_worse(found, "average drop less Grad-CAM's", shown_only)


def judge_of(model: TTameModel, other: Backbone) -> tuple[Judge, Callable[[torch.Tensor], torch.Tensor]]:
    """Another classifier that looks at pixel values of `model`: a judge, and its own predictions.

    Its logits are read as its config says (`outputs_of`). Pixels are brought back to [0, 1], resized to the other's
    input and normalised as it expects.
    """
    mine = [
        torch.tensor(v)[:, None, None].to(model.device) for v in (model.config.pixel_scale, model.config.pixel_shift)
    ]
    facts = measure_normalisation(other.processor)
    theirs = [torch.tensor(v)[:, None, None].to(model.device) for v in (facts.scale, facts.shift)]
    classifier, outputs = other.model.eval().to(model.device), outputs_of(other.model.config)

    def logits(pixel_values: torch.Tensor) -> torch.Tensor:
        pixels = (pixel_values.float() - mine[1]) / mine[0]
        if tuple(pixels.shape[-2:]) != facts.size:
            pixels = nn.functional.interpolate(pixels, size=facts.size, mode="bilinear", antialias=True)
        return class_logits(classify(classifier, (pixels * theirs[0] + theirs[1]).float()), outputs)

    @torch.no_grad()
    def predict(pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.cat([logits(x).argmax(dim=1) for x in pixel_values.split(32)])

    return judge_by(logits, outputs=outputs), predict


def independent_judge(
    model: TTameModel, pixel_values: torch.Tensor, targets: torch.Tensor, other: Backbone | None
) -> Check:
    """(f) What another architecture still sees on the same masked pictures: its drop in its own class, against
    Grad-CAM's maps. A map that only fools the classifier it was trained on does not help another one.

    Args:
        model: the explainer.
        pixel_values: (B, C, H, W), normalised for `model`.
        targets: (B,), the classes that the maps explain.
        other: the judge; None: the check is not made.
    """
    if other is None:
        return not_made(not_worse_must("drop of another classifier less that under Grad-CAM"), "no --judge given")
    judge, predict = judge_of(model, other)
    own = predict(pixel_values)
    p = judge(pixel_values, own).confidence
    both = (explain(model, pixel_values, targets), _gradcam(model, pixel_values, targets))
    found = {}
    for fraction in (0.5, 0.15):
        ours, theirs = (
            drops(p, judge(_masked(model, pixel_values, maps, "black", fraction), own).confidence).cpu().numpy()
            for maps in both
        )
        found[f"binary {100 * fraction:.0f}"] = ours - theirs
    name = getattr(other.model.config, "architecture", None) or type(other.model).__name__  # timm's, or transformers'
    return check_not_worse(found, f"drop of {name} less that under Grad-CAM")


# ---- stability ----------------------------------------------------------------------------------------------------


def stability(model: TTameModel, pixel_values: torch.Tensor, targets: torch.Tensor, seed: int = 0) -> Check:
    """(g) Maps after a shift by 4 pixels (undone in the map) and after weak noise; and the same map twice.

    Args:
        model: the explainer.
        pixel_values: (B, C, H, W), normalised.
        targets: (B,).
        seed: of the noise.
    """
    size = (pixel_values.shape[-2], pixel_values.shape[-1])
    plain = explain(model, pixel_values, targets)
    repeat = float((plain - explain(model, pixel_values, targets)).abs().max())
    shown = resize_maps(plain, size)
    padded = nn.functional.pad(pixel_values, (SHIFT, 0, SHIFT, 0), mode="reflect")[..., : size[0], : size[1]]
    moved = resize_maps(explain(model, padded, targets), size)[..., SHIFT:, SHIFT:]
    scale = torch.tensor(model.config.pixel_scale).to(pixel_values)[:, None, None]
    noise = torch.randn(pixel_values.shape, generator=torch.Generator().manual_seed(seed)).to(pixel_values)
    noisy = explain(model, pixel_values + PIXEL_NOISE * scale * noise, targets)
    return check_stable(
        {
            f"shift by {SHIFT} px": rank_correlation(shown[..., :-SHIFT, :-SHIFT], moved).cpu().numpy(),
            f"noise of {PIXEL_NOISE}": rank_correlation(plain, noisy).cpu().numpy(),
        },
        repeat,
    )


# ---- all of them --------------------------------------------------------------------------------------------------


def _of_the_explainer(model: TTameModel, plan: Plan) -> dict[str, Any]:
    """What a check is about: another explainer, dataset or form of the checks, and what is kept says nothing."""
    return {
        **plan.fixed(),
        "experiments": EXPERIMENTS,
        "head": head_fingerprint(model.head.state_dict()),
        "maps": json.loads(map_facts(model.config)),
    }


def kept_checks(model: TTameModel, plan: Plan, folder: Path) -> dict[str, dict[str, Any]]:
    """The checks of this explainer that an earlier run, of any size, made or could not make in the folder: its report
    keeps them."""
    file = folder / FILE
    if not file.exists():
        return {}
    kept = json.loads(file.read_text())
    return dict(kept["checks"]) if kept["settings"] == _of_the_explainer(model, plan) else {}


def run_checks(
    model: TTameModel,
    plan: Plan,
    *,
    images: int = 100,
    steps: int = 100,
    judge: str | None = None,
    say: Callable[[str], None] = print,
    folder: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """All checks on the first `images` of the plan's dataset.

    Args:
        model: the explainer.
        plan: names the dataset; its limits do not count.
        images: to check on.
        steps: of training in (b); (d) takes 150 of its much smaller ones.
        judge: another classifier for (f), a folder or Hub id; without one (f) is not made.
        say: receives a line per check.
        folder: keeps each check in sanity.json there; those of the same head and numbers are not run again, but for
            what could not be made.

    Returns:
        {check: Check as a dictionary, and "with", the numbers of images and steps and the judge that it hangs on}; one
        that could not be made, or on too few images, has "passed": None, and its value tells why.

    Raises:
        ValueError: fewer than 1 image or step.
    """
    if min(images, steps) < 1:
        raise ValueError(f"the sanity checks need at least 1 image and 1 step, got {images} and {steps}")
    from dataclasses import replace

    plan = replace(plan, limit=images, mosaics=max(plan.most_mosaics, images // TILES))
    settings = _of_the_explainer(model, plan)
    found = kept_checks(model, plan, folder) if folder else {}
    sizes = {"images": images}
    # What a check hangs on: with other numbers it is made anew, and the others stay.
    made_with: dict[str, dict[str, Any]] = {
        "b": {**sizes, "steps": steps},
        "d": {},
        "f": {**sizes, "judge": Path(judge).resolve().name if judge and Path(judge).exists() else judge},
    }

    def kept(name: str) -> bool:
        """Whether an earlier run made it so; one that could not be made is tried again."""
        return bool(
            name in found and found[name]["figures"] and found[name].get("with") == made_with.get(name[0], sizes)
        )

    # A judge that cannot be loaded is told before the other checks.
    other = load_backbone(judge) if judge and not kept("f: independent judge") else None
    source = Images(plan, model)
    with passes_in(model, "float32"):
        scanned = scan(model.eval(), source, plan)
    batches = list(source.batches(images))
    x = torch.cat([batch.pixel_values for batch in batches])
    targets = scanned.targets.to(x.device)
    groups = scanned.mosaics(plan.most_mosaics)
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("a: random layers, same head", lambda: cascading_randomisation(model, x, targets, plan.seed)),
        (
            "b: head retrained on a random backbone",
            lambda: retrained_on_random(model, x, steps=steps, seed=plan.seed),
        ),
        ("c: class on mosaics", lambda: class_on_mosaics(model, scanned, groups)),
        ("c: second class", lambda: second_class(model, x)),
        ("d: planted watermark", lambda: watermark(seed=plan.seed)),
        ("e: held-out fills", lambda: held_out_fills(model, x, targets, trained_fill(model))),
        (
            "f: independent judge",
            lambda: independent_judge(model, x, targets, other),
        ),
        ("g: stability", lambda: stability(model, x, targets, plan.seed)),
    ]
    for name, check in checks:
        if kept(name):
            say(f"{name}: kept from an earlier run")
            continue
        with passes_in(model, "float32"):
            done = check()
        if done.figures or not found.get(name, {}).get("figures"):  # what was made is not lost to what could not be
            found[name] = {**done.to_dict(), "with": made_with.get(name[0], sizes)}
        if done.figures:
            outcome = {True: "passed", False: "FAILED", None: "not judged"}[done.passed]
            say(f"{name}: {done.value}; {done.must}: {outcome}")
        else:
            say(f"{name}: {done.value}" + ("; the earlier result stays" if found[name]["figures"] else ""))
        if folder:
            write_whole(folder / FILE, json.dumps({"settings": settings, "checks": found}, indent=2) + "\n")
    return found


__all__ = [
    "cascading_randomisation",
    "class_on_mosaics",
    "held_out_fills",
    "independent_judge",
    "kept_checks",
    "retrained_on_random",
    "run_checks",
    "second_class",
    "stability",
    "watermark",
]
