"""The exported graph under onnxruntime beside the same explainer under PyTorch, on the CPU.

    python benchmarks/export.py --int8 --web --pictures IMAGENETTE --calibration IMAGENETTE --output export.json

Per backbone: the largest differences on real photographs, the size of the file, and the time of one explanation
(scores of all classes and the map of the predicted class, at map size) for the same batch of photographs:

- pytorch: the model as it is loaded. pytorch channels_last: model and input in that memory format.
- onnxruntime: the exported file, CPU provider, as many threads as torch. With --int8 also the quantised file.

After the warm-up every round runs each variant once, in an order that changes from round to round. The ratios are
medians over the rounds of the ratios within a round: a load that comes and goes falls on all alike. Above 1
onnxruntime is the faster one.

MODELS: "efficientnet-lite0" (the shipped explainer), a folder with a classifier (an untrained head is put on it), or
with random weights "transformers:vit", "transformers:swin", "transformers:convnext" (the library's default
configurations: ViT-B/16, Swin-T, ConvNeXt-T) and timm architectures. A folder has no default: DINOv2-S and others with
trained weights are measured by naming theirs, `--models path/to/dinov2-small efficientnet-lite0`.

--pictures are photographs to check on, where int8 is judged too; --calibration those that int8 is calibrated on. Each
is a folder of pictures, or of parquet files, of which the validation and the train part are read. By default both are
the three photographs of the package, too few to judge int8.

--web builds the static Space with the EfficientNet-Lite0 graph and measures in headless Chromium, with one thread and
with several (where the page is cross-origin isolated): the graph alone, and all from the pixels of the picture to five
maps at the picture's size.

Prints a line per model to stderr and ends in one JSON line on stdout; --output also writes it to a file.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
import torch

import hf_ttame
from hf_ttame import TTameModel
from hf_ttame.answers import probabilities
from hf_ttame.export import export_onnx
from hf_ttame.image_processing import load_image, preprocess

ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = ROOT / "hf_ttame" / "assets" / "photographs"
MODELS = (
    "efficientnet-lite0",
    "resnet50",
    "vit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "transformers:vit",
    "transformers:swin",
    "transformers:convnext",
)
WARM_UP_ROUNDS = 3


def build(name: str) -> TTameModel:
    """The explainer that a name of MODELS stands for."""
    torch.manual_seed(0)
    if name == "efficientnet-lite0":
        from hf_ttame.demo import load_explainer

        return load_explainer()
    if name.startswith("transformers:"):
        import transformers

        family = {"vit": "ViT", "swin": "Swin", "convnext": "ConvNext"}[name.split(":")[1]]
        config = getattr(transformers, f"{family}Config")(num_labels=1000)
        processor = transformers.ViTImageProcessor(size={"height": 224, "width": 224})
        backbone = getattr(transformers, f"{family}ForImageClassification")(config).eval()
        return TTameModel.from_backbone(backbone, processor=processor)
    return TTameModel.from_backbone(name, pretrained=Path(name).is_dir())


def photographs(source: Path, split: str, limit: int) -> list[Any]:
    """Up to `limit` pictures of a folder of pictures, or of the split of a folder of parquet files, spread evenly."""
    cells: list[Any] = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not cells:
        from hf_ttame.pictures import decode, image_column, open_stream, undecoded

        dataset = open_stream(str(source), split=split)
        column = image_column(dataset)
        rows = [row[column] for row in undecoded(dataset, column)]
        return [decode(row) for row in rows[:: max(1, len(rows) // limit)][:limit]]
    return cells[:: max(1, len(cells) // limit)][:limit]


def run_pytorch(model: TTameModel, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (B, K) and maps (B, 1, h, w)."""
    output = model(pixel_values)
    assert output.logits is not None
    assert output.map_logits is not None
    return probabilities(output.logits, model.config.classifier_outputs), model.scale_maps(output.map_logits)


def run_onnx(path: Path, pixel_values: torch.Tensor) -> Callable[[], Any]:
    """A call that gives scores and maps of these pixels."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return partial(session.run, ["scores", "maps"], {"pixel_values": pixel_values.numpy()})


def interleave(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds per variant and round."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    orders = itertools.cycle(itertools.permutations(variants))
    for number in range(-WARM_UP_ROUNDS, rounds):
        for name in next(orders):
            begin = time.perf_counter()
            variants[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


@torch.no_grad()
def measure(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Export, sizes, differences, times of one model."""
    model = build(name)
    check = photographs(arguments.pictures, "validation", arguments.limit)
    begin = time.perf_counter()
    report = export_onnx(model, folder / "exact.onnx", check=check)
    figures: dict[str, Any] = {
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "export_seconds": round(time.perf_counter() - begin, 1),
        "float32_mb": report.megabytes,
        "pictures": report.pictures,
        "largest_differences": report.differences,
        "maps": report.maps,
    }
    chosen = [load_image(check[n % len(check)]) for n in range(arguments.batch)]
    pixel_values = preprocess(model.image_processor, chosen)
    variants: dict[str, Callable[[], Any]] = {"onnxruntime": run_onnx(report.path, pixel_values)}
    if arguments.int8:
        calibration = photographs(arguments.calibration, "train", arguments.limit)
        small = export_onnx(model, folder / "int8.onnx", check=check, int8=True, calibration=calibration)
        figures |= {"int8_mb": small.megabytes, "int8_agreement": small.agreement}
        variants["int8"] = run_onnx(small.path, pixel_values)
    last = build(name).to(memory_format=torch.channels_last)
    variants["pytorch"] = partial(run_pytorch, model, pixel_values)
    variants["pytorch_channels_last"] = partial(
        run_pytorch, last, pixel_values.contiguous(memory_format=torch.channels_last)
    )
    seconds = interleave(variants, arguments.rounds)
    for variant, times in seconds.items():
        figures[f"{variant}_ms"] = round(1000 * statistics.median(times), 2)
    for other in [variant for variant in seconds if variant != "onnxruntime"]:
        pairs = zip(seconds[other], seconds["onnxruntime"], strict=True)
        figures[f"{other}_over_onnxruntime"] = round(statistics.median(a / b for a, b in pairs), 3)
    return figures


def serve(folder: Path, isolated: bool) -> tuple[ThreadingHTTPServer, str]:
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def end_headers(self) -> None:
            if isolated:
                self.send_header("Cross-Origin-Opener-Policy", "same-origin")
                self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            super().end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}/"


_IN_THE_PAGE = """async (rounds) => {
  const { explain, load, place } = await import("./explainer.js");
  const began = performance.now();
  const model = await load();
  const loaded = performance.now() - began;
  const bitmap = await createImageBitmap(await (await fetch("photographs/cat.jpg")).blob());
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const image = context.getImageData(0, 0, bitmap.width, bitmap.height);
  const graph = [], whole = [];
  for (let round = -3; round < rounds; round++) {
    const begin = performance.now();
    const { classes, mapSize, milliseconds } = await explain(model, image);
    for (const { map } of classes) place(map, mapSize, image.width, image.height, model.facts.preprocessing);
    if (round >= 0) { graph.push(milliseconds); whole.push(performance.now() - begin); }
  }
  return { isolated: crossOriginIsolated, loaded, graph, whole };
}"""


def measure_web(rounds: int, folder: Path) -> dict[str, Any]:
    """Milliseconds in headless Chromium, with one thread and with several."""
    from playwright.sync_api import sync_playwright

    build_script = ROOT / "spaces" / "ttame-web" / "build.py"
    subprocess.run([sys.executable, str(build_script), str(folder)], check=True, stdout=sys.stderr)
    figures: dict[str, Any] = {"cores": os.cpu_count(), "rounds": rounds}
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        figures["browser"] = f"Chromium {browser.version}"
        for isolated in (False, True):
            server, address = serve(folder, isolated)
            page = browser.new_page()
            page.goto(address)
            found = page.evaluate(_IN_THE_PAGE, rounds)
            page.close()
            server.shutdown()
            assert found["isolated"] == isolated
            figures["several_threads" if isolated else "one_thread"] = {
                "load_ms": round(found["loaded"]),
                "graph_ms": round(statistics.median(found["graph"]), 1),
                "pixels_to_five_maps_ms": round(statistics.median(found["whole"]), 1),
            }
        browser.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=30, help="measured rounds")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--web", action="store_true", help="also in Chromium; needs playwright, npm and Chromium")
    parser.add_argument("--pictures", type=Path, default=PHOTOGRAPHS)
    parser.add_argument("--calibration", type=Path, default=PHOTOGRAPHS)
    parser.add_argument("--limit", type=int, default=200, help="pictures of each")
    parser.add_argument("--output", type=Path, help="file for the JSON line")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.batch, arguments.limit) < 1:
        parser.error("--rounds, --batch and --limit must be at least 1")

    summary: dict[str, Any] = {
        "benchmark": "export",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "versions": {"python": platform.python_version(), "hf-ttame": hf_ttame.__version__}
        | {package: version(package) for package in ("torch", "onnxruntime", "onnx", "timm", "transformers")},
        "models": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            figures = measure(name, arguments, Path(folder))
            label = Path(name).name
            summary["models"][label] = figures
            worst = max(value or 0 for value in figures["largest_differences"].values())
            line = (
                f"{label}, batch {arguments.batch}: {figures['float32_mb']} MB, largest difference "
                f"{worst:.1e}, onnxruntime {figures['onnxruntime_ms']:.1f} ms, "
                f"pytorch / onnxruntime {figures['pytorch_over_onnxruntime']:.2f}, "
                f"channels_last {figures['pytorch_channels_last_over_onnxruntime']:.2f}"
            )
            if arguments.int8:
                line += f"; int8 {figures['int8_mb']} MB, {figures['int8_agreement']}"
            print(line, file=sys.stderr, flush=True)
        if arguments.web:
            summary["web"] = measure_web(arguments.rounds, Path(folder, "web"))
            print(f"web: {summary['web']}", file=sys.stderr, flush=True)
    text = json.dumps(summary)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
