"""The stream: every picture once per epoch, whatever the shards; resumed exactly; damaged pictures shift nothing."""

import copy
import io
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from hf_ttame.pictures import DATA_ERRORS, open_stream
from training.identity import is_small
from training.stream import TrainingStream, make_loader

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital'", "ignore:This DataLoader will create")

PICTURES = 53
DAMAGED = (4, 17, 18, 40)


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((10, 10), 50).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    cells = [encoded(seed) if seed not in DAMAGED else b"damaged" for seed in range(PICTURES)]
    return datasets.Dataset.from_dict(
        {"image": [{"bytes": cell, "path": None} for cell in cells]},
        features=datasets.Features(image=datasets.Image(decode=False)),
    )


def make(rows: datasets.Dataset, shards: int, **settings: Any) -> TrainingStream:
    settings = {"window": 7, **settings}
    return TrainingStream(rows.to_iterable_dataset(num_shards=shards), "image", (8, 8), **settings)


def take(stream: TrainingStream, workers: int, batches: int, batch_size: int = 4) -> list[dict[str, Any]]:
    loader = iter(make_loader(stream, batch_size, workers))
    return list(islice(loader, batches))


def pictures(batches: list[dict[str, Any]], epoch: int) -> list[tuple[int, int]]:
    """(shard, row) of the readable pictures of one epoch, in the order in which they came."""
    return [(shard, row) for batch in batches for e, shard, row in batch["pictures"] if e == epoch]


@pytest.mark.parametrize("shards", [1, 2, 5, 7])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_picture_once_per_epoch_and_rank(rows: datasets.Dataset, shards: int, ranks: int) -> None:
    whole = sorted(pictures(take(make(rows, shards), 0, 30), 0))
    assert len(whole) == len(set(whole)) == PICTURES - len(DAMAGED)
    for epoch in (0, 1):
        dealt = [pictures(take(make(rows, shards, rank=rank, ranks=ranks), 0, 50), epoch) for rank in range(ranks)]
        assert sorted(picture for rank in dealt for picture in rank) == whole


@pytest.mark.parametrize(("shards", "slots"), [(5, 3), (11, 8), (2, 7), (1, 4), (6, 3)])
def test_left_over_shards_are_dealt_evenly_and_read_by_few(
    shards: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every shard has 12 * slots pictures: equal shares are possible, and must be found."""
    cells = [{"bytes": encoded(0), "path": None}] * (12 * slots * shards)
    rows = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features(image=datasets.Image(decode=False)))
    read: list[int] = []
    real = TrainingStream._cells
    monkeypatch.setattr(TrainingStream, "_cells", lambda self, shard: read.append(shard) or real(self, shard))
    everything = []
    for slot in range(slots):
        read.clear()
        mine = [(shard, row) for _, shard, row, _ in make(rows, shards)._rows(0, slot, slots, (0, 0))]
        assert len(mine) == 12 * shards
        assert len(read) <= shards // slots + 2
        everything += mine
    assert len(set(everything)) == len(everything) == len(rows)


@pytest.mark.parametrize(("shards", "ranks", "workers"), [(3, 2, 2), (7, 1, 2), (1, 1, 3)])
def test_every_picture_once_per_epoch_with_workers(
    rows: datasets.Dataset, shards: int, ranks: int, workers: int
) -> None:
    whole = sorted(pictures(take(make(rows, shards), 0, 30), 0))
    found = []
    for rank in range(ranks):
        batches = take(make(rows, shards, rank=rank, ranks=ranks), workers, 30)
        found += pictures(batches, 0)
        assert all(len(batch["pictures"]) == 4 for batch in batches), "batches run across the ends of epochs"
    assert sorted(found) == whole


def test_order_and_crops(rows: datasets.Dataset) -> None:
    a, b, c = (take(make(rows, 3, seed=seed), 0, 40) for seed in (1, 1, 2))
    assert all(torch.equal(x["pixels"], y["pixels"]) for x, y in zip(a, b, strict=True))
    assert pictures(a, 0) != pictures(c, 0)
    assert pictures(a, 0) != pictures(a, 1)
    assert sorted(pictures(a, 0)) == sorted(pictures(c, 0))

    def views(batches: list[dict[str, Any]]) -> dict[Any, torch.Tensor]:
        return {name: view for batch in batches for name, view in zip(batch["pictures"], batch["pixels"], strict=True)}

    # A crop belongs to the seed, the epoch and the picture, whoever reads it.
    one, two = views(a), views(take(make(rows, 3, seed=1, rank=1, ranks=2, window=20), 0, 10))
    common = one.keys() & two.keys()
    assert len(common) > 20
    assert all(torch.equal(one[name], two[name]) for name in common)
    assert any(not torch.equal(one[0, *name], one[1, *name]) for name in pictures(a, 1))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shards", [1, 7])
def test_a_resumed_stream_continues_exactly(rows: datasets.Dataset, shards: int, workers: int) -> None:
    loader = make_loader(make(rows, shards, rank=1, ranks=2), 4, workers)
    batches = iter(loader)
    states = []
    seen = []
    for _ in range(26):  # four epochs of this rank, with window and epoch ends in the middle of batches
        states.append(copy.deepcopy(loader.state_dict()))
        seen.append(next(batches))
    for start in (1, 6, 7, 13, 20):
        again = make_loader(make(rows, shards, rank=1, ranks=2), 4, workers)
        again.load_state_dict(states[start])
        for expected, found in zip(seen[start : start + 6], list(islice(again, 6)), strict=True):
            assert found["pictures"] == expected["pictures"]
            assert found["unreadable"] == expected["unreadable"]
            assert torch.equal(found["pixels"], expected["pixels"])


def test_damaged_pictures_are_named_once_per_epoch(rows: datasets.Dataset) -> None:
    readable = PICTURES - len(DAMAGED)
    batches = take(make(rows, 1), 0, readable + 1, batch_size=1)  # one epoch, and the first picture of the next
    named = [name for batch in batches[:readable] for name in batch["unreadable"]]
    assert len(named) == len(set(named))
    # One that comes after the last readable picture of an epoch is named with the first of the next.
    named += batches[-1]["unreadable"]
    assert {int(name.split("row ")[1].split(")")[0]) for name in named} == set(DAMAGED)
    assert all("cannot be read" in name for name in named)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_slot_that_reads_nothing_stops(rows: datasets.Dataset, workers: int) -> None:
    damaged = rows.select([*DAMAGED, *DAMAGED])
    with pytest.raises(ValueError, match=r"^none of the \d pictures read so far can be decoded; the last: [^\n]*\Z"):
        take(make(damaged, 2), workers, 1)
    assert len(take(make(rows.select([*DAMAGED, 0]), 1), workers // 2, 1)) == 1, (
        "how many are too many the run decides"
    )


def test_an_empty_dataset_stops_the_stream(rows: datasets.Dataset, tmp_path: Path) -> None:
    rows.select([]).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(ValueError, match="the dataset is empty"):
        take(TrainingStream(open_stream(str(tmp_path)), "image", (8, 8)), 0, 1)


def test_fewer_pictures_than_slots(rows: datasets.Dataset) -> None:
    batches = take(make(rows.select(range(3)), 1), 0, 5)
    assert all(len(batch["pictures"]) == 4 for batch in batches), "three pictures fill batches of four"
    assert take(make(rows.select(range(1)), 1, rank=1, ranks=2), 0, 5) == []


def test_held_out_pictures_never_train(rows: datasets.Dataset) -> None:
    stream = make(rows, 5, holdout=0.3)
    kept = {cell["bytes"] for cell in stream.held_out(1000)}
    trained = {(shard, row) for epoch in (0, 1) for shard, row in pictures(take(stream, 0, 25), epoch)}
    everything = {(shard, row): cell["bytes"] for shard in range(5) for row, cell in enumerate(stream._cells(shard))}
    assert 5 < len(kept) < 25
    held_out = {place for place in everything if stream._is_held_out(*place)}
    assert kept == {everything[place] for place in held_out}
    assert trained == {place for place in everything if place not in held_out and everything[place] != b"damaged"}
    assert not kept & {everything[place] for place in trained}
    assert len(make(rows, 5, holdout=0.3).held_out(4)) == 4
    assert [c["bytes"] for c in make(rows, 5, holdout=0.3, seed=9).held_out(4)] == [
        c["bytes"] for c in make(rows, 5, holdout=0.3).held_out(4)
    ]


def test_a_link_that_leads_nowhere_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(0))
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere.png")
    assert is_small(str(tmp_path), "train")


def test_held_out_pictures_of_a_dataset_that_is_sorted_by_class() -> None:
    """Ten classes one after the other, each in its shard, or all in one."""
    cells = [{"bytes": bytes([label, row]), "path": None} for label in range(10) for row in range(60)]
    rows = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features(image=datasets.Image(decode=False)))

    def classes(cells: list[Any]) -> list[int]:
        return sorted(cell["bytes"][0] for cell in cells)

    assert classes(make(rows, 10, holdout=0.5).held_out(20)) == sorted([*range(10)] * 2)
    chosen = make(rows, 1, holdout=0.5).held_out(40, whole=True)
    assert len(set(classes(chosen))) >= 8
    assert chosen == make(rows, 1, holdout=0.5, seed=3).held_out(40, whole=True)
    everyone = make(rows, 1, holdout=0.5).held_out(1000, whole=True)
    assert classes(everyone) == classes(make(rows, 1, holdout=0.5).held_out(1000))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_archive_is_an_error_that_the_script_tells_in_one_line(tmp_path: Path, workers: int) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for seed in range(PICTURES):
            member, content = tarfile.TarInfo(f"{seed:03d}.png"), encoded(seed)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    whole = (tmp_path / "train.tar").read_bytes()
    (tmp_path / "train.tar").write_bytes(whole[: 20 * 1024 + 600])  # in the middle of a picture
    stream = TrainingStream(open_stream(str(tmp_path)), "png", (8, 8), window=7)
    with pytest.raises(ValueError if workers else DATA_ERRORS, match="unexpected end of data"):
        take(stream, workers, 50)
