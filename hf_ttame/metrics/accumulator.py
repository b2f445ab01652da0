"""Per-image values of a stream, collected batch by batch and across processes."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch


class Accumulator:
    """Rows {name: value} under a key (an image, or an image and a method); a repeated key replaces the earlier row.

    Example:
        >>> seen = Accumulator()
        >>> seen.add([0, 1], {"drop": torch.tensor([12.5, 0.0])})
        >>> seen.column("drop").mean()
        6.25
    """

    def __init__(self) -> None:
        self.rows: dict[Any, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)

    def add(self, keys: Sequence[Any], values: dict[str, torch.Tensor]) -> None:
        """Add one batch.

        Args:
            keys: B sortable, hashable keys.
            values: per name a tensor (B,), or (B, n) for a curve.

        Raises:
            ValueError: a tensor does not have B rows.
        """
        for name, tensor in values.items():
            if tensor.shape[0] != len(keys):
                raise ValueError(f"{name!r} must have {len(keys)} rows, one per key, got {tuple(tensor.shape)}")
        lists = {name: tensor.detach().cpu().tolist() for name, tensor in values.items()}
        for row, key in enumerate(keys):
            self.rows.setdefault(key, {}).update({name: column[row] for name, column in lists.items()})

    def column(self, name: str) -> np.ndarray:
        """One value per key, in the order of the keys; NaN where a key has none."""
        return np.array([self.rows[key].get(name, np.nan) for key in sorted(self.rows)], dtype=np.float64)

    def gather(self) -> "Accumulator":
        """The rows of all processes, the same on every one; alone, this one's."""
        everywhere = Accumulator()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            from accelerate.utils import gather_object

            gathered = gather_object([self.rows])
        else:
            gathered = [self.rows]
        for rows in gathered:
            for key, row in rows.items():
                everywhere.rows.setdefault(key, {}).update(row)
        return everywhere
