"""The benchmark of training compares two forms of the same step."""

from pathlib import Path

import pytest
import torch

from benchmarks.training import Contestant, make_pictures, measure_best, measure_data, measure_step


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_both_forms_train_alike(name: str) -> None:
    ours, published = (Contestant(name, 4, "cpu", "float32") for _ in range(2))
    for _ in range(3):
        torch.testing.assert_close(ours.step(), published.published(), rtol=1e-4, atol=1e-4)


def test_figures_of_a_step() -> None:
    found = measure_step("test_vit", 2, 1, "cpu", "float32")
    assert (found["batch"], found["rounds"]) == (2, 1)
    assert found["step_over_plain"] == pytest.approx(found["step_ms"] / found["plain_ms"], rel=0.05)
    assert found["published_over_step"] == pytest.approx(found["published_ms"] / found["step_ms"], rel=0.05)
    assert found["step_images_per_second"] == pytest.approx(2000 / found["step_ms"], rel=0.05)


def test_the_fastest_batch_that_fits_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(name: str, batch: int, *_: object) -> dict[str, float]:
        if batch > 8:
            raise torch.OutOfMemoryError
        return {"batch": batch, "step_images_per_second": {2: 10.0, 4: 30.0, 8: 20.0}[batch]}

    monkeypatch.setattr("benchmarks.training.measure_step", measured)
    best = measure_best("x", [2, 4, 8, 16, 32], 1, "cpu", "float32")
    assert best == {"batch": 4, "step_images_per_second": 30.0, "tried": {2: 10.0, 4: 30.0, 8: 20.0}}
    with pytest.raises(torch.OutOfMemoryError):
        measure_best("x", [16], 1, "cpu", "float32")


def test_figures_of_the_data(tmp_path: Path) -> None:
    make_pictures(tmp_path, 4)
    found = measure_data(str(tmp_path), (64, 64), 4, 0, 2)
    assert found["images_per_second"] > 0
    assert found["decode_ms_per_picture"] > found["collate_ms_per_picture"] > 0
