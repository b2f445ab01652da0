"""`pipeline("image-explanation")` beside `explain`, for every kind of input."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import ViTForImageClassification, pipeline

from hf_ttame import TTameModel
from hf_ttame.pictures import decode
from hf_ttame.pipeline import ImageExplanationPipeline, open_picture


@pytest.fixture(scope="module")
def explainer(vit_folder):
    return TTameModel.from_backbone(vit_folder)


@pytest.fixture(scope="module")
def explain(explainer):
    return pipeline("image-explanation", model=explainer)


@pytest.fixture(scope="module")
def pictures(photo):
    return [photo(90, 70, seed) for seed in range(5)]


def same(entries, expected):
    assert [(e["class_id"], e["label"]) for e in entries] == [(x.class_id, x.label) for x in expected]
    for entry, other in zip(entries, expected, strict=True):
        assert entry["score"] == pytest.approx(other.score, abs=1e-5)
        np.testing.assert_allclose(entry["explanation"].map, other.map, atol=1e-4)
        assert np.abs(np.asarray(entry["map"]) / 255 - other.map).max() < 0.01
        assert entry["map"].mode == "L"
        assert entry["overlay"].mode == "RGB"
        assert entry["map"].size == entry["overlay"].size == other.image.size


def test_one_picture(explain, explainer, pictures):
    assert isinstance(explain, ImageExplanationPipeline)
    same(explain(pictures[0]), explainer.explain(pictures[0]))
    same(explain(pictures[0], top_k=3), explainer.explain(pictures[0], top_k=3))
    same(explain(pictures[0], class_ids=["church", 2]), explainer.explain(pictures[0], class_ids=["church", 2]))


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_list(explain, explainer, pictures, batch_size):
    found = explain(pictures, batch_size=batch_size, top_k=2)
    expected = explainer.explain(pictures, top_k=2)
    assert len(found) == 5
    for row, entries in enumerate(found):
        same(entries, expected[2 * row : 2 * row + 2])


def test_batches_really_are_batches(explain, explainer, pictures, monkeypatch):
    sizes = []
    features = TTameModel.features

    def count(self, pixel_values):
        sizes.append(len(pixel_values))
        return features(self, pixel_values)

    monkeypatch.setattr(TTameModel, "features", count)
    explain(pictures, batch_size=2)
    assert sizes == [2, 2, 1]


def test_generators_are_streamed(explain, pictures):
    taken = []

    def stream():
        for picture in pictures:
            taken.append(picture)
            yield picture

    results = iter(explain(stream(), batch_size=2))
    next(results)
    assert len(taken) == 2
    assert len(list(results)) == 4


class Pictures(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize("kind", ["torch", "datasets", "streamed"])
def test_datasets(explain, explainer, pictures, kind):
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [0] * 5}).cast_column("image", datasets.Image())
    inputs = {"torch": Pictures(pictures), "datasets": rows, "streamed": rows.to_iterable_dataset()}[kind]
    found = list(explain(inputs, batch_size=2))
    assert len(found) == 5
    same(found[4], explainer.explain(pictures[4]))


def test_paths_and_arrays(explain, pictures, tmp_path):
    pictures[0].save(tmp_path / "a.png")
    expected = explain(pictures[0])[0]
    for source in (str(tmp_path / "a.png"), tmp_path / "a.png", np.asarray(pictures[0])):
        assert np.array_equal(explain(source)[0]["explanation"].map, expected["explanation"].map)
    content = (tmp_path / "a.png").read_bytes()
    assert np.array_equal(explain({"image": {"bytes": content, "path": None}})[0]["map"], expected["map"])


def test_nothing(explain):
    assert explain([]) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"no picture", "10 bytes that are no readable picture"),
        ({"text": "x"}, r"needs its picture in one of the columns.*\['text'\]"),
        ("missing.jpg", "'missing.jpg' does not exist"),
        ("http://127.0.0.1:9/x.jpg", "cannot be fetched"),
    ],
)
def test_unreadable(source, message):
    with pytest.raises(ValueError, match=message):
        open_picture(source)


def bomb() -> bytes:
    """A PNG of a few kilobytes that claims 30,000 x 30,000 pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 999))
        + chunk(b"IEND", b"")
    )


def test_decompression_bombs_are_refused_wherever_a_picture_comes_in(explain, explainer, tmp_path):
    (tmp_path / "bomb.png").write_bytes(bomb())
    rows = datasets.Dataset.from_dict({"image": [{"bytes": bomb(), "path": None}]}).cast_column(
        "image", datasets.Image()
    )
    for attempt in (
        lambda: explain(tmp_path / "bomb.png"),
        lambda: explain({"bytes": bomb()}),
        lambda: list(explain(rows)),
        lambda: explainer.explain(tmp_path / "bomb.png"),
        lambda: decode(bomb()),
        lambda: decode(str(tmp_path / "bomb.png"), side=256),
    ):
        with pytest.raises(ValueError, match=r"30000 x 30000 pixels|cannot be read|no readable picture"):
            attempt()


def test_no_way_in_decodes_what_is_over_the_limit(explain, explainer, pictures, tmp_path, monkeypatch):
    """Pillow's own limit lies higher than ours: every way must ask ours, before a pixel is decoded."""
    monkeypatch.setattr("hf_ttame.image_processing.MAX_PIXELS", 90 * 70 - 1)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("a picture was decoded"))
    for kind in ("png", "jpg", "webp", "gif", "bmp", "tiff"):
        path = tmp_path / f"a.{kind}"
        pictures[0].save(path)
        content = path.read_bytes()
        row = {"image": {"bytes": content, "path": None}}
        rows = datasets.Dataset.from_list([row]).cast_column("image", datasets.Image())
        for attempt in (
            lambda: explain(str(path)),  # noqa: B023
            lambda: explain(content),  # noqa: B023
            lambda: explain([Image.open(path)]),  # noqa: B023
            lambda: list(explain(rows)),  # noqa: B023
            lambda: list(explain(rows.to_iterable_dataset())),  # noqa: B023
            lambda: explainer.explain(path),  # noqa: B023
            lambda: decode(row["image"]),  # noqa: B023
            lambda: decode(str(path), side=8),  # noqa: B023
        ):
            with pytest.raises(ValueError, match="has 90 x 70 pixels"):
                attempt()
    for source in (pictures[0].copy(), np.zeros((70, 90, 3), np.uint8), np.zeros((70, 90), np.float32)):
        with pytest.raises(ValueError, match="has 90 x 70 pixels"):
            explain(source)


def test_no_picture_starts_a_program(explain, pictures, tmp_path, monkeypatch):
    pictures[0].save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")  # the content decides, not the name
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: pytest.fail("a program was started"))
    for source in (tmp_path / "a.png", (tmp_path / "a.png").read_bytes()):
        with pytest.raises(ValueError, match="of the format EPS, which is drawn by running another program"):
            explain(source)
    with pytest.raises(ValueError, match="of the format EPS"):
        decode((tmp_path / "a.png").read_bytes())


def test_wrong_use(explain, pictures, hf_vit):
    with pytest.raises(ValueError, match="nearest labels: 'church'"):
        explain(pictures[0], class_ids="churhc")
    with pytest.raises(TypeError, match=r"got \['topk'\]"):
        explain(pictures[0], topk=3)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        explain(pictures, batch_size=-1)
    with pytest.raises(ValueError, match="needs an explainer, got ViTForImageClassification"):
        ImageExplanationPipeline(ViTForImageClassification(hf_vit.config))


def test_from_a_folder_in_the_heads_float32(explainer, pictures, tmp_path):
    explainer.save_pretrained(tmp_path / "half", head_dtype=torch.float16)
    loaded = pipeline("image-explanation", model=str(tmp_path / "half"), top_k=2)
    assert {p.dtype for p in loaded.model.head.parameters()} == {torch.float32}
    assert len(loaded(pictures[0])) == 2
    assert isinstance(loaded(pictures[0])[0]["overlay"], Image.Image)
