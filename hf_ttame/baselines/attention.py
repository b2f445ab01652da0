"""Maps from the attention of vision transformers: rollout, and attention weighted with its gradients.

The attention of any library is seen where it is computed: while a pass runs, calls of softmax and of
`scaled_dot_product_attention` are looked at, and the latter is done in two steps so that its weights exist.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..features import FeatureLayer
from ..modeling_ttame import TTameModel
from .contract import Explain


class AttentionRecorder(TorchFunctionMode):
    """Collects, in order, the attention weights (B, heads, tokens, tokens) of what runs in the block."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.found: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._in_two_steps(*args, **kwargs)
        output = func(*args, **kwargs)
        if func in (F.softmax, torch.softmax, torch.Tensor.softmax):
            self._note(output)
        return output

    def _note(self, weights: torch.Tensor) -> None:
        if weights.ndim == 4 and weights.shape[-2:] == (self.tokens, self.tokens):
            self.found.append(weights)

    def _in_two_steps(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if is_causal or enable_gqa:
            raise ValueError(
                "attention maps need plain self-attention over patches; this model's is causal or grouped"
            )
        logits = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
        weights = logits.softmax(dim=-1)
        self._note(weights)
        return weights @ value  # frozen classifiers are in eval mode: no dropout


def _token_layer(model: TTameModel) -> FeatureLayer:
    layer = model.layers[-1]
    if layer.layout != "tokens":
        raise ValueError(
            f"attention maps need a vision transformer whose layers hold tokens; {layer.name!r} is {layer.layout}; "
            "leave rollout and gradient-attention out for this backbone"
        )
    return layer


def _check(found: list[torch.Tensor], tokens: int) -> None:
    if not found:
        raise ValueError(
            f"no attention over {tokens} tokens was seen in this backbone (windows, or a kernel of its own); "
            "leave rollout and gradient-attention out"
        )


def _to_map(relevance: torch.Tensor, layer: FeatureLayer) -> torch.Tensor:
    """What the class token (or, without one, the mean of all tokens) draws from each patch, (B, h, w)."""
    prefix = layer.prefix_tokens
    drawn = relevance[:, 0] if prefix else relevance.mean(dim=1)
    return drawn[:, prefix:].unflatten(1, layer.grid)


def rollout(model: TTameModel) -> Explain:
    """Attention rollout (Abnar and Zuidema, arXiv 2005.00928): the same map for every class.

    Per block half the mean attention of the heads and half the identity, for the skip connection; their product.
    """
    layer = _token_layer(model)
    tokens = layer.prefix_tokens + layer.grid[0] * layer.grid[1]

    @torch.no_grad()
    def explain(pixel_values: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
        with AttentionRecorder(tokens) as recorder:
            model.classify(pixel_values)
        _check(recorder.found, tokens)
        identity = torch.eye(tokens, device=pixel_values.device)
        relevance = identity.expand(len(pixel_values), -1, -1)
        for weights in recorder.found:
            relevance = (0.5 * weights.float().mean(dim=1) + 0.5 * identity) @ relevance
        return _to_map(relevance, layer)

    return explain


def gradient_attention(model: TTameModel) -> Explain:
    """Attention times its gradient, positive part (Chefer et al., arXiv 2103.15679): R <- R + mean(relu(dA * A)) R."""
    layer = _token_layer(model)
    tokens = layer.prefix_tokens + layer.grid[0] * layer.grid[1]

    def explain(pixel_values: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
        pixels = pixel_values.detach().clone().requires_grad_()
        with torch.enable_grad():
            with AttentionRecorder(tokens) as recorder:
                logits = model.classify(pixels)
            _check(recorder.found, tokens)
            score = logits.gather(1, class_ids[:, None]).sum()
            gradients = torch.autograd.grad(score, recorder.found)  # goes back to the first attention and no further
        relevance = torch.eye(tokens, device=pixels.device).expand(len(pixels), -1, -1)
        for weights, gradient in zip(recorder.found, gradients, strict=True):
            flow = (gradient * weights).clamp(min=0).mean(dim=1).detach().float()
            relevance = relevance + flow @ relevance
        return _to_map(relevance, layer)

    return explain
