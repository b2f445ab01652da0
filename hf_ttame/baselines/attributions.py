"""Integrated gradients and occlusion, through the package `captum`."""

import torch

from ..modeling_ttame import TTameModel
from .contract import Explain


def _captum() -> None:
    try:
        import captum.attr  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("this method needs the package captum; run: pip install 'hf-ttame[eval]'") from error


def integrated_gradients(model: TTameModel, steps: int = 50, batch_size: int = 32) -> Explain:
    """Integrated gradients from black (Sundararajan et al., arXiv 1703.01365), absolute values, channels summed."""
    _captum()
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(model.classify)

    def explain(pixel_values: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
        black = model.fill().to(pixel_values).reshape(1, -1, 1, 1).expand_as(pixel_values)
        found = method.attribute(
            pixel_values.detach().clone(),
            baselines=black,
            target=class_ids,
            n_steps=steps,
            internal_batch_size=max(batch_size, len(pixel_values)),
        )
        return found.detach().abs().sum(dim=1).float()

    return explain


def occlusion(model: TTameModel, batch_size: int = 32) -> Explain:
    """Drop of the class's logit under a black square of a seventh of the side, moved by half its side.

    Zeiler and Fergus, arXiv 1311.2901. Where covering raises the logit the map is 0.
    """
    _captum()
    from captum.attr import Occlusion

    method = Occlusion(model.classify)

    @torch.no_grad()
    def explain(pixel_values: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
        channels, height, width = pixel_values.shape[1:]
        window = (max(1, height // 7), max(1, width // 7))
        black = model.fill().to(pixel_values).reshape(1, -1, 1, 1).expand_as(pixel_values)
        found = method.attribute(
            pixel_values,
            sliding_window_shapes=(channels, *window),
            strides=(channels, max(1, window[0] // 2), max(1, window[1] // 2)),
            baselines=black,
            target=class_ids,
            perturbations_per_eval=max(1, batch_size // len(pixel_values)),
        )
        return found.mean(dim=1).clamp(min=0).float()

    return explain
