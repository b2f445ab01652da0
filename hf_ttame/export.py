"""The explainer as one ONNX graph: pixel values to logits and maps, checked against PyTorch before it gets a name."""

import importlib.util
import json
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .answers import probabilities
from .disk import writing
from .head import fold
from .image_processing import ImageInput, Picture, load_image, load_picture, preprocess
from .masking import min_max
from .modeling_ttame import TTameModel

CLASSES = ("predicted", "given", "all")
TOLERANCE = 1e-4
OPSET = 20
METADATA_KEY = "ttame"
_LARGEST = 2**31 - 2**20  # bytes; a protobuf message holds 2 GiB
_FIXED = "its batch has to be fixed: pass batch=1, or --batch 1"
_PHOTOGRAPHS = Path(str(files("hf_ttame"))) / "assets" / "photographs"


class ExplainerGraph(nn.Module):
    """An explainer as tensors in, tensors out, for `torch.export`, `torch.onnx` and `torch.compile`.

    The head's batch norms and skip connections are folded once, into its convolutions.

    Args:
        model: an explainer in eval mode.
        classes: as in `export_onnx`.
    """

    def __init__(self, model: TTameModel, classes: str = "predicted"):
        super().__init__()
        self.top = _top(classes, model.config.num_labels)
        self.classes = classes
        self.model = model
        self.head = fold(model.head)
        self.names = ["logits", "scores", *(["class_ids"] if self.top else []), "map_logits", "maps"]

    def forward(self, pixel_values: torch.Tensor, class_ids: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """The outputs, in the order of `names`.

        Args:
            pixel_values: (B, C, H, W), preprocessed.
            class_ids: (B, N) int64, with classes="given" alone.
        """
        logits, features = self.model.features(pixel_values)
        scores = probabilities(logits, self.model.config.classifier_outputs)
        if self.top:
            class_ids = logits.topk(self.top, dim=1).indices
        map_logits = self.head(features, class_ids)
        chosen = (class_ids,) if self.top and class_ids is not None else ()
        values = map_logits
        if self.model.config.map_scaling == "sigmoid":
            # The sigmoid. onnxruntime's own one is off by 1e-7, which min-max enlarges where a class is absent and its
            # mask faint; this form is exact relative to its value.
            values = map_logits.clamp(max=0).exp() / (1 + (-map_logits.abs()).exp())
        return logits, scores, *chosen, map_logits, min_max(values)

    @torch.no_grad()
    def example(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Inputs by name for pictures (B, C, H, W); given classes are the three most likely ones."""
        inputs = {"pixel_values": pixel_values}
        if self.classes == "given":
            count = min(3, self.model.config.num_labels)
            inputs["class_ids"] = self.model.classify(pixel_values).topk(count, dim=1).indices
        return inputs


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it compares with PyTorch.

    path, facts: the two files. megabytes: of the graph (10^6 bytes). differences: largest difference per output, on
    `pictures` photographs, None where nothing was compared. maps: how many were "compared", how many "faint" ones held
    to a wider tolerance, how many "left_out" (see `export_check.compare`); the first picture's count twice, alone and
    in a batch. skipped: why pictures could not be read, of the calibration too. agreement: how an int8
    graph agrees with the exact one (see `export_int8.agree`).
    """

    path: Path
    facts: Path
    megabytes: float
    pictures: int
    skipped: list[str]
    differences: dict[str, float | None]
    maps: dict[str, int]
    agreement: dict[str, float | int | None] | None


def export_onnx(
    model: TTameModel,
    path: str | os.PathLike,
    *,
    classes: str = "predicted",
    batch: int | None = None,
    check: Sequence[ImageInput] = (),
    tolerance: float = TOLERANCE,
    int8: bool = False,
    calibration: Sequence[ImageInput] = (),
    licence: str | None = None,
) -> ExportReport:
    """Write an explainer as one ONNX file that needs nothing else, and its facts as a JSON file beside it.

    The graph takes `pixel_values` (B, C, H, W) float32 and gives `logits` (B, K), `scores` (B, K), `map_logits`
    (B, N, h, w) and `maps`, the same scaled to [0, 1]; both at map size. Where the graph chooses the classes it gives
    `class_ids` (B, N) too. Before the file gets its name, onnxruntime runs it on photographs beside PyTorch. The facts
    (labels, preprocessing, meaning of the outputs) are also the ONNX file's metadata, under the key "ttame".

    Args:
        model: an explainer in eval mode, float32, on the CPU.
        path: ends in ".onnx".
        classes: "predicted"; "given": a second input `class_ids` (B, N) int64; "all"; "top5" (any number): those with
            the highest scores, the highest first.
        batch: None: free. A number fixes it, for backbones that cannot leave it open.
        check: photographs to compare on; empty: those that the package ships. Unreadable ones are skipped.
        tolerance: largest difference: absolute for scores and maps; for logits and map logits relative to the largest
            absolute value of the output, where that is above 1.
        int8: quantise the checked graph; the file is then the quantised one, and the report says how far it agrees.
        calibration: photographs for int8, others than those of `check`; empty: those that the package ships.
        licence: a sentence for the facts; None: what the configs know.

    Raises:
        ValueError: the model or an argument does not fit, the file cannot be written, the backbone cannot be exported,
            or the graph differs from PyTorch by more than the tolerance.
        ModuleNotFoundError: the packages of the extra `export` are not installed.

    Example:
        >>> report = export_onnx(model, "explainer.onnx", classes="top5")
        >>> print(report.differences)
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"the export needs {module}; run: pip install 'hf-ttame[export]'")
    from .export_check import compare, groups
    from .export_facts import describe
    from .export_int8 import agree, quantise

    target = Path(path)
    _check_arguments(model, target, batch)
    graph = ExplainerGraph(model, classes).eval()
    pictures, skipped = _open(check, len(model.config.pixel_scale))
    measured: list[Picture] = []
    if int8:
        measured, unreadable = _open(calibration, len(model.config.pixel_scale))
        skipped += unreadable
    facts = describe(model, classes, batch, licence, pictures)
    if facts["preprocessing"] is None:
        warnings.warn(
            f"what {type(model.image_processor).__name__} does is not a plain resize, crop and normalisation of RGB "
            "pictures; the file does not describe it, so a server has to bring its own preprocessing",
            stacklevel=2,
        )
    inputs = [graph.example(values) for values in groups(preprocess(model.image_processor, pictures), batch)]
    with writing(target), _folder_beside(target) as folder:
        part = Path(folder, "part.onnx")
        _write(graph, part, batch, facts)
        found = compare(model, part, inputs, tolerance)
        agreement = None
        if int8:
            exact = part.rename(part.with_name("exact.onnx"))
            values = groups(preprocess(model.image_processor, measured), batch or 1)
            quantise(exact, part, [graph.example(value) for value in values])
            agreement = agree(exact, part, inputs[0 if batch else 1 :], len(pictures))
        checked = {"pictures": len(pictures), "largest_differences": found.differences, "maps": found.maps}
        beside = Path(folder, "part.json")
        beside.write_text(
            json.dumps({**facts, "check": {**checked, "int8": agreement}}, indent=1, ensure_ascii=False) + "\n",
            "utf-8",
        )
        megabytes = round(part.stat().st_size / 1e6, 2)
        os.replace(beside, target.with_suffix(".json"))
        os.replace(part, target)
    return ExportReport(
        target,
        target.with_suffix(".json"),
        megabytes,
        len(pictures),
        skipped,
        found.differences,
        found.maps,
        agreement,
    )


def _top(classes: str, num_labels: int) -> int:
    """How many classes the graph itself chooses; 0 where it chooses none."""
    if classes in CLASSES:
        return 1 if classes == "predicted" else 0
    number = re.fullmatch(r"top(\d+)", classes)
    if not number or not 1 <= int(number[1]) <= num_labels:
        raise ValueError(
            f"classes must be one of {', '.join(CLASSES)} or top1..top{num_labels} (such as 'top5'), got {classes!r}"
        )
    return int(number[1])


def _check_arguments(model: TTameModel, target: Path, batch: int | None) -> None:
    if target.suffix != ".onnx" or target.is_dir():
        raise ValueError(f"the file to write must end in .onnx and not be a folder, got {str(target)!r}")
    _check_facts_file(target.with_suffix(".json"))
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be None or at least 1, got {batch}")
    if model.training:
        raise ValueError("the export needs eval mode; call model.eval() first")
    for parameter in model.parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise ValueError(
                f"the export needs float32 weights on the CPU, got {parameter.dtype} on {parameter.device}; "
                "load the explainer without dtype and device_map"
            )


def _check_facts_file(file: Path) -> None:
    """Raise ValueError where the facts would replace a file that no export wrote."""
    from .export_facts import FORMAT

    if not file.exists():
        return
    try:
        ours = json.loads(file.read_text("utf-8"))["format"].split("/")[0] == FORMAT.split("/")[0]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise ValueError(
            f"{str(file)!r} would be replaced by the facts of the export, and no export wrote it; choose another name "
            "for the .onnx file, or move that one away"
        )


def _open(images: Sequence[ImageInput], channels: int) -> tuple[list[Picture], list[str]]:
    """Pictures for the backbone, without `images` the shipped ones; and what is wrong with unreadable ones."""
    chosen = images or [_shipped(path, channels) for path in sorted(_PHOTOGRAPHS.glob("*.jpg"))]
    pictures, skipped = [], []
    for image in chosen:
        try:
            pictures.append(load_picture(image, channels))
        except ValueError as error:
            skipped.append(str(error))
    if not pictures:
        raise ValueError(f"none of the {len(chosen)} pictures can be read; the first: {skipped[0]}")
    return pictures, skipped


def _shipped(path: Path, channels: int) -> ImageInput:
    """A photograph; for backbones of many channels its colours over and over."""
    return path if channels in (1, 3) else np.asarray(load_image(path))[:, :, np.arange(channels) % 3]


def _folder_beside(target: Path) -> tempfile.TemporaryDirectory:
    """A temporary folder on the file system of the target, so that a finished file only changes its name."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=f".{target.stem}-", dir=target.parent)
    except OSError as error:
        raise ValueError(
            f"cannot write into {str(target.parent)!r} ({error}); give a folder you may write to"
        ) from error


def _write(graph: ExplainerGraph, part: Path, batch: int | None, facts: dict[str, Any]) -> None:
    """Export, add the metadata, save as one file."""
    config = graph.model.config
    size = (batch or 2, len(config.pixel_scale), *config.image_size)
    inputs = graph.example(torch.zeros(size))
    free: dict[str, Any] = {"pixel_values": {} if batch else {0: torch.export.Dim("B")}}
    if "class_ids" in inputs:
        free["class_ids"] = {**free["pixel_values"], 1: torch.export.Dim("N")}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own exporter
            program: Any = torch.onnx.export(
                graph,
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=graph.names,
                dynamic_shapes=free,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError, TypeError, AssertionError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        advice = f"; {_FIXED}" if batch is None else ""
        raise ValueError(f"{facts['backbone']['architecture']} cannot be exported: {reason}{advice}") from error
    proto = program.model_proto
    dimensions = proto.graph.input[0].type.tensor_type.shape.dim
    if batch is None and not dimensions[0].dim_param:  # torch's exporter falls back to the size of the example
        raise ValueError(f"{facts['backbone']['architecture']} does not leave its batch open; {_FIXED}")
    if proto.ByteSize() > _LARGEST:
        raise ValueError(f"one ONNX file holds at most 2 GiB, this explainer needs {proto.ByteSize() / 2**30:.1f}")
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, json.dumps(facts, ensure_ascii=False)
    part.write_bytes(proto.SerializeToString())
