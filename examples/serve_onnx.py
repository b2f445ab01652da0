"""Serve an explainer written by `ttame export`, with onnxruntime, numpy and Pillow alone.

    python serve_onnx.py explainer.onnx photo.jpg                 writes photo_<class>.png
    python serve_onnx.py explainer.onnx photo.jpg --class 281     any class, of a graph with --classes given or all
    python serve_onnx.py explainer.onnx --port 8000               POST a picture, get JSON with overlays

Everything that it needs to know stands in the file's metadata. This file needs nothing else of the project: copy it.
"""

import argparse
import base64
import io
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_BYTES = 20_000_000  # of a picture sent over HTTP
MAX_PIXELS = 100_000_000  # a larger picture is refused before it is decoded
MAX_ASPECT = 100  # the shorter side is scaled up to the graph's input: a thin line would fill the memory
Image.init()
# Pillow opens many more; EPS it hands to Ghostscript. AVIF and WebP are missing in some builds.
FORMATS: list[str] = [
    name for name in ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM") if name in Image.OPEN
]
COLOURS = np.array([(36, 23, 99), (43, 99, 227), (38, 190, 214), (108, 226, 106), (240, 216, 58), (239, 107, 36)])


class Explainer:
    """One exported file. Safe to use from several threads."""

    def __init__(self, path: str | Path):
        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes have no common base
            raise ValueError(f"{path} cannot be opened: {error}") from error
        metadata = self.session.get_modelmeta().custom_metadata_map
        if "ttame" not in metadata:
            raise ValueError(
                f"{path} is no explainer: its metadata has no entry 'ttame'; write it with `ttame export`"
            )
        self.facts = json.loads(metadata["ttame"])
        self.recipe = self.facts["preprocessing"]
        if self.recipe is None:
            raise ValueError(f"{path} does not describe its preprocessing, so pictures cannot be prepared for it")

    def prepare(self, picture: Image.Image) -> np.ndarray:
        """Pixel values (1, 3, H, W) of an RGB picture, as the classifier's own processor makes them."""
        width, height = self.resized(picture.size)
        picture = picture.resize((width, height), Image.Resampling[self.recipe["resample"].upper()])
        if self.recipe["crop"]:
            crop_h, crop_w = self.recipe["crop"]
            left, top = (width - crop_w) // 2, (height - crop_h) // 2
            picture = picture.crop((left, top, left + crop_w, top + crop_h))
        values = np.asarray(picture, dtype=np.float32) / 255
        values = (values - np.float32(self.recipe["mean"])) / np.float32(self.recipe["std"])
        return values.transpose(2, 0, 1)[None]

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of a picture after the resize and before the crop."""
        resize = self.recipe["resize"]
        if "height" in resize:
            return resize["width"], resize["height"]
        edge, short, long = resize["shortest_edge"], min(size), max(size)
        other = int(edge * long / short)
        return (edge, other) if size[0] <= size[1] else (other, edge)

    def fewer(self, top_k: int) -> str | None:
        """What to say of `top_k` classes where the graph gives fewer maps; None where it gives them."""
        classes, labels = self.facts["classes"], len(self.facts["labels"])
        given = {"predicted": 1, "given": labels, "all": labels}.get(classes, classes.removeprefix("top"))
        if top_k <= int(given):
            return None
        remedy = f"; for more export it with --classes top{top_k}, given or all" if int(given) < labels else ""
        return f"of --top-k {top_k} this graph gives the first {given}{remedy}"

    def explain(self, picture: Image.Image, wanted: list[int] | None = None, top_k: int = 1) -> list[dict]:
        """Per class: class_id, label, score, map (height, width) in [0, 1], seen (height, width) bool.

        Args:
            picture: RGB, upright.
            wanted: class ids; None: the `top_k` most likely classes, as far as the graph gives their maps.
        """
        wrong = [class_id for class_id in wanted or [] if not 0 <= class_id < len(self.facts["labels"])]
        if wrong:
            raise ValueError(f"class ids must lie in 0..{len(self.facts['labels']) - 1}, got {wrong}")
        values = np.repeat(self.prepare(picture), self.facts["batch"] or 1, axis=0)
        inputs = {"pixel_values": values}
        if self.facts["classes"] == "given":
            if wanted is None:  # the graph has to be told: ask for the scores first
                none = np.zeros((len(values), 1), np.int64)
                scores = self.session.run(["scores"], {**inputs, "class_ids": none})[0]
                wanted = np.argsort(-scores[0])[:top_k].tolist()
            inputs["class_ids"] = np.repeat(np.array([wanted], np.int64), len(values), axis=0)
        names = [output.name for output in self.session.get_outputs()]
        out = {name: value[0] for name, value in zip(names, self.session.run(names, inputs), strict=True)}
        if "class_ids" in out:
            available = out["class_ids"].tolist()
        else:
            available = wanted if self.facts["classes"] == "given" else list(range(len(out["scores"])))
        chosen = wanted if wanted is not None else sorted(available, key=lambda k: -out["scores"][k])[:top_k]
        if missing := set(chosen) - set(available):
            raise ValueError(
                f"this graph gives the maps of the classes {available} alone, not of {sorted(missing)}; "
                "export it with --classes given or all"
            )
        explanations = []
        for class_id in chosen:
            placed, seen = self.place(out["maps"][available.index(class_id)], picture.size)
            label, score = self.facts["labels"][class_id], float(out["scores"][class_id])
            explanations.append({"class_id": class_id, "label": label, "score": score, "map": placed, "seen": seen})
        return explanations

    def place(self, grid: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """A map (h, w) of the graph at the picture's (width, height); 0 and not seen where the crop cut it away."""
        input_h, input_w = self.recipe["crop"] or self.resized(size)[::-1]
        resized_w, resized_h = self.resized(size)
        seen_x, left, right, part_x = _axis(size[0], resized_w, input_w, grid.shape[1])
        seen_y, above, below, part_y = _axis(size[1], resized_h, input_h, grid.shape[0])
        rows = grid[above] * (1 - part_y[:, None]) + grid[below] * part_y[:, None]
        placed = rows[:, left] * (1 - part_x) + rows[:, right] * part_x
        seen = seen_y[:, None] & seen_x
        return (placed * seen).clip(0, 1).astype(np.float32), seen


def _axis(length: int, resized: int, cropped: int, cells: int) -> tuple[np.ndarray, ...]:
    """Along one axis: is a pixel of the picture in the crop; the map's cells before and after it; how far between."""
    inside = (np.arange(length) + 0.5) * resized / length - (resized - cropped) // 2  # in pixels of the crop
    at = np.clip(inside * cells / cropped - 0.5, 0, cells - 1)
    before = at.astype(int)
    return (inside >= 0) & (inside <= cropped), before, np.minimum(before + 1, cells - 1), at - before


def open_picture(source: str | Path | io.BytesIO) -> Image.Image:
    """RGB, upright after its EXIF rotation; ValueError says what is wrong with it."""
    try:
        with Image.open(source, formats=FORMATS) as picture:
            width, height = picture.size
            if min(width, height) < 1 or width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels; between 1 and {MAX_PIXELS} are accepted")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise ValueError(f"{width} x {height}: one side is over {MAX_ASPECT} times the other")
            upright = ImageOps.exif_transpose(picture)
            if upright.mode.startswith("I") or upright.mode == "F":  # Pillow's own conversion clips 16 bits
                values = np.asarray(upright, dtype=np.float64)
                if upright.mode == "F" and values.max() <= 1:
                    values = values * 65535
                if not (values.min() >= 0 and values.max() <= 65535):
                    raise ValueError(f"values of mode {upright.mode} must lie in 0..65535, or in 0..1 as floats")
                upright = Image.fromarray(np.rint(values / 257).astype(np.uint8))
            return upright.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"the picture cannot be read: it is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        raise ValueError(f"the picture cannot be read: {error}") from error


def overlay(picture: Image.Image, explanation: dict, strength: float = 0.55) -> Image.Image:
    """The map in colours over the picture; what the classifier never saw is grey."""
    position = explanation["map"] * (len(COLOURS) - 1)
    channels = [np.interp(position, np.arange(len(COLOURS)), COLOURS[:, channel]) for channel in range(3)]
    photo = np.asarray(picture, dtype=np.float32)
    blend = (1 - strength) * photo + strength * np.stack(channels, axis=-1)
    grey = photo.mean(axis=-1, keepdims=True) * 0.5 + 64
    return Image.fromarray(np.rint(np.where(explanation["seen"][..., None], blend, grey)).astype(np.uint8))


def handler(explainer: Explainer, top_k: int) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"error": "POST a picture: curl --data-binary @photo.jpg ADDRESS"}, 405)

        def do_POST(self) -> None:
            try:
                length = int(self.headers.get("Content-Length") or 0)
                if not 0 < length <= MAX_BYTES:
                    raise ValueError(f"send a picture of 1 to {MAX_BYTES} bytes, got {length}")
                picture = open_picture(io.BytesIO(self.rfile.read(length)))
                answer, status = [], 200
                for explanation in explainer.explain(picture, top_k=top_k):
                    png = io.BytesIO()
                    overlay(picture, explanation).save(png, "png")
                    facts = {key: explanation[key] for key in ("class_id", "label", "score")}
                    answer.append({**facts, "overlay_png": base64.b64encode(png.getvalue()).decode()})
            except ValueError as error:
                answer, status = {"error": str(error)}, 400
            self.answer(answer, status)

        def answer(self, answer: list | dict, status: int) -> None:
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pictures", type=Path, nargs="*")
    parser.add_argument("--class", dest="wanted", type=int, action="append", help="class id; repeat for several")
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--port", type=int, help="serve on 127.0.0.1 instead")
    arguments = parser.parse_args()
    try:
        explainer = Explainer(arguments.model)
        if not arguments.wanted and (fewer := explainer.fewer(arguments.top_k)):
            print(f"serve_onnx: {fewer}", file=sys.stderr)
        if arguments.port is not None:
            try:
                server = ThreadingHTTPServer(("127.0.0.1", arguments.port), handler(explainer, arguments.top_k))
            except OSError as error:
                raise OSError(f"port {arguments.port} cannot be had ({error.strerror}); give another") from error
            print(f"POST a picture to http://127.0.0.1:{server.server_address[1]}", flush=True)
            server.serve_forever()
        arguments.out.mkdir(parents=True, exist_ok=True)
        for path in arguments.pictures:
            picture = open_picture(path)
            for explanation in explainer.explain(picture, arguments.wanted, arguments.top_k):
                target = arguments.out / f"{path.stem}_{explanation['class_id']}.png"
                overlay(picture, explanation).save(target)
                print(f"{explanation['score']:6.1%}  {explanation['label']}  -> {target}")
    except (ValueError, OSError) as error:
        sys.exit(f"serve_onnx: {error}")
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
