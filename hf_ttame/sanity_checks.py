"""The experiments behind `metrics.sanity`: random backbones, planted shortcuts, other fills, another judge.

Each check is a function that returns a `Check`; `run_checks` runs them all on the images of a plan.
"""

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .answers import choose_targets, class_logits
from .backbones import Backbone, load_backbone, outputs_of
from .baselines import make_method
from .evaluation_images import Images, Scan, group_by_four, scan
from .evaluation_plan import Plan
from .features import classify, logits_of, probe_noise
from .head import TTameHead, start_as_classifier, unsaturate
from .image_processing import measure_normalisation
from .layer_choice import find_pooled_classifier
from .losses import ttame_loss
from .masking import apply_mask, keep_top, min_max, resize_maps
from .metrics import energy_inside, grid_pointing, impute, judge_by
from .metrics.confidence import drops
from .metrics.insertion_deletion import empty_image
from .metrics.judging import Judge
from .metrics.localization import TILES, fit, half_size, mosaic
from .metrics.sanity import (
    NO_PRIOR_MUST,
    ON_MOSAICS_MUST,
    Check,
    check_class_on_mosaics,
    check_no_prior,
    check_not_worse,
    check_other_class,
    check_randomised,
    check_stable,
    check_watermark,
    not_made,
    not_worse_must,
    rank_correlation,
)
from .modeling_ttame import TTameModel
from .records import head_fingerprint, map_facts
from .saving import write_whole

EXPERIMENTS = 3  # goes up when a check changes: what sanity.json holds of an earlier one does not count
FILE = "sanity.json"
SHARES = (0.25, 0.5, 0.75, 1.0)
DRAWS = 2  # random backbones per share, in (a)
RETRAINED = 3  # random backbones in (b), each with a head of its own
SHIFT = 4  # pixels
PIXEL_NOISE = 0.02  # standard deviation, pixels in [0, 1]


@torch.no_grad()
def explain(
    model: TTameModel, pixel_values: torch.Tensor, targets: torch.Tensor, batch_size: int = 32
) -> torch.Tensor:
    """Maps (B, h, w) of the explainer, in [0, 1]."""
    return torch.cat(
        [
            model.scale_maps(model(x, ids).map_logits[:, 0].float())
            for x, ids in zip(pixel_values.split(batch_size), targets.split(batch_size), strict=True)
        ]
    )


# ---- random backbones ---------------------------------------------------------------------------------------------


def modules_in_order(backbone: nn.Module, pixel_values: torch.Tensor) -> list[nn.Module]:
    """Modules with weights of their own, in the order in which they first run; those that never run come first."""
    owners = [module for module in backbone.modules() if next(module.parameters(recurse=False), None) is not None]
    ran: list[nn.Module] = []

    def note(module: nn.Module, _args: Any) -> None:
        if module not in ran:
            ran.append(module)

    handles = [module.register_forward_pre_hook(note) for module in owners]
    try:
        with torch.no_grad():
            classify(backbone, pixel_values[:1])
    finally:
        for handle in handles:
            handle.remove()
    # A container that runs around its parts starts before them; its own weights (position embeddings) are early ones.
    return [module for module in owners if module not in ran] + ran


@torch.no_grad()
def randomise(backbone: nn.Module, share: float, pixel_values: torch.Tensor, seed: int = 0) -> None:
    """Replace the weights of the last `share` of the modules, from the classifier downwards, in place.

    Weight matrices are drawn from a normal distribution of their own spread; vectors (biases, norms) are shuffled.
    Statistics of batch norms are measured anew on `pixel_values`, as they are of a network that nobody trained.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = modules_in_order(backbone, pixel_values)
    chosen = modules[len(modules) - math.ceil(share * len(modules)) :]
    for module in chosen:
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * parameter.float().std().cpu())
            else:
                parameter.copy_(
                    parameter[torch.randperm(len(parameter), generator=generator)] if parameter.ndim else parameter
                )
    norms = [module for module in backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    if norms:
        classify(backbone, pixel_values[:32])
    for norm, momentum in zip(norms, before, strict=True):
        norm.eval()
        norm.momentum = momentum


def cascading_randomisation(
    model: TTameModel, pixel_values: torch.Tensor, targets: torch.Tensor, seed: int = 0
) -> Check:
    """(a) The same head on a backbone whose layers are randomised from the top (Adebayo et al., arXiv 1810.03292).

    Per image the mean over several random backbones: the maps of one alone lean one way, like or unlike the true ones.
    """
    true = explain(model, pixel_values, targets)
    found = {}
    for share in SHARES:
        draws, controls = [], []
        for draw in range(DRAWS):
            other = copy.deepcopy(model)
            randomise(other.backbone, share, pixel_values, seed + draw)
            maps = explain(other, pixel_values, targets)
            draws.append(rank_correlation(true, maps))
            controls.append(rank_correlation(true.roll(1, dims=0), maps))
        found[f"{100 * share:.0f} % of layers"] = torch.stack(draws).mean(dim=0).cpu().numpy()
    return check_randomised(found, torch.stack(controls).mean(dim=0).cpu().numpy())


def fresh_head(model: TTameModel, seed: int = 0) -> None:
    """Start the head anew as `from_backbone` would: at random, or as the classifier where it started so."""
    config = model.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = TTameHead.from_config(config)
    size = (config.image_size[0], config.image_size[1])
    noise = probe_noise(len(config.pixel_scale), size, seed).to(model.device)
    warm = config.head_init == "classifier"
    pooled = find_pooled_classifier(model.backbone, noise, or_class_token=True) if warm else None
    if pooled:
        start_as_classifier(head, pooled, config.classifier_outputs)
    model.head = head.to(next(model.head.parameters())).eval()
    if not pooled:
        unsaturate(model.head, model.features(noise)[1])


def spread_answers(backbone: nn.Module, pixel_values: torch.Tensor) -> None:
    """Centre and scale each logit over these pictures, from now on, by a hook.

    A random backbone gives nearly the same logits for every picture, hence one answer for all; what little differs
    between pictures then decides. A logit that differs by no more than rounding stays near 0.
    """
    with torch.no_grad():
        logits = torch.cat([classify(backbone, x) for x in pixel_values.split(32)]).float()
    mean = logits.mean(dim=0)
    spread = logits.std(dim=0) + 1e-5 * mean.abs() + 1e-12

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        found = logits_of(output)
        changed = ((found.float() - mean) / spread).to(found.dtype)
        if isinstance(output, torch.Tensor):
            return changed
        name = "last_hidden_state" if getattr(output, "logits", None) is None else "logits"
        setattr(output, name, changed)
        return output

    backbone.register_forward_hook(hook)


def fit_head(
    model: TTameModel, batches: Callable[[int], torch.Tensor], steps: int, learning_rate: float = 1e-3
) -> list[float]:
    """Train the head with the loss of the paper, a few steps; `batches(step)` gives pixel values (B, C, H, W).

    Returns:
        The loss of each step.
    """
    losses = []
    model.train()
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=learning_rate, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(steps, 2))
    size, outputs = (model.config.image_size[0], model.config.image_size[1]), model.config.classifier_outputs
    for step in range(steps):
        pixel_values = batches(step)
        with torch.no_grad():
            logits, features = model.features(pixel_values)
        targets = choose_targets(logits, outputs, torch.Generator(logits.device).manual_seed(step))
        classes, position, counts = targets.unique(return_inverse=True, return_counts=True)
        masks = model.head(features, classes).float().sigmoid()
        own = masks[torch.arange(len(position), device=masks.device), position]
        masked = apply_mask(pixel_values, resize_maps(own, size), model.fill())
        loss = ttame_loss(model.classify(masked).float(), targets, masks, counts=counts, outputs=outputs).total
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return losses


def _too_few(mosaics: int, what: str) -> str:
    return f"2 mosaics of four different {what} are needed, got {mosaics}; give more --sanity-images"


def _pointing_per_tile(
    model: TTameModel, tiles: torch.Tensor, classes: torch.Tensor, groups: Sequence[list[int]]
) -> np.ndarray:
    """Grid pointing in percent, (n, 4), of n mosaics of tiles (m, C, h, w): of each tile's class (m,) in its tile."""
    size = (model.config.image_size[0], model.config.image_size[1])
    found = []
    for group in groups:
        image = fit(mosaic(tiles[group].to(model.device)), size)
        maps = explain(model, image.expand(TILES, -1, -1, -1), classes[group].to(model.device))
        found.append(100 * grid_pointing(resize_maps(maps, size), torch.arange(TILES, device=maps.device)).cpu())
    return torch.stack(found).numpy()


def retrained_on_random(
    model: TTameModel, pixel_values: torch.Tensor, *, steps: int = 100, batch_size: int = 16, seed: int = 0
) -> Check:
    """(b) A head trained on a backbone that knows nothing: where it still localises, it learned a prior.

    It is trained and asked for what this backbone answers, on mosaics of pictures with four different answers. Of each
    mosaic one tile counts, in turn: over all four tiles every map that ignores the class has a mean of 25 % exactly.
    Several random backbones, as one alone says little. A control tells how much of an answer truly hangs on its tile
    (`_evidence_in_tile`): a map that shows as much shows what the backbone used, and is no prior.
    """
    tiles = half_size(pixel_values.float().contiguous(), (pixel_values.shape[-2], pixel_values.shape[-1]))
    pointing, evidence, losses = [], [], []
    for draw in range(RETRAINED):
        other = copy.deepcopy(model)
        randomise(other.backbone, 1.0, pixel_values, seed + draw)
        fresh_head(other, seed + draw)
        spread_answers(other.backbone, pixel_values)
        with torch.no_grad():
            answers = torch.cat([other.classify(x).argmax(dim=1) for x in pixel_values.split(32)]).cpu()
        groups = group_by_four(answers.tolist(), len(answers))
        if len(groups) < 2:
            return not_made(NO_PRIOR_MUST, _too_few(len(groups), "answers of the random backbone"))
        generator = torch.Generator().manual_seed(seed + draw)

        def batches(_: int, generator: torch.Generator = generator) -> torch.Tensor:
            chosen = torch.randint(len(pixel_values), (batch_size,), generator=generator)
            views = pixel_values[chosen.to(pixel_values.device)]
            return views.flip(-1) if torch.rand(1, generator=generator) < 0.5 else views

        losses.append(fit_head(other, batches, steps))
        found = _pointing_per_tile(other, tiles, answers, groups)
        numbers = np.arange(len(groups))
        pointing.append(found[numbers, numbers % TILES])
        evidence.append(_evidence_in_tile(other, tiles, answers, groups))
    return check_no_prior(np.concatenate(pointing), np.mean(losses, axis=0), np.concatenate(evidence))


@torch.no_grad()
def _evidence_in_tile(
    model: TTameModel, tiles: torch.Tensor, classes: torch.Tensor, groups: Sequence[list[int]]
) -> np.ndarray:
    """How much of an answer hangs on its own tile, in percent, (n,), of one tile per mosaic, in turn.

    The class's logit falls when a tile is blacked out; what it falls by for its own tile, of all four falls. 25 where
    none makes it fall, as of an answer that hangs on no tile in particular.
    """
    size = (model.config.image_size[0], model.config.image_size[1])
    shares = []
    for number, group in enumerate(groups):
        own = number % TILES
        images = []
        for missing in (None, *range(TILES)):
            shown = tiles[group].to(model.device)
            if missing is not None:
                shown[missing] = model.fill()[:, None, None]
            images.append(fit(mosaic(shown), size))
        logits = model.classify(torch.stack(images)).float()[:, classes[group[own]]]
        falls = (logits[0] - logits[1:]).clamp(min=0)
        shares.append(100 * float(falls[own] / falls.sum()) if falls.any() else 100 / TILES)
    return np.array(shares)


# ---- classes ------------------------------------------------------------------------------------------------------


def class_on_mosaics(model: TTameModel, scanned: Scan, groups: Sequence[list[int]]) -> Check:
    """(c) On mosaics of four classes, the map of each lies in its own quarter."""
    if len(groups) < 2:
        return not_made(ON_MOSAICS_MUST, _too_few(len(groups), "confident classes"))
    classes = scanned.targets[scanned.tile_rows]
    return check_class_on_mosaics(_pointing_per_tile(model, scanned.tiles, classes, groups).mean(axis=1))


def second_class(model: TTameModel, pixel_values: torch.Tensor) -> Check:
    """(c) The map of the second most likely class keeps that class better than the map of the first does.

    Both as binary masks of half the pixels, so that neither is brighter.
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


# ---- a planted shortcut -------------------------------------------------------------------------------------------


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


def held_out_fills(model: TTameModel, pixel_values: torch.Tensor, targets: torch.Tensor) -> Check:
    """(e) Trained with black, judged with mean, blur and ROAD's noisy imputation: average drop against Grad-CAM's.

    Binary masks of half and of 15 percent of the pixels. Black stands beside the others and is not judged.
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
    return check_not_worse(found, "average drop less Grad-CAM's", shown_only=("black 50", "black 15"))


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
    Grad-CAM's maps. A map that only fools the classifier it was trained on does not help another one."""
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
    return check_not_worse(found, f"drop of {type(other.model).__name__} less that under Grad-CAM")


# ---- stability ----------------------------------------------------------------------------------------------------


def stability(model: TTameModel, pixel_values: torch.Tensor, targets: torch.Tensor, seed: int = 0) -> Check:
    """(g) Maps after a shift by 4 pixels (undone in the map) and after weak noise; and the same map twice."""
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
    """The checks of this explainer that an earlier run, of any size, made in the folder: its report keeps them."""
    file = folder / FILE
    if not file.exists():
        return {}
    kept = json.loads(file.read_text())
    wanted = _of_the_explainer(model, plan)
    same = {name: kept["settings"].get(name) for name in wanted} == wanted
    return dict(kept["checks"]) if same else {}


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
        folder: keeps each check in sanity.json there; those of the same head, images and numbers are not run again.

    Returns:
        {check: Check as a dictionary}; one that could not be made has "passed": None, and its value tells why.
    """
    from dataclasses import replace

    plan = replace(plan, limit=images, mosaics=max(plan.most_mosaics, images // TILES))
    settings = {
        **_of_the_explainer(model, plan),
        "images": images,
        "steps": steps,
        "judge": Path(judge).name if judge else None,
    }
    made: dict[str, dict[str, Any]] = {}
    kept = folder / FILE if folder else None
    if kept and kept.exists() and (earlier := json.loads(kept.read_text()))["settings"] == settings:
        made = earlier["checks"]
    source = Images(plan, model)
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
        ("e: held-out fills", lambda: held_out_fills(model, x, targets)),
        (
            "f: independent judge",
            lambda: independent_judge(model, x, targets, load_backbone(judge) if judge else None),
        ),
        ("g: stability", lambda: stability(model, x, targets, plan.seed)),
    ]
    found: dict[str, dict[str, Any]] = {}
    for name, check in checks:
        if name in made:
            say(f"{name}: kept from an earlier run")
            found[name] = made[name]
            continue
        done = check()
        found[name] = done.to_dict()
        if not done.figures:  # not made: it is tried again
            say(f"{name}: {done.value}")
            continue
        outcome = {True: "passed", False: "FAILED", None: "not judged"}[done.passed]
        say(f"{name}: {done.value}; {done.must}: {outcome}")
        made[name] = found[name]
        if kept:
            write_whole(kept, json.dumps({"settings": settings, "checks": made}, indent=2) + "\n")
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
