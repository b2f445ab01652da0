"""`pipeline("image-explanation", model=...)`: explanations by transformers' own door."""

import io
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from PIL import Image
from transformers import AutoModel, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .image_processing import DECODER_ERRORS, load_image
from .modeling_ttame import TTameModel

TASK = "image-explanation"
MAX_BYTES = 64 << 20  # a larger download is refused
_TIMEOUT = 30.0
_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")


class ImageExplanationPipeline(Pipeline):
    """Pictures to explanations.

    Per picture a list, the class with the highest score first where none is asked for, of dicts with `class_id`,
    `label`, `score`, `overlay` (PIL, RGB), `map` (PIL, grey, the picture's size) and `explanation` (`Explanation`,
    with the map in float32). A picture is a PIL image, a path, a URL, an array, or a row of a dataset with an image.

    Args:
        inputs: one picture; a list, answered by a list; a dataset or a generator, answered by an iterator.
        class_ids: class ids or label names, the same for every picture.
        top_k: instead of class_ids, the k classes with the highest scores.
        batch_size: pictures per pass.
        overlay_strength: of the colours over the picture, in [0, 1].

    Raises:
        ValueError: the model is no explainer, a picture cannot be read, a class is not known.

    Example:
        >>> from transformers import pipeline
        >>> import hf_ttame
        >>> explain = pipeline("image-explanation", model="path/to/explainer")
        >>> explain("cat.jpg", top_k=3)[0]["overlay"].save("cat_explained.png")
    """

    # The model brings its own processor, with the backend that its maps were made with.
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _load_processor = False

    def __init__(self, model: Any, *args: Any, **kwargs: Any):
        if not isinstance(model, TTameModel):
            raise ValueError(
                f"the task {TASK!r} needs an explainer, got {type(model).__name__}; make one for this classifier with "
                "TTameModel.from_backbone and train it"
            )
        super().__init__(model, *args, **kwargs)
        self.image_processor = model.image_processor

    def _sanitize_parameters(
        self,
        class_ids: Any = None,
        top_k: int | None = None,
        overlay_strength: float | None = None,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            raise TypeError(
                f"the pipeline takes class_ids, top_k, batch_size and overlay_strength, got {sorted(unknown)}"
            )
        forward = {"class_ids": class_ids, "top_k": top_k}
        after = {} if overlay_strength is None else {"overlay_strength": overlay_strength}
        return {}, {key: value for key, value in forward.items() if value is not None}, after

    def __call__(
        self, inputs: Any, batch_size: int | None = None, num_workers: int | None = None, **kwargs: Any
    ) -> Any:
        """See the class; `num_workers` is accepted as for every pipeline, pictures are decoded in this process."""
        size = batch_size or self._batch_size or 1
        if size < 1:
            raise ValueError(f"batch_size must be at least 1, got {size}")
        _, forward, after = self._sanitize_parameters(**kwargs)
        forward, after = {**self._forward_params, **forward}, {**self._postprocess_params, **after}
        if not _is_stream(inputs):
            return next(self._explained([inputs], 1, forward, after))
        explained = self._explained(inputs, size, forward, after)
        return list(explained) if isinstance(inputs, (list, tuple)) else explained

    def _explained(
        self, inputs: Iterable[Any], size: int, forward: dict[str, Any], after: dict[str, Any]
    ) -> Iterator[list[dict[str, Any]]]:
        rows = iter(_undecoded(inputs))
        while batch := list(islice(rows, size)):
            prepared = {"pictures": [picture for row in batch for picture in self.preprocess(row)["pictures"]]}
            yield from self.postprocess(self.forward(prepared, **forward), **after)

    def preprocess(self, input_: Any, **_: Any) -> dict[str, Any]:
        return {"pictures": [open_picture(input_)]}

    def _forward(self, input_tensors: dict[str, Any], **parameters: Any) -> Any:
        pictures = input_tensors["pictures"]
        explanations = self.model.explain(pictures, batch_size=len(pictures), **parameters)
        return [[e for e in explanations if e.image_index == index] for index in range(len(pictures))]

    def postprocess(self, model_outputs: Any, overlay_strength: float = 0.55, **_: Any) -> Any:
        return [
            [
                {
                    "class_id": e.class_id,
                    "label": e.label,
                    "score": e.score,
                    "overlay": e.overlay(overlay_strength),
                    "map": Image.fromarray((e.map * 255).round().astype("uint8")),
                    "explanation": e,
                }
                for e in explanations
            ]
            for explanations in model_outputs
        ]


def _is_stream(inputs: Any) -> bool:
    single = isinstance(inputs, (str, bytes, Mapping, Image.Image)) or hasattr(inputs, "__array__")
    return not single and (hasattr(inputs, "__iter__") or hasattr(inputs, "__getitem__"))


def _undecoded(inputs: Any) -> Iterable[Any]:
    """Rows of a `datasets` dataset with the pictures still as bytes, so that their size is checked before decoding."""
    features = getattr(inputs, "features", None)
    if features and hasattr(inputs, "cast_column"):
        from datasets import Image as ImageFeature

        for name, feature in features.items():
            if isinstance(feature, ImageFeature):
                inputs = inputs.cast_column(name, ImageFeature(decode=False))
    if hasattr(inputs, "__iter__"):
        return inputs
    return (inputs[index] for index in range(len(inputs)))  # a torch dataset


def open_picture(source: Any) -> Image.Image:
    """A picture as RGB from a PIL image, path, URL, array, encoded bytes, or a row of a dataset.

    Raises:
        ValueError: not a readable picture, too large, or a row without a picture.
        TypeError: `source` is of another type.
    """
    if isinstance(source, Mapping):
        if source.get("bytes") is not None or source.get("path") is not None:
            return open_picture(source["bytes"] if source.get("bytes") is not None else source["path"])
        name = next((name for name in _COLUMNS if source.get(name) is not None), None)
        if name is None:
            raise ValueError(f"a row needs its picture in one of the columns {_COLUMNS}, got {sorted(source)}")
        return open_picture(source[name])
    if isinstance(source, str) and source.startswith(("https://", "http://")):
        source = _download(source)
    if isinstance(source, (bytes, bytearray)):
        try:
            source = Image.open(io.BytesIO(source))  # opened, not decoded: load_image checks the size first
        except DECODER_ERRORS as error:
            raise ValueError(f"{len(source)} bytes that are no readable picture ({error})") from error
    return load_image(source)


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            content = response.read(MAX_BYTES + 1)
    except (urllib.error.URLError, OSError) as error:
        raise ValueError(f"the picture {url!r} cannot be fetched: {error}") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"the picture {url!r} has over {MAX_BYTES >> 20} MB; download it and make it smaller")
    return content


PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=ImageExplanationPipeline, pt_model=AutoModel, type="image")
