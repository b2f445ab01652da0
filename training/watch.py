"""What ends a run before hours are lost: a loss that is no number, and too many pictures that cannot be read."""

import math
from collections.abc import Sequence
from typing import Any


class LossWatch:
    """Looks at the loss of every step.

    Args:
        patience: the run ends at so many steps in a row whose loss is not finite. One such step spoils the weights, so
            1, except with fp16: there the scaler passes over it, and only a loss that stays so is hopeless.
    """

    def __init__(self, patience: int = 1):
        self.patience = patience
        self.bad: list[dict[str, Any]] = []  # the newest steps in a row

    def see(self, lines: Sequence[dict[str, Any]]) -> None:
        """Take the next steps in order, as log.jsonl has them: {"step", "total", ...}.

        Raises:
            FloatingPointError: the loss is no number and the patience is used up.
        """
        for line in lines:
            self.bad = [] if math.isfinite(line["total"]) else [*self.bad, line]
            if len(self.bad) < self.patience:
                continue
            found = f"the loss became {self.bad[0]['total']} at step {self.bad[0]['step']}"
            if self.patience == 1:
                raise FloatingPointError(f"{found}; lower --learning_rate")
            raise FloatingPointError(
                f"{found} and was no number for {self.patience} steps running; lower --learning_rate, or use "
                "--mixed_precision bf16"
            )


_ENOUGH = 100  # pictures that are allowed their share, however few were read: one damaged file of 17 says nothing


def too_many_unreadable(read: int, unreadable: int, allowed: float) -> str | None:
    """A sentence where more than the allowed share of the pictures was unreadable; None where it was not.

    A picture counts whenever it is read; of fewer than 100 as many may be unreadable as of 100.
    """
    if unreadable <= allowed * max(read, _ENOUGH):
        return None
    return (
        f"{unreadable} of the {read} pictures read so far cannot be decoded, more than the share of {allowed} that "
        "--max_unreadable allows"
    )
