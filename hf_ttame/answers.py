"""What the numbers of a classifier mean: one class of many, several classes at once, or one yes-or-no logit."""

import torch
import torch.nn.functional as F

# "softmax": one class of K. "sigmoid": every class by itself (multi-label). "single_logit": one logit z, whose sign
# is the answer; it is read as two classes with the logits -z (no) and z (yes), each with its own sigmoid.
OUTPUTS = ("softmax", "sigmoid", "single_logit")


def class_logits(logits: torch.Tensor, outputs: str) -> torch.Tensor:
    """The backbone's logits (B, K), or (B, 1) of a single one, as one logit per class that can be explained."""
    return torch.cat([-logits, logits], dim=1) if outputs == "single_logit" else logits


def probabilities(logits: torch.Tensor, outputs: str) -> torch.Tensor:
    """Probability in [0, 1] of every class, (B, K) from `class_logits` (B, K)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.softmax(dim=1) if outputs == "softmax" else logits.sigmoid()


def answered(logits: torch.Tensor, outputs: str) -> torch.Tensor:
    """The classes that the classifier answers with, (B, K) bool.

    One per image, the one with the highest logit; of a multi-label classifier all with a probability over 0.5, or the
    highest if there is none.
    """
    top = F.one_hot(logits.argmax(dim=1), logits.shape[1]).bool()
    if outputs != "sigmoid":
        return top
    positive = logits > 0
    return positive | (top & ~positive.any(dim=1, keepdim=True))


def choose_targets(logits: torch.Tensor, outputs: str, generator: torch.Generator | None = None) -> torch.Tensor:
    """The class (B,) that training explains per image: the answer; of a multi-label classifier one of them at random.

    Args:
        logits: (B, K).
        outputs: one of `OUTPUTS`.
        generator: for the random choice, on the device of `logits`.
    """
    if outputs != "sigmoid":
        return logits.argmax(dim=1)
    return torch.multinomial(answered(logits, outputs).float(), 1, generator=generator)[:, 0]


def classification_loss(masked_logits: torch.Tensor, targets: torch.Tensor, outputs: str) -> torch.Tensor:
    """How far the masked images (B, K) are from keeping their targets (B,); a scalar.

    Cross-entropy; where classes stand by themselves, the binary cross-entropy of the target's logit with "yes".
    """
    if outputs == "softmax":
        return F.cross_entropy(masked_logits, targets)
    own = masked_logits.gather(1, targets[:, None])
    return F.binary_cross_entropy_with_logits(own, torch.ones_like(own))
