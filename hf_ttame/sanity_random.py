"""Sanity on backbones that know nothing: the same head on random layers, and heads trained on random classifiers."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .answers import choose_targets
from .evaluation_images import group_by_four
from .features import classify, logits_of, probe_noise
from .head import TTameHead, start_as_classifier, unsaturate
from .layer_choice import find_pooled_classifier
from .losses import ttame_loss
from .masking import apply_mask, resize_maps
from .metrics import grid_pointing
from .metrics.localization import TILES, fit, half_size, mosaic
from .metrics.sanity import (
    NO_PRIOR_MUST,
    Check,
    check_no_prior,
    check_randomised,
    not_made,
    rank_correlation,
    shapley_values,
)
from .modeling_ttame import TTameModel

SHARES = (0.25, 0.5, 0.75, 1.0)
DRAWS = 2  # random backbones per share, in (a)
RETRAINED = 3  # random backbones in (b), each with a head of its own


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

    Args:
        backbone: is changed.
        share: in [0, 1], of the modules with weights.
        pixel_values: (B, C, H, W), normalised.
        seed: of the draw.
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

    Args:
        model: the explainer; it is left as it is.
        pixel_values: (B, C, H, W), normalised; of a batch norm's statistics, the first 32.
        targets: (B,), the classes to explain.
        seed: of the random weights.
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


def too_few(mosaics: int, what: str) -> str:
    return f"2 mosaics of four different {what} are needed, got {mosaics}; give more photographs (--sanity-images)"


def pointing_per_tile(
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
    Several random backbones, as one alone says little. A control tells whether an answer truly hangs on its tile more
    than on the others (`_own_tile_adds`): a map that shows its tile may then show what the backbone used.

    Args:
        model: the explainer; it is left as it is.
        pixel_values: (B, C, H, W), normalised: to train on, and the tiles.
        steps: of each training.
        batch_size: of each step.
        seed: of weights, heads and batches.
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
            return not_made(NO_PRIOR_MUST, too_few(len(groups), "answers of the random backbone"))
        generator = torch.Generator().manual_seed(seed + draw)

        def batches(_: int, generator: torch.Generator = generator) -> torch.Tensor:
            chosen = torch.randint(len(pixel_values), (batch_size,), generator=generator)
            views = pixel_values[chosen.to(pixel_values.device)]
            return views.flip(-1) if torch.rand(1, generator=generator) < 0.5 else views

        losses.append(fit_head(other, batches, steps))
        found = pointing_per_tile(other, tiles, answers, groups)
        numbers = np.arange(len(groups))
        pointing.append(found[numbers, numbers % TILES])
        evidence.append(_own_tile_adds(other, tiles, answers, groups))
    return check_no_prior(np.concatenate(pointing), np.mean(losses, axis=0), np.concatenate(evidence), RETRAINED)


@torch.no_grad()
def _own_tile_adds(
    model: TTameModel, tiles: torch.Tensor, classes: torch.Tensor, groups: Sequence[list[int]]
) -> np.ndarray:
    """What its own tile adds to an answer less what each other tile adds: mean over the four of a mosaic, (n,).

    Exact Shapley values of the class's logit over all 16 sets of tiles, the rest blacked out: what a tile adds alone
    and beside others, in the logit's unit, standard deviations over the photographs after `spread_answers`. 0 of
    answers that hang on no tile more than on another, or all on the same.
    """
    size = (model.config.image_size[0], model.config.image_size[1])
    present = torch.arange(2**TILES)[:, None] >> torch.arange(TILES) & 1 == 1
    found = []
    for group in groups:
        shown, empty = tiles[group].to(model.device), model.fill()[:, None, None]
        images = [
            fit(mosaic(torch.where(keep[:, None, None, None], shown, empty)), size)
            for keep in present.to(shown.device)
        ]
        logits = model.classify(torch.stack(images)).float()[:, classes[group].to(shown.device)]
        parts = shapley_values(logits.T)  # (answers, tiles)
        own = parts.diagonal()
        found.append(float((own - (parts.sum(dim=1) - own) / (TILES - 1)).mean()))
    return np.array(found)
