import copy
import functools
import json
import operator
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, LABELS, make_timm, make_vit
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    CLIPImageProcessorPil,
    PreTrainedModel,
    ViTForImageClassification,
)

from hf_ttame import Explanation, TTameConfig, TTameModel, TTameOutput, modeling_ttame
from hf_ttame.image_processing import Normalisation, measure_placement, place_maps, preprocess
from hf_ttame.layer_choice import PooledClassifier
from hf_ttame.modeling_ttame import start_as_classifier
from hf_ttame.saving import fingerprint, values_fingerprint

FORMAT_1 = Path(__file__).parent / "data" / "format_1"  # written by version 0.1.0, with its outputs


def noise(batch: int = 2, size: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def seeded_head(model: TTameModel, seed: int = 3) -> TTameModel:
    """A head without zeros, with statistics of its own, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.head.state_dict().items():
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator) * 0.1
                tensor.copy_(values.abs() + 0.5 if "running_var" in name else values)
    return model.eval()


@pytest.fixture(scope="module")
def cnn(timm_cnn) -> TTameModel:
    """Shared: tests must not change it."""
    return seeded_head(TTameModel.from_backbone(copy.deepcopy(timm_cnn)))


@pytest.fixture(scope="module")
def vit(vit_folder) -> TTameModel:
    """Shared: tests must not change it."""
    return seeded_head(TTameModel.from_backbone(vit_folder))


@pytest.fixture(scope="module")
def dino(dinov2_folder) -> TTameModel:
    """Shared: tests must not change it."""
    return TTameModel.from_backbone(dinov2_folder)


@pytest.fixture
def fresh() -> TTameModel:
    return seeded_head(TTameModel.from_backbone(make_timm("test_resnet")))


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a_state, b_state = a.state_dict(), b.state_dict()
    return a_state.keys() == b_state.keys() and all(torch.equal(a_state[name], b_state[name]) for name in a_state)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- forward ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_ids", "maps"),
    [
        (None, 1),
        (3, 1),
        (torch.tensor(3), 1),
        (torch.tensor([1, 2]), 1),
        ([1, 2], 1),
        (torch.tensor([[1, 2, 2], [0, 6, 3]]), 3),
        (np.array([[1], [2]]), 1),
        ("all", CLASSES),
    ],
)
@pytest.mark.parametrize("which", ["cnn", "vit"])
def test_shapes(which, class_ids, maps, request):
    model = request.getfixturevalue(which)
    out = model(noise(), class_ids)
    assert isinstance(out, TTameOutput)
    assert out.logits.shape == (2, CLASSES)
    assert out.map_logits.shape == (2, maps, *model.config.map_size)
    assert out.class_ids.shape == (2, maps)


def test_class_ids_in_the_output(cnn):
    out = cnn(noise())
    assert torch.equal(out.class_ids[:, 0], out.logits.argmax(dim=1))
    assert cnn(noise(), 3).class_ids.tolist() == [[3], [3]]
    assert cnn(noise(), [1, 2]).class_ids.tolist() == [[1], [2]]
    assert cnn(noise(), "all").class_ids.tolist() == [list(range(CLASSES))] * 2


@pytest.mark.parametrize("which", ["cnn", "vit"])
def test_selected_rows_equal_all_rows(which, request):
    model = request.getfixturevalue(which)
    every = model(noise(), "all").map_logits
    ids = torch.tensor([[5, 0, 5], [2, 6, 1]])
    assert torch.allclose(model(noise(), ids).map_logits, every[torch.arange(2)[:, None], ids], atol=1e-5)
    assert torch.allclose(model(noise(), 4).map_logits, every[:, 4:5], atol=1e-5)
    assert every.std(dim=1).min() > 1e-4


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_every_integer_type_selects_the_same(cnn, dtype):
    ids = torch.tensor([[1, 0, 3], [2, 1, 1]])
    out = cnn(noise(), ids.to(dtype))
    assert out.map_logits.shape == (2, 3, *cnn.config.map_size)
    assert torch.allclose(out.map_logits, cnn(noise(), ids).map_logits)


@pytest.mark.parametrize(
    ("class_ids", "message"),
    [
        (CLASSES, rf"class ids must lie in 0..{CLASSES - 1}"),
        (-1, "class ids must lie in"),
        (torch.tensor([0, CLASSES]), "class ids must lie in"),
        (torch.tensor([0.0, 1.0]), "class_ids must be None, an int, 'all'"),
        (torch.tensor([0, 1, 2]), "class_ids must be None"),
        (torch.zeros(3, 1, dtype=torch.long), "class_ids must be None"),
        (torch.zeros(2, 1, 1, dtype=torch.long), "class_ids must be None"),
        (torch.ones(2, CLASSES, dtype=torch.bool), "class_ids"),
        (torch.zeros(2, 0, dtype=torch.long), "class"),
        ("each", "class_ids must be None"),
    ],
)
def test_bad_class_ids(cnn, class_ids, message):
    with pytest.raises(ValueError, match=message):
        cnn(noise(), class_ids)


@pytest.mark.parametrize("shape", [(2, 1, 64, 64), (2, 3, 64, 65), (2, 3, 32, 32), (3, 64, 64)])
def test_wrong_pixel_values(cnn, shape):
    with pytest.raises(ValueError, match=r"pixel_values must be \(B, 3, 64, 64\), got .*image_processor"):
        cnn(torch.zeros(shape))


def test_logits_are_the_backbones(cnn, vit, timm_cnn, hf_vit):
    assert torch.equal(cnn(noise()).logits, timm_cnn(noise()))
    assert torch.allclose(vit(noise()).logits, hf_vit(noise()).logits, atol=1e-5)


def test_class_token_multiply_gives_other_maps(vit_folder, vit):
    model = TTameModel.from_backbone(vit_folder, class_token="multiply")
    model.head.load_state_dict(vit.head.state_dict())
    assert not torch.allclose(model(noise()).map_logits, vit(noise()).map_logits)


# ---- frozen backbone ----------------------------------------------------------------------------------------------


def test_the_backbone_stays_in_eval_mode_and_frozen(fresh):
    fresh.train()
    assert fresh.head.training
    assert not any(m.training for m in fresh.backbone.modules())
    assert not any(p.requires_grad for p in fresh.backbone.parameters())
    assert all(p.requires_grad for p in fresh.head.parameters())
    fresh.eval()
    assert not fresh.head.training


@pytest.mark.parametrize("make", [lambda: make_timm("test_resnet"), lambda: make_timm("test_vit")])
def test_training_changes_the_head_alone(make):
    model = TTameModel.from_backbone(make(), head_init="random").train()
    backbone, head = copy.deepcopy(model.backbone), copy.deepcopy(model.head)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(3):
        x = noise(4, seed=step)
        out = model(x)
        masks = torch.nn.functional.interpolate(out.map_logits.sigmoid(), size=x.shape[-2:], mode="bilinear")
        loss = torch.nn.functional.cross_entropy(model.classify(masks * x), out.class_ids[:, 0]) + masks.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.head.parameters())
    assert same_state(model.backbone, backbone)
    after = model.head.state_dict()
    after.pop("class_counts")  # counted by the training script
    assert all(not torch.equal(tensor, head.state_dict()[name]) for name, tensor in after.items())


def test_logits_carry_no_gradient_and_masks_do(fresh):
    out = fresh.train()(noise())
    assert not out.logits.requires_grad
    assert out.map_logits.requires_grad
    x = noise().requires_grad_()
    fresh.classify(x).sum().backward()
    assert x.grad.abs().sum() > 0


# ---- warm start ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_nfnet"])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_warm_start_maps_average_to_the_logits(name, batch_norm, training):
    model = TTameModel.from_backbone(make_timm(name), batch_norm=batch_norm, map_size=(2, 2)).train(training)
    assert model.config.head_init == "classifier"
    out = model(noise(4), "all")
    assert torch.allclose(out.map_logits.mean(dim=(2, 3)), out.logits, atol=1e-4)
    assert out.map_logits.std(dim=(2, 3)).max() > 1e-3


def test_warm_start_at_the_default_map_size(timm_cnn):
    model = TTameModel.from_backbone(copy.deepcopy(timm_cnn))
    out = model(noise(4), "all")
    assert model.config.map_size == [8, 8]
    assert torch.allclose(out.map_logits.mean(dim=(2, 3)), out.logits, atol=1e-4)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_warm_start_of_dinov2_is_the_patch_part(dinov2_folder, dinov2, batch_norm):
    model = TTameModel.from_backbone(dinov2_folder, batch_norm=batch_norm)
    assert model.config.last_layer_relu is False
    assert model.layers[-1].name == "dinov2.layernorm"
    with torch.no_grad():
        tokens = dinov2.dinov2(noise(4, 56)).last_hidden_state
        expected = tokens[:, 1:].mean(dim=1) @ dinov2.classifier.weight[:, 24:].T + dinov2.classifier.bias
    assert torch.allclose(model(noise(4, 56), "all").map_logits.mean(dim=(2, 3)), expected, atol=1e-4)


def test_warm_start_without_classifier_bias(fresh):
    pooled = PooledClassifier("layer4", torch.ones(CLASSES, fresh.head.channels[-1]), None, True)
    start_as_classifier(fresh.head, pooled, "softmax")
    assert not fresh.head.fuser.bias.any()


@pytest.mark.parametrize("batch_norm", [True, False])
def test_warm_start_of_a_class_token_is_the_classifier_on_each_patch_token(vit_folder, hf_vit, batch_norm):
    model = TTameModel.from_backbone(vit_folder, head_init="classifier", batch_norm=batch_norm)
    assert (model.config.head_init, model.layers[-1].name) == ("classifier", "vit.layernorm")
    assert model.config.last_layer_relu is False
    x = noise(4)
    out = model(x, "all")
    with torch.no_grad():
        tokens = hf_vit.classifier(hf_vit.vit(x).last_hidden_state)
    assert torch.allclose(out.logits, tokens[:, 0], atol=1e-5)
    assert torch.allclose(out.map_logits.flatten(2).mT, tokens[:, 1:], atol=1e-4)


def test_where_no_warm_start_exists(vit_folder):
    assert TTameModel.from_backbone(vit_folder).config.head_init == "random"  # not exact: on request only
    for arguments in ({"skip_connection": False}, {"class_token": "multiply"}):
        with pytest.raises(ValueError, match=r"head_init='classifier' needs.*use head_init='random'"):
            TTameModel.from_backbone(vit_folder, head_init="classifier", **arguments)
    assert TTameModel.from_backbone(make_timm("test_resnet"), skip_connection=False).config.head_init == "random"
    with pytest.raises(ValueError, match="head_init must be"):
        TTameModel.from_backbone(vit_folder, head_init="cam")


def test_warm_start_needs_its_layer_last():
    with pytest.raises(ValueError, match="needs 'layer4'"):
        TTameModel.from_backbone(make_timm("test_resnet"), feature_layers=["layer2"], head_init="classifier")
    with pytest.raises(ValueError, match=r"needs 'layer4'.* as the last feature layer"):
        TTameModel.from_backbone(make_timm("test_resnet"), feature_layers=["layer4", "layer2"], head_init="classifier")
    one = TTameModel.from_backbone(make_timm("test_resnet"), feature_layers=["layer4"], head_init="classifier")
    assert one.config.map_size == [2, 2]


# ---- making -------------------------------------------------------------------------------------------------------


def test_unknown_layer_is_refused(vit_folder):
    with pytest.raises(ValueError, match="is not in the backbone; nearest"):
        TTameModel.from_backbone(vit_folder, feature_layers=["vit.layer.9"])


def test_facts_in_the_config(dino):
    config = dino.config
    assert config.image_size == [56, 56]
    assert config.map_size == [4, 4]
    assert np.allclose(config.pixel_scale, 1 / np.array(dino.image_processor.image_std), atol=1e-5)
    assert config.backbone is None
    assert config.num_labels == CLASSES


def test_labels_come_from_the_backbone(vit):
    assert vit.config.id2label == dict(enumerate(LABELS))


def test_black_is_what_the_processor_makes_of_black(vit):
    black = preprocess(vit.image_processor, [Image.new("RGB", (20, 20))])[0, :, 5, 5]
    assert torch.allclose(vit.fill("black"), black, atol=1e-5)
    assert vit.fill("mean").tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="'black' or 'mean'"):
        vit.fill("white")


# ---- saving and loading -------------------------------------------------------------------------------------------


def assert_same(a: TTameModel, b: TTameModel, size: int, image: Image.Image):
    assert same_state(a, b)
    assert not b.training
    assert not any(m.training for m in b.modules())
    assert not any(p.requires_grad for p in b.backbone.parameters())
    # Loaded weights lie in the mapped file at any alignment, and products may round differently there.
    a, b = copy.deepcopy(a), copy.deepcopy(b)
    with torch.no_grad():
        x, y = a(noise(2, size), "all"), b(noise(2, size), "all")
    assert torch.equal(x.logits, y.logits)
    assert torch.equal(x.map_logits, y.map_logits)
    for one, other in zip(a.explain(image, top_k=2), b.explain(image, top_k=2), strict=True):
        assert np.array_equal(one.map, other.map)
        assert one.label == other.label
        assert np.array_equal(one.seen, other.seen)
        assert one.score == other.score
    assert a.config.id2label == b.config.id2label


@pytest.mark.parametrize(("which", "size"), [("cnn", 64), ("vit", 64), ("dino", 56)])
def test_round_trip(which, size, request, tmp_path, photo):
    model = request.getfixturevalue(which)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/backbone/model.safetensors").is_file()
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    assert_same(model, TTameModel.from_pretrained(tmp_path / "moved"), size, photo())


def test_loaded_weights_lie_where_torch_puts_its_own(vit, tmp_path):
    """A weight at an odd place of a mapped file rounds differently on some processors."""
    vit.save_pretrained(tmp_path)
    loaded = TTameModel.from_pretrained(tmp_path)
    assert not [name for name, tensor in loaded.named_parameters() if tensor.data_ptr() % 64]
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(x).map_logits, vit(x).map_logits)


def test_round_trip_of_a_timm_vit(tmp_path, photo):
    model = seeded_head(TTameModel.from_backbone(make_timm("test_vit")))
    model.save_pretrained(tmp_path)
    assert_same(model, TTameModel.from_pretrained(tmp_path), 64, photo())


def test_round_trip_keeps_a_given_processor(hf_vit, tmp_path, photo):
    processor = CLIPImageProcessorPil(size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64})
    model = TTameModel.from_backbone(copy.deepcopy(hf_vit), processor=processor)
    model.save_pretrained(tmp_path)
    loaded = TTameModel.from_pretrained(tmp_path)
    assert torch.equal(preprocess(processor, [photo()]), preprocess(loaded.image_processor, [photo()]))


def test_saving_leaves_the_model_alone(fresh, tmp_path):
    before = fresh.config.backbone_included
    fresh.save_pretrained(tmp_path / "a", include_backbone=True, head_dtype=torch.float16)
    assert fresh.config.backbone_included == before
    assert fresh.head.fuser.weight.dtype == torch.float32


def test_the_head_file_holds_the_head_alone(cnn, tmp_path):
    cnn.save_pretrained(tmp_path)
    assert all(name.startswith("head.") for name in load_file(tmp_path / "model.safetensors"))


def test_backbone_given_as_folder_or_module(vit, vit_folder, hf_vit, tmp_path, photo):
    vit.save_pretrained(tmp_path, include_backbone=False)
    assert not (tmp_path / "backbone").exists()
    assert_same(vit, TTameModel.from_pretrained(tmp_path, backbone=vit_folder), 64, photo())
    assert_same(vit, TTameModel.from_pretrained(tmp_path, backbone=str(vit_folder), strict=True), 64, photo())
    module = copy.deepcopy(hf_vit)
    loaded = TTameModel.from_pretrained(tmp_path, backbone=module)
    assert loaded.backbone is module
    assert same_state(vit, loaded)


def test_timm_module_given_back(cnn, timm_cnn, tmp_path, photo):
    cnn.save_pretrained(tmp_path, include_backbone=False)
    assert_same(cnn, TTameModel.from_pretrained(tmp_path, backbone=copy.deepcopy(timm_cnn), strict=True), 64, photo())


def test_missing_backbone(cnn, tmp_path):
    cnn.save_pretrained(tmp_path, include_backbone=False)
    with pytest.raises(ValueError, match=r"holds a head alone.*backbone=FOLDER_OR_MODULE"):
        TTameModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no backbone; load it with"):
        TTameModel(cnn.config)(noise())


def test_wrong_number_of_classes_is_refused(vit, tmp_path):
    vit.save_pretrained(tmp_path, include_backbone=False)
    with pytest.raises(ValueError, match=f"explains {CLASSES} classes, this backbone has 5"):
        TTameModel.from_pretrained(tmp_path, backbone=ViTForImageClassification(make_vit(classes=5).config))


def test_backbone_of_another_kind_is_refused(cnn, hf_resnet, tmp_path):
    cnn.save_pretrained(tmp_path, include_backbone=False)
    with pytest.raises(ValueError, match="is not in the backbone"):
        TTameModel.from_pretrained(tmp_path, backbone=copy.deepcopy(hf_resnet))


def test_other_weights_warn_or_raise(vit, tmp_path):
    vit.save_pretrained(tmp_path, include_backbone=False)
    with pytest.warns(UserWarning, match="fingerprint"):
        TTameModel.from_pretrained(tmp_path, backbone=make_vit(seed=1))
    with pytest.raises(ValueError, match="fingerprint"):
        TTameModel.from_pretrained(tmp_path, backbone=make_vit(seed=1), strict=True)


def test_fingerprint_sees_small_changes(timm_cnn):
    changed = copy.deepcopy(timm_cnn)
    assert fingerprint(changed) == fingerprint(timm_cnn)
    with torch.no_grad():
        changed.bn1.running_mean[0] += 1e-6
    assert fingerprint(changed) != fingerprint(timm_cnn)


def test_a_backbone_is_known_by_its_values_where_names_have_changed(vit, hf_vit, tmp_path, monkeypatch):
    vit.save_pretrained(tmp_path, include_backbone=False)
    recorded = json.loads((tmp_path / "config.json").read_text())
    known = fingerprint(hf_vit)
    assert (recorded["backbone_fingerprint"], recorded["backbone_values"]) == (known, values_fingerprint(hf_vit))
    other_names = {f"renamed.{name}": value for name, value in hf_vit.state_dict().items()}
    monkeypatch.setattr(hf_vit, "state_dict", lambda: other_names)
    assert fingerprint(hf_vit) != known
    loaded = TTameModel.from_pretrained(tmp_path, backbone=hf_vit, strict=True)
    assert loaded.config.backbone_fingerprint == known, "the record stays: rows and reports name it"


def test_the_order_of_the_values_counts(timm_vit):
    swapped = copy.deepcopy(timm_vit)
    swapped.blocks = torch.nn.Sequential(*[timm_vit.blocks[i] for i in (1, 0, *range(2, len(timm_vit.blocks)))])
    assert values_fingerprint(swapped) != values_fingerprint(timm_vit)
    assert values_fingerprint(copy.deepcopy(timm_vit)) == values_fingerprint(timm_vit)


def test_head_in_float16(fresh, tmp_path):
    fresh.save_pretrained(tmp_path / "full")
    fresh.save_pretrained(tmp_path / "half", head_dtype=torch.float16)
    full, half = (tmp_path / name / "model.safetensors" for name in ("full", "half"))
    assert half.stat().st_size < 0.52 * full.stat().st_size + 2000
    assert all(t.dtype in (torch.float16, torch.int64) for t in load_file(half).values())
    loaded = TTameModel.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    a, b = fresh(noise(), "all").map_logits, loaded(noise(), "all").map_logits
    assert 0 < (a - b).abs().max() < 0.05


def test_auto_classes(cnn, tmp_path):
    cnn.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), TTameConfig)
    for auto in (AutoModel, AutoModelForImageClassification):
        loaded = auto.from_pretrained(tmp_path)
        assert isinstance(loaded, TTameModel)
        assert same_state(cnn, loaded)
        assert loaded.image_processor is not None


def test_loading_info(cnn, tmp_path):
    cnn.save_pretrained(tmp_path)
    model, info = TTameModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, TTameModel)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_no_local_path_is_written(tmp_path, vit_folder):
    folder = tmp_path / "my-private-folder"
    shutil.copytree(vit_folder, folder)
    TTameModel.from_backbone(folder).save_pretrained(tmp_path / "saved")
    again = TTameModel.from_pretrained(tmp_path / "saved")
    again.save_pretrained(tmp_path / "again")
    for saved in (tmp_path / "saved", tmp_path / "again"):
        for file in saved.rglob("*"):
            if file.is_file():
                content = file.read_bytes()
                assert b"my-private-folder" not in content, file
                assert str(tmp_path).encode() not in content, file


def test_overwriting_is_complete(fresh, tmp_path):
    folder = tmp_path / "saved"
    fresh.save_pretrained(folder)
    seeded_head(fresh, seed=8).save_pretrained(folder)
    assert same_state(fresh, TTameModel.from_pretrained(folder))
    fresh.save_pretrained(folder, include_backbone=False)
    assert not (folder / "backbone").exists()
    fresh.save_pretrained(folder, include_backbone=True)
    assert same_state(fresh, TTameModel.from_pretrained(folder))
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    assert sorted(snapshot(folder)) == [
        "README.md",
        "backbone/config.json",
        "backbone/model.safetensors",
        "backbone/preprocessor_config.json",
        "config.json",
        "hf_ttame_remote.py",
        "model.safetensors",
        "preprocessor_config.json",
    ]


@pytest.mark.parametrize(("first", "second"), [({}, {"max_shard_size": "50KB"}), ({"max_shard_size": "50KB"}, {})])
def test_overwriting_with_other_shards(fresh, tmp_path, first, second):
    fresh.save_pretrained(tmp_path / "saved", **first)
    seeded_head(fresh, seed=8).save_pretrained(tmp_path / "saved", **second)
    assert same_state(fresh.head, TTameModel.from_pretrained(tmp_path / "saved").head)
    fresh.save_pretrained(tmp_path / "clean", **second)
    assert sorted(snapshot(tmp_path / "saved")) == sorted(snapshot(tmp_path / "clean"))


def test_other_files_of_the_folder_stay(fresh, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    fresh.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("step", ["head", "processor", "backbone"])
def test_a_failing_save_leaves_the_earlier_one(fresh, tmp_path, monkeypatch, step):
    folder = tmp_path / "saved"
    fresh.save_pretrained(folder)
    before = snapshot(folder)

    def fail(self, folder, *args, **kwargs):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "config.json").write_text("half")
        raise OSError("disk full")

    if step == "head":
        original = PreTrainedModel.save_pretrained
        monkeypatch.setattr(
            PreTrainedModel, "save_pretrained", lambda s, *a, **k: (original if s is not fresh else fail)(s, *a, **k)
        )
    elif step == "processor":
        monkeypatch.setattr(type(fresh.image_processor), "save_pretrained", fail)
    else:
        monkeypatch.setattr(type(fresh.backbone), "save_pretrained", fail)
    config = fresh.config.to_dict()
    with pytest.raises(OSError, match="disk full"):
        seeded_head(fresh, seed=9).save_pretrained(folder)
    monkeypatch.undo()
    assert snapshot(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    assert fresh.config.to_dict() == config
    TTameModel.from_pretrained(folder)


def test_save_refuses_a_file_and_a_push(fresh, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        fresh.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="push_to_hub"):
        fresh.save_pretrained(tmp_path / "x", push_to_hub=True)


def test_damaged_weights_are_refused(fresh, tmp_path):
    fresh.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        TTameModel.from_pretrained(tmp_path)


def test_nan_in_the_head_is_refused(fresh, tmp_path):
    with torch.no_grad():
        fresh.head.fuser.weight[0, 0] = float("nan")
    fresh.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'fuser.weight' of TTameHead holds NaN"):
        TTameModel.from_pretrained(tmp_path)


# ---- deepcopy -----------------------------------------------------------------------------------------------------


def test_deepcopy(fresh, photo, tmp_path):
    copied = copy.deepcopy(fresh)
    assert_same(fresh, copied, 64, photo())
    before = fresh(noise(), "all").map_logits
    seeded_head(copied, seed=11)
    copied.config.map_scaling = "sigmoid" if fresh.config.map_scaling == "logits" else "logits"
    assert torch.equal(fresh(noise(), "all").map_logits, before)
    assert fresh.config.map_scaling != copied.config.map_scaling
    copied.save_pretrained(tmp_path)
    assert all(name.startswith("head.") for name in load_file(tmp_path / "model.safetensors"))


def test_deepcopy_keeps_mode_and_dtype(fresh):
    assert copy.deepcopy(fresh.train()).training
    assert copy.deepcopy(fresh.to(torch.float64)).head.fuser.weight.dtype == torch.float64


# ---- explain ------------------------------------------------------------------------------------------------------


def test_every_kind_of_picture_gives_the_same(vit, photo, tmp_path):
    photo().save(tmp_path / "a.png")
    sources = [photo(), tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(photo())]
    found = [vit.explain(source)[0] for source in sources]
    assert all(np.array_equal(found[0].map, other.map) for other in found)
    assert found[0].image.tobytes() == photo().tobytes()


def test_one_explanation(dino, photo):
    (found,) = dino.explain(photo(120, 70))
    assert isinstance(found, Explanation)
    assert found.map.shape == found.seen.shape == (70, 120)
    assert found.map.dtype == np.float32
    assert found.seen.dtype == bool
    assert found.map.min() >= 0
    assert 0 < found.map.max() <= 1
    assert not found.seen[:, :20].any()
    assert not found.seen[:, -20:].any()
    assert found.seen[20:50, 40:80].all()
    assert not found.map[~found.seen].any()
    assert found.image_index == 0
    assert found.label == dino.config.id2label[found.class_id]


def test_explanations_can_be_compared_and_collected(vit, photo):
    one, other = vit.explain(photo(), [0, 1])
    assert one == one
    assert one != other
    assert len({one, other}) == 2


def test_nothing_is_cut_away_by_a_squash(vit, photo):
    (found,) = vit.explain(photo(150, 40))
    assert found.map.shape == (40, 150)
    assert found.seen.all()


def test_explain_equals_forward(dino, vit, photo):
    for model in (dino, vit):
        image = photo(100, 75)
        ids = [4, 1, 2]
        out = model(preprocess(model.image_processor, [image]), torch.tensor([ids]))
        config = model.config
        normalisation = Normalisation(config.pixel_scale, config.pixel_shift, tuple(config.image_size))
        placement = measure_placement(model.image_processor, normalisation, *image.size)
        maps, seen = place_maps(
            model.scale_maps(out.map_logits)[0].detach(), placement, tuple(config.image_size), *image.size
        )
        scores = out.logits.softmax(dim=1)[0]
        for n, found in enumerate(model.explain(image, ids)):
            assert np.allclose(found.map, maps[n].numpy(), atol=1e-5)
            assert np.array_equal(found.seen, seen.numpy())
            assert found.class_id == ids[n]
            assert found.score == pytest.approx(float(scores[ids[n]]), abs=1e-6)


def test_order_is_picture_by_picture_then_class_by_class(vit, photo):
    images = [photo(40 + 10 * i, 50, seed=i) for i in range(5)]
    for batch_size in (1, 2, 32):
        found = vit.explain(images, [3, 0], batch_size=batch_size)
        assert [(e.image_index, e.class_id) for e in found] == [(i, c) for i in range(5) for c in (3, 0)]
        assert [e.map.shape for e in found[::2]] == [(50, 40 + 10 * i) for i in range(5)]
    alone = [vit.explain(image, [3, 0]) for image in images]
    for one, other in zip(found, functools.reduce(operator.iadd, alone, []), strict=True):
        assert np.allclose(one.map, other.map, atol=1e-3)


def test_no_pictures(vit):
    assert vit.explain([]) == []


def test_default_is_the_predicted_class(cnn, photo):
    (found,) = cnn.explain(photo())
    logits = cnn(preprocess(cnn.image_processor, [photo()])).logits
    assert found.class_id == int(logits.argmax())


def test_top_k(vit, photo):
    found = vit.explain([photo(), photo(seed=1)], top_k=3)
    for scores in ([e.score for e in found[:3]], [e.score for e in found[3:]]):
        assert scores == sorted(scores, reverse=True)
    assert sum(e.score for e in vit.explain(photo(), top_k=CLASSES)) == pytest.approx(1, abs=1e-5)
    for top_k in (0, CLASSES + 1):
        with pytest.raises(ValueError, match=rf"top_k must lie in 1..{CLASSES}"):
            vit.explain(photo(), top_k=top_k)
    with pytest.raises(ValueError, match="class_ids or top_k, not both"):
        vit.explain(photo(), class_ids=1, top_k=1)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        vit.explain(photo(), batch_size=0)


@pytest.mark.parametrize(
    ("wanted", "ids"),
    [
        (2, [2]),
        ("2", [2]),
        ("tabby cat", [2]),
        (" Tabby Cat ", [2]),
        ("tench", [0]),
        ("Tinca tinca", [0]),
        ("tench, Tinca tinca", [0]),
        (6, [6]),
        (["church", 1, np.int64(5)], [3, 1, 5]),
        (range(2), [0, 1]),
        (np.array([1, 2]), [1, 2]),
    ],
)
def test_classes_by_id_and_name(vit, wanted, ids):
    assert vit.resolve_classes(wanted) == ids


def test_a_name_of_two_classes_is_refused(vit):
    with pytest.raises(ValueError, match=r"the name of 2 classes; give one of the ids \[4, 6\]"):
        vit.resolve_classes("crane")


def test_saving_leaves_what_it_did_not_write(vit, tmp_path):
    (tmp_path / "backbone").mkdir()
    for name in ("backbone/model.safetensors", "lora.safetensors"):
        (tmp_path / name).write_bytes(b"mine")
    vit.save_pretrained(tmp_path, include_backbone=False)
    for name in ("backbone/model.safetensors", "lora.safetensors"):
        assert (tmp_path / name).read_bytes() == b"mine"


def test_unknown_classes(vit, photo):
    with pytest.raises(ValueError, match=r"'golden retreiver' is neither a label nor.*nearest.*golden retriever"):
        vit.explain(photo(), "golden retreiver")
    for wanted in (CLASSES, -1, "-1", 1.5, "", "qqqq"):
        with pytest.raises(ValueError, match="neither a label nor an id"):
            vit.resolve_classes(wanted if isinstance(wanted, (int, str)) else [wanted])
    with pytest.raises(ValueError, match="at least one class"):
        vit.explain(photo(), [])


def test_unreadable_picture_is_named(vit, photo, tmp_path):
    with pytest.raises(ValueError, match=r"missing.png"):
        vit.explain([photo(), tmp_path / "missing.png"])


def test_training_mode_is_refused(fresh, photo):
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        fresh.train().explain(photo())


def test_explaining_is_deterministic(cnn, photo):
    first, second = (cnn.explain(photo(), top_k=CLASSES) for _ in range(2))
    assert all(np.array_equal(a.map, b.map) and a.score == b.score for a, b in zip(first, second, strict=True))


def test_remembered_placements_change_nothing(fresh, photo, monkeypatch):
    monkeypatch.setattr(modeling_ttame, "_REMEMBERED_PLACEMENTS", 2)
    sizes = [(90, 70), (70, 90), (64, 64), (90, 70)]
    found = [fresh.explain(photo(*size))[0] for size in sizes]
    assert np.array_equal(found[0].map, found[3].map)
    assert len(fresh._placements) <= 2


def test_map_scaling(fresh):
    logits = torch.tensor([[[-4.0, 0.0], [1.0, 4.0]]])
    fresh.config.map_scaling = "logits"
    assert torch.allclose(fresh.scale_maps(logits), (logits + 4) / 8)
    fresh.config.map_scaling = "sigmoid"
    low, high = logits.sigmoid().min(), logits.sigmoid().max()
    assert torch.allclose(fresh.scale_maps(logits), (logits.sigmoid() - low) / (high - low))


def test_explanation_save(dino, photo, tmp_path):
    (found,) = dino.explain(photo(120, 70))
    found.save(tmp_path / "new/a.png")
    found.save(str(tmp_path / "new/a.npy"))
    with Image.open(tmp_path / "new/a.png") as image:
        assert image.size == (120, 70)
        assert image.tobytes() == found.overlay().tobytes()
    assert np.array_equal(np.load(tmp_path / "new/a.npy"), found.map)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a.npy", "a.png"]


def test_a_failing_explanation_save_leaves_the_earlier_file(dino, photo, tmp_path, monkeypatch):
    (found,) = dino.explain(photo())
    found.save(tmp_path / "a.png")
    before = snapshot(tmp_path)

    def fail(self, path, *args, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        found.save(tmp_path / "a.png")
    assert snapshot(tmp_path) == before


def test_one_pixel_and_grey_pictures(vit, cnn):
    for model in (vit, cnn):
        (one, grey) = model.explain([Image.new("RGB", (1, 1), "red"), Image.new("L", (30, 20), 90)])
        assert one.map.shape == (1, 1)
        assert grey.map.shape == (20, 30)
        assert np.isfinite(one.map).all()
        assert np.isfinite(grey.map).all()


def test_an_explainer_of_format_1_still_loads():
    folder = FORMAT_1
    expected = load_file(folder / "expected.safetensors")
    model = TTameModel.from_pretrained(folder, strict=True)
    assert json.loads((folder / "config.json").read_text())["format_version"] == 1
    with torch.no_grad():
        output = model(expected["pixel_values"], class_ids="all")
    torch.testing.assert_close(output.logits, expected["logits"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.map_logits, expected["map_logits"], rtol=1e-5, atol=1e-6)
