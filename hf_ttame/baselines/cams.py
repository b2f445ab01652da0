"""The class activation maps of the package `grad-cam`, on any backbone that has feature layers.

The package hooks a module that returns one tensor. Here it hooks a module of our own through which the layer's
output is led, so that outputs in tuples, of any layout, or overwritten in place later, work as well. Gradients are
asked for there and not at the pixels: the backward pass ends at the layer, and what a map costs is not overstated.
"""

import contextlib
import io
from typing import Any

import torch
from torch import nn

from ..features import FeatureLayer, inner_module
from ..modeling_ttame import TTameModel
from ..precision import in_float32
from .contract import Explain

NAMES = {
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMPlusPlus",
    "layercam": "LayerCAM",
    "hirescam": "HiResCAM",
    "xgradcam": "XGradCAM",
    "eigencam": "EigenCAM",
    "scorecam": "ScoreCAM",
    "ablationcam": "AblationCAM",
}


class TappedClassifier(nn.Module):
    """Pixel values to logits, the output of one layer led through `tap` on its way.

    The weights are frozen, so with gradients enabled autograd follows the pass from the tap on and nothing before it.
    """

    def __init__(self, model: TTameModel, layer: FeatureLayer):
        super().__init__()
        self.backbone = model.backbone
        self.tap: nn.Module = nn.Identity()
        self.layer = layer
        self._classify = model.classify

    def _through_tap(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, (tuple, list)):
            return type(output)([self._through_tap(_module, _args, output[0]), *output[1:]])
        start = output.detach().float()  # the package reads its activations as NumPy arrays
        tapped = self.tap(start.requires_grad_(torch.is_grad_enabled())).to(output.dtype)
        return tapped.clone() if self.layer.clone else tapped

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        module = inner_module(self.backbone).get_submodule(self.layer.name)
        handle = module.register_forward_hook(self._through_tap)
        try:
            return self._classify(pixel_values)
        finally:
            handle.remove()


def cam(name: str, model: TTameModel, layer: FeatureLayer, batch_size: int = 32) -> Explain:
    """One of NAMES on one layer, as the package computes it: negative values cut, scaled to [0, 1], at image size.

    Score-CAM multiplies the normalised pixels by its masks, so what it hides takes the mean colour; RISE, AD and IC
    hide with black. Ablation-CAM compares logits that differ by one channel: it stays in float32 inside `passes_in`.

    Args:
        name: a key of NAMES.
        model: whose backbone is explained.
        layer: the feature layer to read.
        batch_size: masked copies per pass (Score-CAM, Ablation-CAM).

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    try:
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name} needs the package grad-cam; run: pip install 'hf-ttame[eval]'") from error

    tapped = TappedClassifier(model, layer)
    kind = getattr(pytorch_grad_cam, NAMES[name])
    reshape = None if layer.layout == "NCHW" else layer.to_maps

    def explain(pixel_values: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
        settings: dict[str, Any] = {"reshape_transform": reshape}
        if name == "ablationcam":
            settings |= {"ablation_layer": _ablation_layer(1 if reshape is None else -1), "batch_size": batch_size}
        method = kind(model=tapped, target_layers=[tapped.tap], **settings)
        method.batch_size = batch_size
        wanted = [ClassifierOutputTarget(int(class_id)) for class_id in class_ids]
        try:
            # Some methods draw a progress bar per image.
            with (
                torch.set_grad_enabled(method.uses_gradients),
                contextlib.redirect_stderr(io.StringIO()),
                in_float32(model) if name == "ablationcam" else contextlib.nullcontext(),
            ):
                maps = method(pixel_values.detach(), wanted)
        finally:
            method.activations_and_grads.release()
        return torch.from_numpy(maps).to(pixel_values.device)

    return explain


def _ablation_layer(channel_axis: int) -> nn.Module:
    """A layer that returns copies of an activation, each with another channel at zero, as Ablation-CAM defines it.

    The package's own layers put about -1e7 in place of a channel where activations can be negative, as they are in
    every layer that does not end in a ReLU; no classifier survives that.
    """
    from pytorch_grad_cam.ablation_layer import AblationLayer

    class ZeroedChannel(AblationLayer):
        def set_next_batch(self, input_batch_index: int, activations: Any, num_channels_to_ablate: int) -> None:
            one = activations[input_batch_index : input_batch_index + 1]
            self.activations = one.repeat(num_channels_to_ablate, *[1] * (one.ndim - 1))

        def __call__(self, _: torch.Tensor) -> torch.Tensor:
            for row in range(len(self.activations)):
                self.activations[row].select(0 if channel_axis == 1 else -1, int(self.indices[row])).zero_()
            return self.activations

    return ZeroedChannel()
