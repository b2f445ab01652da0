import copy
import json
import shutil

import pytest
import timm
import torch
from conftest import make_timm, make_vit, vit_processor
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig, ViTImageProcessor, ViTModel

from hf_ttame import TTameModel
from hf_ttame.backbones import check_finite, load_backbone, wrap_backbone


def test_a_local_folder(vit_folder, hf_vit):
    found = load_backbone(str(vit_folder))
    assert found.hub_id is None
    assert found.revision is None
    assert type(found.model).__name__ == "ViTForImageClassification"
    assert found.processor.size["height"] == 64
    assert all(
        torch.equal(a, b)
        for a, b in zip(found.model.state_dict().values(), hf_vit.state_dict().values(), strict=False)
    )


def test_a_subfolder(vit_folder):
    assert load_backbone(str(vit_folder.parent), subfolder="vit").model.config.num_labels == 7


def test_own_processor_wins(vit_folder):
    processor = vit_processor()
    assert load_backbone(str(vit_folder), processor=processor).processor is processor


def test_folder_without_weights(vit_folder, tmp_path):
    with pytest.raises(ValueError, match=r"holds no weights; a model folder has config.json and model.safetensors"):
        load_backbone(str(tmp_path))
    shutil.copy(vit_folder / "config.json", tmp_path)
    with pytest.raises(ValueError, match="holds no weights"):
        TTameModel.from_backbone(tmp_path)


def test_bare_name():
    with pytest.raises(ValueError, match=r"'resnet50' is neither a folder nor a Hub id; .*pretrained=False"):
        load_backbone("resnet50")


def test_hub_id_that_is_not_at_hand():
    with pytest.raises(ValueError, match="the backbone 'nobody/nothing' cannot be loaded"):
        load_backbone("nobody/nothing")


def test_model_without_a_classification_head(tmp_path):
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=16
    )
    ViTModel(config).save_pretrained(tmp_path)
    vit_processor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks the weights \['classifier.*fine-tune it first"):
        load_backbone(str(tmp_path))


def test_text_model(tmp_path):
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not an image classifier that transformers or timm can load"):
        load_backbone(str(tmp_path))


def test_unknown_model_type(vit_folder, tmp_path):
    shutil.copytree(vit_folder, tmp_path / "odd")
    facts = json.loads((tmp_path / "odd/config.json").read_text())
    (tmp_path / "odd/config.json").write_text(json.dumps({**facts, "model_type": "no_such_type"}))
    with pytest.raises(ValueError, match="is not an image classifier"):
        load_backbone(str(tmp_path / "odd"))


@pytest.mark.parametrize(
    ("file", "content"), [("config.json", b"{"), ("model.safetensors", b"cut"), ("model.safetensors", b"")]
)
def test_damaged_files(vit_folder, tmp_path, file, content):
    shutil.copytree(vit_folder, tmp_path / "bad")
    (tmp_path / "bad" / file).write_bytes(content)
    with pytest.raises(ValueError, match="bad"):
        load_backbone(str(tmp_path / "bad"))


def test_weights_of_other_shapes(vit_folder, tmp_path):
    shutil.copytree(vit_folder, tmp_path / "odd")
    weights = load_file(tmp_path / "odd/model.safetensors")
    weights["classifier.weight"] = torch.zeros(3, 24)
    save_file(weights, tmp_path / "odd/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="odd"):
        load_backbone(str(tmp_path / "odd"))


def test_folder_without_processor(hf_vit, tmp_path):
    hf_vit.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="process"):
        load_backbone(str(tmp_path))


def test_weights_that_are_not_finite(tmp_path):
    broken = make_vit()
    with torch.no_grad():
        broken.classifier.weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"'classifier.weight' of ViTForImageClassification holds NaN or infinity"):
        check_finite(broken)
    broken.save_pretrained(tmp_path)
    vit_processor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        TTameModel.from_backbone(tmp_path)
    statistics = make_timm("test_resnet")
    statistics.bn1.running_var[0] = float("inf")
    with pytest.raises(ValueError, match=r"bn1.running_var"):
        TTameModel.from_backbone(statistics)


def test_timm_module_without_classifier():
    with pytest.raises(ValueError, match=r"num_classes=0.*create it with its classifier"):
        wrap_backbone(timm.create_model("test_resnet", num_classes=0))


def test_transformers_module_without_processor(hf_vit):
    with pytest.raises(ValueError, match="comes without its preprocessing; pass processor="):
        wrap_backbone(hf_vit)
    assert wrap_backbone(hf_vit, vit_processor()).model is hf_vit


def test_transformers_module_that_is_no_classifier(hf_vit):
    with pytest.raises(ValueError, match="ViTModel is not an image classifier; load it with AutoModelForImage"):
        wrap_backbone(hf_vit.vit, vit_processor())


@pytest.mark.parametrize("thing", [nn.Linear(3, 3), nn.Sequential()])
def test_other_modules(thing):
    with pytest.raises(TypeError, match="transformers image classifier or a timm model, got"):
        wrap_backbone(thing)


def test_unknown_architecture():
    with pytest.raises(ValueError, match=r"'resnet5000' is not a timm architecture; timm.list_models"):
        load_backbone("resnet5000", pretrained=False)


def test_architecture_without_weights():
    found = load_backbone("test_resnet", pretrained=False)
    assert found.hub_id is None
    assert found.model.config.num_labels == 1000


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_timm_module_keeps_its_logits_in_the_wrapper(name):
    module = make_timm(name)
    found = wrap_backbone(module)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(found.model(x).logits, module(x))
    assert found.model.config.num_labels == 7
    assert found.processor(images=torch.zeros(3, 80, 90), return_tensors="pt")["pixel_values"].shape[-2:] == (64, 64)


def test_timm_module_whose_config_already_names_its_input_size():
    module = make_timm("test_vit", pretrained_cfg_overlay={"input_size": (3, 64, 64)})
    assert wrap_backbone(module).model.timm_model is module


def test_timm_module_that_was_changed_by_hand():
    module = make_timm("test_resnet")
    module.fc = nn.Sequential(nn.Linear(module.fc.in_features, 8), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="could not rebuild it"):
        wrap_backbone(module)


def test_timm_folder(timm_cnn, tmp_path):
    wrap_backbone(copy.deepcopy(timm_cnn)).model.save_pretrained(tmp_path)
    found = load_backbone(str(tmp_path))
    state = timm_cnn.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.model.timm_model.state_dict().items())
    assert tuple(found.processor.crop_size[side] for side in ("height", "width")) == (64, 64)


@pytest.mark.parametrize("given", [{"global_pool": "max"}, {"img_size": 96, "dynamic_img_size": True}])
def test_arguments_that_do_not_show_in_the_weights_are_kept(given, tmp_path):
    name = "test_vit" if "img_size" in given else "test_resnet"
    model = TTameModel.from_backbone(timm.create_model(name, num_classes=7, **given))
    model.save_pretrained(tmp_path)
    again = TTameModel.from_pretrained(tmp_path, strict=True)
    images = torch.randn(2, 3, *model.config.image_size)
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images).logits)


def test_a_module_that_cannot_be_rebuilt_is_refused():
    with pytest.raises(ValueError, match="could not rebuild it; wrap it with the arguments"):
        TTameModel.from_backbone(timm.create_model("test_resnet", num_classes=7, output_stride=8))


def test_a_replaced_classifier_keeps_its_classes(tmp_path):
    module = timm.create_model("test_resnet", num_classes=7)
    module.fc = torch.nn.Linear(module.num_features, 5)
    model = TTameModel.from_backbone(module)
    assert model.config.num_labels == 5
    model.save_pretrained(tmp_path)
    assert TTameModel.from_pretrained(tmp_path, strict=True).config.num_labels == 5


def test_a_timm_folder_keeps_its_own_preprocessing(tmp_path):
    model = TTameModel.from_backbone(
        timm.create_model("test_resnet", num_classes=7), processor=ViTImageProcessor(size={"height": 96, "width": 96})
    )
    model.save_pretrained(tmp_path)
    assert TTameModel.from_backbone(tmp_path / "backbone").config.image_size == [96, 96]


def test_an_input_that_does_not_fit_is_explained():
    with pytest.raises(ValueError, match=r"cannot take its processor's pictures of \(3, 72, 64\)"):
        TTameModel.from_backbone(
            timm.create_model("test_vit", num_classes=7), processor=ViTImageProcessor(size={"height": 72, "width": 64})
        )


def test_a_class_token_that_is_not_there_cannot_be_multiplied():
    with pytest.raises(ValueError, match="class_token='multiply' needs layers that hold a class token"):
        TTameModel.from_backbone(timm.create_model("test_resnet", num_classes=7), class_token="multiply")
