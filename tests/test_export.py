"""The exported graph: equal to PyTorch, complete in itself, and refused in words where it cannot be."""

import copy
import importlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, make_vit, randomised, vit_processor
from PIL import Image
from torch import nn
from transformers import (
    BitImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    LevitImageProcessor,
    SwinConfig,
    SwinForImageClassification,
    ViTImageProcessor,
)

from hf_ttame import TTameModel
from hf_ttame.export_facts import FORMAT, describe_preprocessing
from hf_ttame.image_processing import load_image, measure_normalisation

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from hf_ttame.export import ExplainerGraph, export_onnx  # noqa: E402
from hf_ttame.export_int8 import agree  # noqa: E402

ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = sorted((ROOT / "hf_ttame" / "assets" / "photographs").glob("*.jpg"))
SERVE = ROOT / "examples" / "serve_onnx.py"


def tiny_swin() -> nn.Module:
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4, num_labels=CLASSES
    )
    return randomised(SwinForImageClassification(config))


def explainer(backbone: nn.Module) -> TTameModel:
    torch.manual_seed(0)
    timm = hasattr(backbone, "pretrained_cfg")
    return TTameModel.from_backbone(backbone, **({} if timm else {"processor": vit_processor()}))


@pytest.fixture(scope="module")
def cnn(hf_resnet: nn.Module) -> TTameModel:
    return explainer(hf_resnet)


def noise(model: TTameModel, batch: int) -> torch.Tensor:
    size = (batch, 3, *model.config.image_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize(("which", "classes"), [("cnn", "all"), ("vit", "given"), ("swin", "predicted")])
@torch.no_grad()
def test_graph_equals_pytorch_at_any_batch(which: str, classes: str, cnn: TTameModel, tmp_path: Path) -> None:
    model = {"cnn": lambda: cnn, "vit": lambda: explainer(make_vit()), "swin": lambda: explainer(tiny_swin())}[which]()
    report = export_onnx(model, tmp_path / "new" / "tiny.onnx", classes=classes)
    assert report.pictures == len(PHOTOGRAPHS)
    assert max(report.differences.values()) < 1e-4
    assert report.maps["compared"] > 0
    assert report.maps["left_out"] == 0
    assert sorted(path.name for path in report.path.parent.iterdir()) == ["tiny.json", "tiny.onnx"]
    session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    assert ("class_ids" in names) == (classes == "predicted")
    for batch, count in ((1, 1), (5, 3)):
        pixel_values = noise(model, batch)
        ids = torch.arange(batch * count).reshape(batch, count) % CLASSES
        wanted = {"all": "all", "given": ids, "predicted": None}[classes]
        expected = model(pixel_values, class_ids=wanted)
        inputs = {"pixel_values": pixel_values.numpy()} | ({"class_ids": ids.numpy()} if classes == "given" else {})
        got = dict(zip(names, session.run(names, inputs), strict=True))
        np.testing.assert_allclose(got["logits"], expected.logits, atol=1e-4)
        np.testing.assert_allclose(got["scores"], expected.logits.softmax(1), atol=1e-5)
        np.testing.assert_allclose(got["map_logits"], expected.map_logits, atol=1e-4)
        np.testing.assert_allclose(got["maps"], model.scale_maps(expected.map_logits), atol=1e-4)
        if classes == "predicted":
            assert np.array_equal(got["class_ids"], expected.class_ids)


def test_the_file_says_what_a_server_has_to_know(lite_onnx: Path, lite: TTameModel) -> None:
    session = onnxruntime.InferenceSession(str(lite_onnx), providers=["CPUExecutionProvider"])
    facts = json.loads(session.get_modelmeta().custom_metadata_map["ttame"])
    beside = json.loads(lite_onnx.with_suffix(".json").read_text())
    assert beside.items() >= facts.items()
    assert beside["check"]["pictures"] == len(PHOTOGRAPHS)
    assert max(beside["check"]["largest_differences"].values()) < 1e-4
    assert facts["labels"] == [lite.config.id2label[k] for k in range(1000)]
    assert facts["preprocessing"] == {
        **{"mode": "RGB", "resize": {"shortest_edge": 256}, "resample": "bicubic", "crop": [224, 224]},
        **{"mean": [0.5] * 3, "std": [0.5] * 3, "largest_pixel_difference": 0.0},
    }
    assert (facts["classes"], facts["batch"], facts["map_size"]) == ("top5", None, [28, 28])
    assert "apache-2.0" in facts["licence"]


def test_served_without_torch_it_gives_what_explain_gives(lite_onnx: Path, lite: TTameModel, tmp_path: Path) -> None:
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.open(PHOTOGRAPHS[0]).save(turned, quality=95, exif=exif)
    pictures = [*PHOTOGRAPHS, turned]
    code = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'transformers', 'timm', 'hf_ttame'): sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(SERVE.parent)!r})\n"
        "import numpy as np, serve_onnx\n"
        "model, target, *pictures = sys.argv[1:]\n"
        "explainer = serve_onnx.Explainer(model)\n"
        "for n, path in enumerate(pictures):\n"
        "    picture = serve_onnx.open_picture(path)\n"
        "    found = explainer.explain(picture, top_k=2)\n"
        "    maps = {f'{e[\"class_id\"]}': e['map'] for e in found}\n"
        "    np.savez(f'{target}/{n}.npz', seen=found[0]['seen'], pixels=explainer.prepare(picture), **maps)\n"
        "    serve_onnx.overlay(picture, found[0]).save(f'{target}/{n}.png')\n"
    )
    command = [sys.executable, "-c", code, str(lite_onnx), str(tmp_path), *map(str, pictures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for n, path in enumerate(pictures):
        saved = np.load(tmp_path / f"{n}.npz")
        first, second = lite.explain(path, top_k=2)
        assert {str(first.class_id), str(second.class_id)} == set(saved.files) - {"seen", "pixels"}
        np.testing.assert_array_equal(saved["seen"], first.seen)
        pixels = lite.image_processor(images=first.image, return_tensors="pt")["pixel_values"]
        np.testing.assert_allclose(saved["pixels"], pixels, atol=1e-6)
        # explain() measures where the crop lies, the example computes it: up to a hundredth of a pixel apart.
        for explanation in (first, second):
            np.testing.assert_allclose(saved[str(explanation.class_id)], explanation.map, atol=3e-3)
        overlay = np.asarray(Image.open(tmp_path / f"{n}.png")).astype(int)
        assert overlay.shape[:2] == first.map.shape


def test_the_example_serves_over_http(lite_onnx: Path) -> None:
    import http.client

    command = [sys.executable, str(SERVE), str(lite_onnx), "--port", "0", "--top-k", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().rsplit(":", 1)[1])
            answers = []
            for body in (PHOTOGRAPHS[1].read_bytes(), b"no picture", b""):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                connection.request("POST", "/", body)
                response = connection.getresponse()
                answers.append((response.status, json.loads(response.read())))
                connection.close()
        finally:
            server.terminate()
    (status, found), broken, empty = answers
    assert status == 200
    assert len(found) == 2
    assert found[0]["label"] == "espresso"
    assert broken[0] == 400
    assert "cannot be read" in broken[1]["error"]
    assert empty[0] == 400


def test_a_failed_check_leaves_nothing(cnn: TTameModel, tmp_path: Path) -> None:
    off = cnn.head.register_forward_hook(lambda _, __, map_logits: map_logits + 3e-3)  # the graph has a copy without
    try:
        with pytest.raises(ValueError, match=r"map_logits differ from PyTorch's by 0.003, above the tolerance"):
            export_onnx(cnn, tmp_path / "x.onnx")
    finally:
        off.remove()
    assert list(tmp_path.iterdir()) == []


def test_int8_says_how_far_it_agrees(cnn: TTameModel, photo: Callable[..., Image.Image], tmp_path: Path) -> None:
    small = export_onnx(
        cnn,
        tmp_path / "small.onnx",
        classes="all",
        int8=True,
        check=[photo(seed=n) for n in range(12)],
        calibration=[photo(seed=100 + n) for n in range(8)],
    )
    assert small.path.read_bytes().count(b"QuantizeLinear") > 0
    agreement = small.agreement
    assert agreement is not None
    assert (agreement["images"], agreement["maps"]) == (12, 12 * CLASSES)
    assert 0.5 < agreement["map_correlation"] < 1
    assert 0 < agreement["largest_score_difference"] < 1
    metadata = onnxruntime.InferenceSession(str(small.path)).get_modelmeta().custom_metadata_map
    assert "ttame" in metadata


def test_flat_maps_are_counted_and_not_called_equal(cnn: TTameModel, tmp_path: Path) -> None:
    """A sigmoid that is saturated everywhere: float32 does not say what the map is."""
    flat = copy.deepcopy(cnn)
    with torch.no_grad():
        flat.head.fuser.bias.add_(40)
    report = export_onnx(flat, tmp_path / "x.onnx", classes="all")
    count = (1 + len(PHOTOGRAPHS)) * CLASSES  # the first picture runs alone too
    assert report.maps == {"compared": 0, "faint": 0, "left_out": count}
    assert report.differences["maps"] is None
    assert report.differences["map_logits"] is not None
    assert report.differences["map_logits"] < 1e-3
    text = report.facts.read_text()
    assert "NaN" not in text
    assert json.loads(text)["check"]["maps"] == report.maps
    agreement = agree(report.path, report.path, [{"pixel_values": noise(flat, 2)}], 2)
    assert (agreement["map_correlation"], agreement["maps_left_out"]) == (None, 2 * CLASSES)


def test_a_json_file_of_somebody_else_is_not_replaced(cnn: TTameModel, tmp_path: Path) -> None:
    beside = tmp_path / "x.json"
    for content in ('{"mine": 1}', "words", '["format"]'):
        beside.write_text(content)
        with pytest.raises(ValueError, match=r"x.json' would be replaced .* choose another name"):
            export_onnx(cnn, tmp_path / "x.onnx")
        assert beside.read_text() == content
    beside.write_text(json.dumps({"format": FORMAT}))
    export_onnx(cnn, tmp_path / "x.onnx", check=PHOTOGRAPHS[:1])
    assert json.loads(beside.read_text())["labels"]


def test_unreadable_pictures_of_the_check_are_counted(cnn: TTameModel, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    report = export_onnx(cnn, tmp_path / "x.onnx", check=[broken, PHOTOGRAPHS[0]], batch=2)
    assert report.pictures == 1
    assert len(report.skipped) == 1
    assert "broken.jpg" in report.skipped[0]
    (inputs,) = onnxruntime.InferenceSession(str(report.path)).get_inputs()
    assert inputs.shape == [2, 3, 64, 64]
    assert json.loads(report.facts.read_text())["batch"] == 2
    with pytest.raises(ValueError, match="none of the 1 pictures can be read"):
        export_onnx(cnn, tmp_path / "y.onnx", check=[broken])


def test_a_backbone_that_fixes_its_batch(cnn: TTameModel, tmp_path: Path) -> None:
    """The advice is to fix it in the export too, and that works (`test_unreadable_...` has a fixed one)."""
    fix = cnn.backbone.register_forward_pre_hook(lambda _, arguments: range(arguments[0].shape[0]) and None)
    try:
        with pytest.raises(ValueError, match="batch=1, or --batch 1"):
            export_onnx(cnn, tmp_path / "x.onnx")
    finally:
        fix.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"classes": "top99"}, "top1..top7"),
        ({"classes": "best"}, "predicted, given, all"),
        ({"batch": 0}, "at least 1"),
        ({"path": "x.bin"}, "end in .onnx"),
        ({"path": "file/x.onnx"}, "cannot write into"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict, words: str, cnn: TTameModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / arguments.pop("path", "x.onnx")
    with pytest.raises(ValueError, match=words):
        export_onnx(cnn, path, **arguments)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    model = explainer(make_vit())
    with pytest.raises(ValueError, match="float32 weights on the CPU"):
        export_onnx(model.half(), tmp_path / "x.onnx")
    with pytest.raises(ValueError, match="eval mode"):
        export_onnx(model.float().train(), tmp_path / "x.onnx")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, cnn: TTameModel, tmp_path: Path) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hf-ttame\[export\]'"):
        export_onnx(cnn, tmp_path / "x.onnx")


@torch.no_grad()
def test_torch_export_and_compile(cnn: TTameModel, tmp_path: Path) -> None:
    graph = ExplainerGraph(cnn, "given").eval()
    batch = {0: torch.export.Dim("B")}
    shapes = {"pixel_values": batch, "class_ids": {**batch, 1: torch.export.Dim("N")}}
    exported = torch.export.export(graph, tuple(graph.example(noise(cnn, 2)).values()), dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "graph.pt2")
    loaded = torch.export.load(tmp_path / "graph.pt2").module()
    # The tracing is what can break; the eager backend spares the tests a C++ compiler.
    compiled = torch.compile(graph, backend="eager")
    for batch_size in (1, 5):
        inputs = graph.example(noise(cnn, batch_size)).values()
        expected = graph(*inputs)
        torch.testing.assert_close(loaded(*inputs), expected)
        torch.testing.assert_close(compiled(*inputs), expected)
        reference = cnn(*inputs)  # with the head as it is stored
        torch.testing.assert_close(expected[2], reference.map_logits, atol=1e-5, rtol=1e-4)


def test_what_is_no_explainer_is_named(vit_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"this is no explainer: its .* of the kind 'vit'"):
        TTameModel.from_pretrained(vit_folder)


@pytest.mark.parametrize(
    ("processor", "resize", "crop"),
    [
        (vit_processor(), {"height": 64, "width": 64}, None),
        (BitImageProcessor(size={"shortest_edge": 80}, crop_size={"height": 64, "width": 64}), 80, [64, 64]),
        (ConvNextImageProcessor(size={"shortest_edge": 64}), 73, [64, 64]),  # a hidden crop_pct of 0.875
        (LevitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}), 73, [64, 64]),
        (DeiTImageProcessor(size={"height": 72, "width": 72}, crop_size={"height": 64, "width": 64}), 72, [64, 64]),
    ],
)
def test_the_preprocessing_is_what_reproduces_the_processor(processor: Any, resize: Any, crop: Any) -> None:
    measured = measure_normalisation(processor)
    config = SimpleNamespace(pixel_scale=measured.scale, pixel_shift=measured.shift, image_size=measured.size)
    pictures = [load_image(path) for path in PHOTOGRAPHS]
    found = describe_preprocessing(processor, config, pictures)
    assert found is not None
    assert resize in (found["resize"], *found["resize"].values())
    assert found["crop"] == crop
    assert found["largest_pixel_difference"] < 0.03
    np.testing.assert_allclose(found["mean"], processor.image_mean, atol=1e-5)
    np.testing.assert_allclose(found["std"], processor.image_std, atol=1e-5)


def test_a_preprocessing_that_cannot_be_described_is_left_out() -> None:
    class Turning(ViTImageProcessor):
        def __call__(self, images: Any, **arguments: Any) -> Any:
            return super().__call__(images.rotate(90), **arguments)

    config = SimpleNamespace(pixel_scale=(2.0,) * 3, pixel_shift=(-1.0,) * 3, image_size=(64, 64))
    picture = load_image(PHOTOGRAPHS[0])
    for kind, expected in ((ViTImageProcessor, False), (Turning, True)):
        processor = kind(size={"height": 64, "width": 64})
        assert (describe_preprocessing(processor, config, [picture]) is None) == expected


def test_the_example_refuses_other_files_in_words(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_text("no graph")
    done = subprocess.run([sys.executable, str(SERVE), str(tmp_path / "x.onnx")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "serve_onnx: " in done.stderr
    assert "cannot be opened" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_example_decodes_no_dangerous_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A thin line, a huge one, a format drawn by another program, a damaged AVIF: refused in words."""
    monkeypatch.syspath_prepend(SERVE.parent)
    serve_onnx = importlib.import_module("serve_onnx")
    monkeypatch.setattr(serve_onnx, "MAX_PIXELS", 1_000_000)
    files = {}
    for name, size in (("thin", (20_000, 1)), ("huge", (1001, 1000))):
        files[name] = io.BytesIO()
        Image.new("1", size).save(files[name], "PNG")
    files["eps"] = io.BytesIO()
    Image.new("L", (8, 8)).save(files["eps"], "EPS")
    words = {"thin": "over 100 times", "huge": "1001 x 1000 pixels; between", "eps": "none of JPEG, PNG"}
    if "AVIF" in serve_onnx.FORMATS:
        good = io.BytesIO()
        Image.effect_noise((64, 64), 90).save(good, "AVIF")
        content = good.getvalue()
        head = content[: content.index(b"mdat") + 4]
        files["avif"] = io.BytesIO(head.ljust(len(content), b"\xff"))
        words["avif"] = "Failed to decode"  # a RuntimeError of the decoder
    for name, file in files.items():
        with pytest.raises(ValueError, match=f"the picture cannot be read: .*{words[name]}"):
            serve_onnx.open_picture(io.BytesIO(file.getvalue()))
    assert serve_onnx.open_picture(PHOTOGRAPHS[0]).mode == "RGB"
    sixteen = Image.fromarray(np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8))
    sixteen.save(tmp_path / "sixteen.png")
    assert np.array_equal(serve_onnx.open_picture(tmp_path / "sixteen.png"), load_image(tmp_path / "sixteen.png"))


def test_the_example_says_where_a_graph_gives_fewer_maps(
    lite_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, str(SERVE), str(lite_onnx), str(PHOTOGRAPHS[0]), "--top-k", "7", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
    said = "of --top-k 7 this graph gives the first 5; for more export it with --classes top7, given or all"
    assert done.stderr == f"serve_onnx: {said}\n"
    monkeypatch.syspath_prepend(SERVE.parent)
    explainer = importlib.import_module("serve_onnx").Explainer(lite_onnx)
    assert explainer.fewer(5) is None
    for classes, given in (("predicted", 1), ("given", 1000), ("all", 1000)):
        explainer.facts["classes"] = classes
        assert explainer.fewer(given) is None
        assert f"gives the first {given}" in explainer.fewer(given + 1)


def test_the_command(ttame: Callable[..., Any], cnn: TTameModel, tmp_path: Path) -> None:
    cnn.save_pretrained(tmp_path / "cnn")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    arguments = (tmp_path / "cnn", tmp_path / "out.onnx", "--classes", "top2")
    pictures = ("--check", PHOTOGRAPHS[0].parent, "--check", tmp_path / "broken.jpg")
    done = ttame("export", *arguments, *pictures)
    assert done.returncode == 0, done.stderr
    assert "on 3 pictures, largest differences: logits" in done.stdout
    assert "skipped: " in done.stderr
    assert "broken.jpg" in done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["labels"][:2] == ["LABEL_0", "LABEL_1"]
