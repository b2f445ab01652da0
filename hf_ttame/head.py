"""The attention head: one branch per feature layer, fused into one map per class (arXiv 2403.04523, fig. 3)."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .answers import class_logits
from .configuration_ttame import TTameConfig
from .layer_choice import PooledClassifier


class TTameHead(nn.Module):
    """Feature maps of a frozen classifier to map logits, one map per class.

    Per layer l: Z_l = ReLU(BN_l(Conv1x1_l(F_l)) + F_l); the Z_l, resized to the map grid, are concatenated and fused
    by one 1x1 convolution. The tensor of all channels at map size is never made: resizing and the fusion commute, so
    each layer is fused on its own grid with its slice of the fusion weight, and only for the classes asked for.

    Args:
        channels: C_l per layer, fine to coarse.
        num_classes: K.
        map_size: (h, w) of the maps.
        skip_connection: add F_l before the activation.
        batch_norm: normalise after the branch's convolution.
        branch_activation: "relu", or the paper's ablation "sigmoid".
        last_layer_relu: False leaves the last layer without activation, so that a layer with negative values can
            start as a class activation map.

    The buffer `class_counts` (K,), int64, holds how often training explained each class; all zero: not recorded.
    """

    class_counts: torch.Tensor

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        map_size: Sequence[int],
        *,
        skip_connection: bool = True,
        batch_norm: bool = True,
        branch_activation: str = "relu",
        last_layer_relu: bool = True,
    ):
        super().__init__()
        self.channels = tuple(channels)
        self.num_classes = num_classes
        self.map_size = (int(map_size[0]), int(map_size[1]))
        self.skip_connection = skip_connection
        self.branch_activation = branch_activation
        self.last_layer_relu = last_layer_relu
        self.convs = nn.ModuleList(nn.Conv2d(c, c, 1) for c in self.channels)
        self.bns = nn.ModuleList(nn.BatchNorm2d(c) for c in self.channels) if batch_norm else None
        self.fuser = nn.Conv2d(sum(self.channels), num_classes, 1)
        self.register_buffer("class_counts", torch.zeros(num_classes, dtype=torch.int64))

    @classmethod
    def from_config(cls, config: TTameConfig) -> "TTameHead":
        """A head at its random start, as the config says."""
        return cls(
            [layer["channels"] for layer in config.feature_layers],
            config.num_labels,
            config.map_size,
            skip_connection=config.skip_connection,
            batch_norm=config.batch_norm,
            branch_activation=config.branch_activation,
            last_layer_relu=config.last_layer_relu,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Heads saved before the counts existed load too: nothing is recorded of them."""
        state_dict.setdefault(f"{prefix}class_counts", torch.zeros(self.num_classes, dtype=torch.int64))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def branch(self, layer: int, features: torch.Tensor) -> torch.Tensor:
        """Z_l (B, C_l, h_l, w_l) of one layer's features F_l (B, C_l, h_l, w_l)."""
        conv = self.convs[layer]
        if self.training or self.bns is None:
            x = conv(features)
            if self.bns is not None:
                x = self.bns[layer](x)
            if self.skip_connection:
                x = x + features
        else:
            weight, bias = self._folded(layer)
            x = F.conv2d(features, weight.to(features.dtype), bias.to(features.dtype))
        if layer == len(self.channels) - 1 and not self.last_layer_relu:
            return x
        return torch.sigmoid(x) if self.branch_activation == "sigmoid" else F.relu(x, inplace=True)

    def _folded(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Convolution, batch norm and skip of one layer as one convolution (eval mode), at least in float32.

        Folded at every call and never stored: a stored copy would go stale with the next optimiser step.
        """
        conv: Any = self.convs[layer]
        bn: Any = self.bns[layer] if self.bns is not None else None
        dtype = torch.promote_types(conv.weight.dtype, torch.float32)
        scale = bn.weight.to(dtype) * torch.rsqrt(bn.running_var.to(dtype) + bn.eps)
        weight = conv.weight.to(dtype) * scale[:, None, None, None]
        if self.skip_connection:
            weight[:, :, 0, 0].diagonal().add_(1)
        bias = (conv.bias.to(dtype) - bn.running_mean.to(dtype)) * scale + bn.bias.to(dtype)
        return weight, bias

    def forward(self, features: Sequence[torch.Tensor], class_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Map logits of the classes asked for.

        Args:
            features: L tensors (B, C_l, h_l, w_l), fine to coarse.
            class_ids: (N,) the same classes for every image, (B, N) classes per image, None every class.

        Returns:
            (B, N, h, w); N = K without class_ids.
        """
        if len(features) != len(self.channels):
            raise ValueError(f"the head reads {len(self.channels)} feature layers, got {len(features)}")
        # Rows of the fusion first, then its slices per layer: unasked classes cost nothing.
        weight = self.fuser.weight[:, :, 0, 0]
        bias = self.fuser.bias
        assert bias is not None
        if class_ids is not None:
            weight, bias = weight[class_ids], bias[class_ids]  # (N, C) and (N,), or (B, N, C) and (B, N)
        bias = bias.reshape(*bias.shape[-2:] if bias.ndim == 2 else (1, -1), 1, 1)
        total: torch.Tensor | None = None
        for layer, (maps, rows) in enumerate(zip(features, weight.split(self.channels, dim=-1), strict=True)):
            z = self.branch(layer, maps)
            if rows.ndim == 2:
                fused = F.conv2d(z, rows[:, :, None, None].to(z.dtype))
            else:
                fused = torch.bmm(rows.to(z.dtype), z.flatten(2)).unflatten(2, z.shape[-2:])
            fused = F.interpolate(fused, size=self.map_size, mode="bilinear", align_corners=False)
            total = fused if total is None else total + fused
        assert total is not None
        return total + bias.to(total.dtype)


@torch.no_grad()
def fold(head: TTameHead) -> TTameHead:
    """The same head for inference alone, a copy: batch norm and skip connection are inside its convolutions."""
    if head.bns is None:
        return copy.deepcopy(head).eval()
    folded = TTameHead(
        head.channels,
        head.num_classes,
        head.map_size,
        skip_connection=False,
        batch_norm=False,
        branch_activation=head.branch_activation,
        last_layer_relu=head.last_layer_relu,
    )
    for layer, module in enumerate(folded.convs):
        conv: Any = module
        for tensor, value in zip((conv.weight, conv.bias), head._folded(layer), strict=True):
            tensor.copy_(value)
    folded.fuser.load_state_dict(head.fuser.state_dict())
    return folded.eval()


def start_as_classifier(head: TTameHead, pooled: PooledClassifier, outputs: str) -> None:
    """Warm start: the head begins as the class activation map (CAM) of the last layer.

    The last layer's branch passes its features through unchanged, its slice of the fusion is the classifier's weight,
    every other slice is zero. The mean of each map is then the class's logit, where the map grid is a multiple of the
    layer's. Where the classifier reads the class token, each place holds what the classifier would say of that patch
    token alone (the class identifiability of image tokens, arXiv 2310.18969). `outputs`: what the classifier's logits
    mean, see `answers.class_logits`.
    """
    with torch.no_grad():
        silenced = head.convs[-1] if head.bns is None else head.bns[-1]
        for parameter in (*silenced.parameters(), *head.fuser.parameters()):
            parameter.zero_()
        rows = class_logits(pooled.weight.T, outputs).T
        head.fuser.weight[:, -head.channels[-1] :, 0, 0] = rows.to(head.fuser.weight)
        if pooled.bias is not None:
            head.fuser.state_dict()["bias"].copy_(class_logits(pooled.bias[None], outputs)[0])


@torch.no_grad()
def unsaturate(head: TTameHead, features: Sequence[torch.Tensor], limit: float = 8.0) -> None:
    """Scale a random start down where it could not learn.

    Features of some backbones are so large that the first map logits have a root mean square over `limit`: there the
    sigmoid is flat and no gradient passes. The fusion is then scaled to a root mean square of 1. Elsewhere, so for
    the paper's backbones, nothing changes.

    Args:
        head: in eval mode, at its random start.
        features: of a few images, as for `TTameHead.forward`.
    """
    some = torch.arange(min(head.num_classes, 64), device=features[0].device)
    size = head(features, some).float().square().mean().sqrt()
    if size > limit:
        head.fuser.weight.div_(size)
