"""What an evaluation measures on what, and what of it may not change between the parts of a resumed run."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .baselines import MethodSettings
from .metrics.localization import MOSAIC_CONFIDENCE
from .paths import check_path
from .pictures import parse_where
from .precision import PRECISIONS

METRICS = ("confidence", "adcc", "road", "insertion-deletion", "mosaic")
MEASURED_AS = 1  # goes up when a measure or a map changes: rows of another number are not continued


@dataclass(frozen=True)
class Plan:
    """What to measure on what.

    Args:
        dataset, split, revision, image_column: see `pictures.open_stream`.
        where: "column%N==R", only those rows.
        box_column: column of a box [left, top, right, bottom] in pixels of the picture, or of a list of boxes, for
            pointing game and energy; several count as one region.
        mask_column: the same from a column of pictures, inside where a pixel is not 0.
        methods: names, see `baselines.ALL`; "all" is allowed. The explainer and the trivial maps are always there.
        metrics: of METRICS; entropy, area and the mean mask value come with "confidence".
        limit: images; None: all. Of a growing run the first ones stay the same.
        slow_limit: the first so many images for methods with many passes per map (perturbation, integrated gradients).
        curve_limit: the first so many images for ROAD, insertion and deletion.
        mosaics: at most so many 2 x 2 mosaics, four maps each; None: as many as images, 100 at most.
        slow_mosaics: the same for methods with many passes per map.
        slow_adcc: the first so many images for ADCC of those methods, which asks for a second map.
        mosaic_confidence: images below are not used in mosaics.
        batch_size: images per batch.
        precision: of the passes, "float32", "bfloat16" or "float16", see `precision.passes_in`.
        seed: of everything random.
        settings: numbers of the methods.
    """

    dataset: str
    split: str = "validation"
    revision: str | None = None
    image_column: str | None = None
    where: str | None = None
    box_column: str | None = None
    mask_column: str | None = None
    methods: tuple[str, ...] = ("all",)
    metrics: tuple[str, ...] = METRICS
    limit: int | None = None
    slow_limit: int = 100
    curve_limit: int = 100
    mosaics: int | None = None
    slow_mosaics: int = 0
    slow_adcc: int = 0
    mosaic_confidence: float = MOSAIC_CONFIDENCE
    batch_size: int = 16
    precision: str = "float32"
    seed: int = 0
    settings: MethodSettings = field(default_factory=MethodSettings)

    def __post_init__(self) -> None:
        unknown = set(self.metrics) - set(METRICS)
        if unknown or not self.metrics:
            raise ValueError(f"metrics must be of {', '.join(METRICS)}, got {', '.join(self.metrics) or 'none'}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
        for name in ("slow_limit", "curve_limit", "mosaics", "slow_mosaics", "slow_adcc"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.box_column and self.mask_column:
            raise ValueError("give box_column or mask_column, not both")
        if (self.box_column or self.mask_column) and "confidence" not in self.metrics:
            raise ValueError("boxes and masks are measured with the metric confidence; ask for it too")
        parse_where(self.where)
        check_path(self.dataset, "dataset", "dataset")

    @property
    def most_mosaics(self) -> int:
        """`mosaics`, or what stands in for None."""
        return min(100, self.limit or 100) if self.mosaics is None else self.mosaics

    def fixed(self) -> dict[str, Any]:
        """What must not change between the parts of one resumed run; methods, metrics and limits may grow."""
        record = asdict(self)
        for name in (
            "revision",
            "methods",
            "metrics",
            "limit",
            "slow_limit",
            "curve_limit",
            "mosaics",
            "slow_mosaics",
            "slow_adcc",
            "batch_size",
        ):
            record.pop(name)
        record["measured_as"] = MEASURED_AS
        record["settings"] = self.settings.to_dict()
        record["dataset"] = Path(self.dataset).name if os.path.exists(self.dataset) else self.dataset
        return record
