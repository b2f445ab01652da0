"""Sources of pictures and what becomes of one picture."""

import io
import tarfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_ttame.image_processing import Normalisation
from hf_ttame.pictures import decode, image_column, open_stream, undecoded
from training.data import augment, filter_of, normaliser


def picture(seed: int) -> Image.Image:
    """One colour per seed, so that a picture is known again."""
    return Image.new("RGB", (20, 16), (seed, 255 - seed, 7 * seed % 256))


def seeds(dataset: datasets.IterableDataset, column: str) -> list[int]:
    return [decode(row[column]).getpixel((0, 0))[0] for row in undecoded(dataset, column)]


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def twelve() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"image": [picture(seed) for seed in range(12)], "label": list(range(12))})


@pytest.mark.parametrize("streaming", [True, False])
def test_parquet_files_and_folders(
    twelve: datasets.Dataset, tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    for split, rows in (("train", range(8)), ("validation", range(8, 12))):
        twelve.select(rows).to_parquet(str(folder / f"{split}-0.parquet"))
    for name, split, expected in (
        (folder, "train", range(8)),
        (folder, "validation", range(8, 12)),
        (folder / "train-0.parquet", "train", range(8)),
    ):
        dataset = open_stream(str(name), split, streaming=streaming)
        assert image_column(dataset) == "image"
        assert sorted(seeds(dataset, "image")) == list(expected)
    with pytest.raises(ValueError, match="no split 'test'; its files: train-0"):
        open_stream(str(folder), "test")


def test_row_groups_become_shards(twelve: datasets.Dataset, tmp_path: Path) -> None:
    twelve.to_parquet(str(tmp_path / "train.parquet"), batch_size=3)
    dataset = open_stream(str(tmp_path))
    if not hasattr(dataset, "reshard"):
        pytest.skip("this version of datasets keeps a file whole")
    assert dataset.num_shards == 4
    assert sorted(seeds(dataset, "image")) == list(range(12))


def test_webdataset_tar(tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as tar:
            for seed in range(4):
                for suffix, data in (("png", encoded(4 * shard + seed)), ("cls", b"3")):
                    entry = tarfile.TarInfo(f"{shard}_{seed}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    dataset = open_stream(str(tmp_path))
    assert dataset.num_shards == 2
    assert image_column(dataset) == "png"
    assert sorted(seeds(dataset, "png")) == list(range(8))


def test_picture_folders_with_and_without_splits(tmp_path: Path) -> None:
    for split, rows in (("train", range(5)), ("validation", range(5, 7))):
        for seed in rows:
            folder = tmp_path / split / f"class {seed % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            picture(seed).save(folder / f"{seed}.png")
    assert sorted(seeds(open_stream(str(tmp_path)), "image")) == list(range(5))
    assert sorted(seeds(open_stream(str(tmp_path), "validation"), "image")) == [5, 6]
    assert sorted(seeds(open_stream(str(tmp_path / "validation")), "image")) == [5, 6]
    with pytest.raises(ValueError, match="no folder 'test'; it has: train, validation"):
        open_stream(str(tmp_path), "test")
    (tmp_path / "train").rename(tmp_path / "test")
    with pytest.raises(ValueError, match="no folder 'train'; it has: test, validation"):
        open_stream(str(tmp_path))  # training on everything would read what it is validated on


def test_datasets_saved_to_disk(twelve: datasets.Dataset, tmp_path: Path) -> None:
    twelve.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=twelve.select(range(4))).save_to_disk(tmp_path / "splits")
    assert sorted(seeds(open_stream(str(tmp_path / "one")), "image")) == list(range(12))
    assert sorted(seeds(open_stream(str(tmp_path / "splits")), "image")) == list(range(4))
    with pytest.raises(ValueError, match="no split 'test'; it has: train"):
        open_stream(str(tmp_path / "splits"), "test")


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither \.parquet or \.tar files nor pictures"):
        open_stream(str(tmp_path))
    with pytest.raises(ValueError, match="neither a folder nor a dataset"):
        open_stream("nobody/nothing-of-the-kind")
    (tmp_path / "notes.txt").write_text("no pictures")
    with pytest.raises(ValueError, match="give one of these or a folder"):
        open_stream(str(tmp_path / "notes.txt"))


def test_image_column_is_found_or_named(twelve: datasets.Dataset) -> None:
    dataset = twelve.to_iterable_dataset()
    assert image_column(dataset) == "image"
    assert image_column(dataset, "image") == "image"
    with pytest.raises(ValueError, match="the column 'label' holds int64, not pictures; the columns: image, label"):
        image_column(dataset, "label")
    assert image_column(datasets.Dataset.from_dict({"img": ["a.png"], "b": [1]}).to_iterable_dataset()) == "img"
    with pytest.raises(ValueError, match="its columns: image, label"):
        image_column(dataset, "photo")
    with pytest.raises(ValueError, match="no image column"):
        image_column(datasets.Dataset.from_dict({"a": [1]}).to_iterable_dataset())


def test_decode_takes_every_kind_of_cell(tmp_path: Path) -> None:
    picture(9).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    cells = (encoded(9), {"bytes": encoded(9), "path": None}, {"bytes": None, "path": path}, path, picture(9))
    for cell in cells:
        assert decode(cell).getpixel((3, 3)) == (9, 246, 63)
    nothing = (
        {"bytes": b"no picture", "path": None},
        encoded(9)[:60],
        str(tmp_path / "absent.png"),
        None,
        3,
        {"a": 1},
    )
    for cell in nothing:
        with pytest.raises(ValueError, match=r"cannot be read|empty|holds no picture"):
            decode(cell)


def test_large_photographs_are_decoded_small_but_upright() -> None:
    image = Image.effect_noise((1600, 1200), 40).convert("RGB")
    exif = image.getexif()
    exif[0x0112] = 6  # stored on its side
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert decode(buffer.getvalue()).size == (1200, 1600)
    small = decode(buffer.getvalue(), 256)
    assert small.size == (300, 400)


def test_augment_crops_and_flips() -> None:
    ramp = np.tile(np.linspace(0, 255, 256, dtype=np.uint8)[None, :, None], (256, 1, 3))
    flipped = 0
    starts = set()
    for seed in range(20):
        view = augment(Image.fromarray(ramp), (224, 224), np.random.default_rng(seed))
        assert view.shape == (224, 224, 3)
        assert view.dtype == torch.uint8
        row = view[0, :, 0].int()
        flipped += int(row[0] > row[-1])
        assert int(row.max() - row.min()) == pytest.approx(223, abs=3)  # 224 of the 256 columns, unscaled
        starts.add(int(row.min()))
    assert 4 <= flipped <= 16
    assert len(starts) > 8


def test_the_filter_is_the_processors() -> None:
    for given, expected in (
        (0, "NEAREST"),
        (2, "BILINEAR"),
        (None, "BICUBIC"),
        ("bilinear", "BICUBIC"),
        (77, "BICUBIC"),
    ):
        assert filter_of(SimpleNamespace(resample=given)) == Image.Resampling[expected]
    assert filter_of(SimpleNamespace()) == Image.Resampling.BICUBIC


@pytest.mark.parametrize("min_scale", [1.0, 0.5])
def test_views_are_resized_with_the_filter_that_was_asked_for(min_scale: float) -> None:
    image = Image.fromarray(np.random.default_rng(0).choice([0, 255], (40, 40, 3)).astype(np.uint8))
    nearest = augment(image, (32, 32), np.random.default_rng(1), min_scale, Image.Resampling.NEAREST)
    assert set(nearest.unique().tolist()) == {0, 255}
    assert len(augment(image, (32, 32), np.random.default_rng(1), min_scale).unique()) > 100


def test_the_crop_follows_the_input_size() -> None:
    """256 to 224 as the paper, and 8/7 of any other input: 7/8 of the short side is seen."""
    ramp = np.tile(np.linspace(0, 255, 512, dtype=np.uint8)[None, :, None], (512, 1, 3))
    for side in (96, 384):
        row = augment(Image.fromarray(ramp), (side, side), np.random.default_rng(1))[0, :, 0].int()
        assert int(row.max() - row.min()) == pytest.approx(255 * 7 / 8, abs=5)


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (300, 5), (33, 31)])
@pytest.mark.parametrize("min_scale", [1.0, 0.3])
def test_augment_takes_any_size(size: tuple[int, int], min_scale: float) -> None:
    view = augment(Image.new("RGB", size, "white"), (32, 48), np.random.default_rng(0), min_scale)
    assert view.shape == (32, 48, 3)
    assert (view == 255).all()


def test_normaliser_is_the_processors_arithmetic() -> None:
    normalise = normaliser(Normalisation((2.0, 3.0, 4.0), (-1.0, 0.5, 0.0), (2, 2)), "cpu")
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).expand(1, 2, 2, 3)
    values = normalise(pixels)
    assert values.shape == (1, 3, 2, 2)
    assert values[0, :, 0, 0].tolist() == pytest.approx([-1.0, 3.5, 0.8])
    assert normalise(torch.zeros(2, 8, 8, 3, dtype=torch.uint8)).is_contiguous(memory_format=torch.channels_last)
