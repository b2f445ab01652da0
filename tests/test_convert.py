"""Files in the authors' layout, made here from torchvision's own models, against the formula as published."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from typer.testing import CliRunner

from hf_ttame import TTameModel
from hf_ttame.cli import app
from hf_ttame.convert import convert_reference_checkpoint, convert_to_folder

CLASSES = 6
LAYERS = {
    "vgg16": ["features.16", "features.23", "features.30"],
    "resnet50": ["layer2", "layer3", "layer4"],
    "vit_b_16": [f"encoder.layers.encoder_layer_{i}.ln_1" for i in (9, 10, 11)],
}


def torchvision_model(name: str) -> nn.Module:
    """torchvision's architecture with quick random weights that keep the signal alive."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
    model.to_empty(device="cpu")
    noise = torch.randn(1 << 16, generator=generator)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_var"):
                tensor.fill_(1.3)
            elif not tensor.is_floating_point():
                tensor.zero_()
            elif tensor.ndim > 1 and "pos_embedding" not in key and "token" not in key:
                values = noise.repeat(-(-tensor.numel() // len(noise)))[: tensor.numel()].view_as(tensor)
                tensor.copy_(values * (2 / tensor[0].numel()) ** 0.5)
            else:
                tensor.copy_(noise[: tensor.numel()].view_as(tensor) * 0.1 if tensor.numel() <= len(noise) else 0.02)
                if key.endswith(("bn1.weight", "bn2.weight", "downsample.1.weight")) or ".ln" in key:
                    tensor.add_(0.5)
    return model.eval()


def make_checkpoint(name: str, body: nn.Module, batch_norm: bool = True) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    channels = {"vgg16": (256, 512, 512), "resnet50": (512, 1024, 2048), "vit_b_16": (768, 768, 768)}[name]
    head: dict[str, torch.Tensor] = {}
    for i, c in enumerate(channels):
        head[f"convs.{i}.weight"] = torch.randn(c, c, 1, 1, generator=generator) / c**0.5
        head[f"convs.{i}.bias"] = torch.randn(c, generator=generator) * 0.1
        if batch_norm:
            head[f"bns.{i}.weight"] = torch.rand(c, generator=generator) + 0.5
            head[f"bns.{i}.bias"] = torch.randn(c, generator=generator) * 0.1
            head[f"bns.{i}.running_mean"] = torch.randn(c, generator=generator) * 0.1
            head[f"bns.{i}.running_var"] = torch.rand(c, generator=generator) + 0.5
            head[f"bns.{i}.num_batches_tracked"] = torch.tensor(7)
    head["fuser.weight"] = torch.randn(CLASSES, sum(channels), 1, 1, generator=generator) / sum(channels) ** 0.5
    head["fuser.bias"] = torch.randn(CLASSES, generator=generator) * 0.1
    level = "1." if name == "vit_b_16" else ""
    state = {f"generic.attn_mech.{level}{key}": tensor for key, tensor in head.items()}
    for key, tensor in body.state_dict().items():
        state[f"generic.body.{key}"] = tensor
        state[f"generic.arrangement.body.{key}"] = tensor
    settings = {
        "model_name": name,
        "layers": LAYERS[name],
        "attention_version": "TAttentionV1",
        "train_method": "new",
        "num_classes": CLASSES,
    }
    return {"state_dict": state, "hyper_parameters": settings, "epoch": 7, "pytorch-lightning_version": "2.1.0"}


def literal(checkpoint: dict[str, Any], body: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and map logits as the paper writes them: every layer at map size, concatenated, one convolution."""
    name = checkpoint["hyper_parameters"]["model_name"]
    level = "1." if name == "vit_b_16" else ""
    head = {
        key.removeprefix(f"generic.attn_mech.{level}"): tensor
        for key, tensor in checkpoint["state_dict"].items()
        if key.startswith("generic.attn_mech.")
    }
    found = {}
    hooks = [
        body.get_submodule(layer).register_forward_hook(
            lambda _module, _args, out, layer=layer: found.__setitem__(layer, out.clone())
        )
        for layer in LAYERS[name]
    ]
    logits = body(x)
    for hook in hooks:
        hook.remove()
    features = [found[layer] for layer in LAYERS[name]]
    if name == "vit_b_16":
        features = [f[:, 1:].transpose(1, 2).reshape(len(x), 768, 14, 14) for f in features]
    size = max(f.shape[-1] for f in features)
    branches = []
    for i, f in enumerate(features):
        z = F.conv2d(f, head[f"convs.{i}.weight"], head[f"convs.{i}.bias"])
        if f"bns.{i}.weight" in head:
            mean, var = head[f"bns.{i}.running_mean"], head[f"bns.{i}.running_var"]
            z = F.batch_norm(z, mean, var, head[f"bns.{i}.weight"], head[f"bns.{i}.bias"])
        z = F.relu(z + f)
        branches.append(F.interpolate(z, size=(size, size), mode="bilinear", align_corners=False))
    return logits, F.conv2d(torch.cat(branches, dim=1), head["fuser.weight"], head["fuser.bias"])


@pytest.fixture(scope="module", params=list(LAYERS))
def converted(request, tmp_path_factory):
    name = request.param
    body = torchvision_model(name)
    checkpoint = make_checkpoint(name, body)
    path = tmp_path_factory.mktemp("reference") / "T-TAME.ckpt"
    torch.save(checkpoint, path)
    model = convert_reference_checkpoint(path)
    yield name, body, checkpoint, path, model
    path.unlink()


@torch.no_grad()
def test_maps_equal_the_literal_formula(converted):
    name, body, checkpoint, _, model = converted
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    logits, expected = literal(checkpoint, body, x)
    output = model(x, class_ids="all")
    assert logits.std() > 1e-3  # the signal survived the depth
    assert expected.std() > 1e-2
    assert output.logits.shape == (1, CLASSES)
    torch.testing.assert_close(output.logits, logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.map_logits, expected, atol=1e-4, rtol=1e-4)
    assert output.map_logits.shape[-1] == {"vgg16": 28, "resnet50": 28, "vit_b_16": 14}[name]


def test_facts_and_licence(converted):
    name, *_, model = converted
    assert model.config.map_scaling == "logits"
    assert model.config.backbone is None
    assert model.config.head_license == "academic-non-commercial"
    assert name in model.config.converted_from
    processor = model.image_processor
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (256, 224)
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    assert processor.resample == 2


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    body = torchvision_model("resnet50")
    return body, make_checkpoint("resnet50", body), tmp_path_factory.mktemp("resnet")


def test_the_folder_carries_the_licence(resnet):
    body, checkpoint, folder = resnet
    torch.save(checkpoint, folder / "good.ckpt")
    done = CliRunner().invoke(app, ["convert", str(folder / "good.ckpt"), "--output", str(folder / "out")])
    assert done.exit_code == 0, done.exception
    assert "academic, non-commercial use only" in done.output
    card = (folder / "out" / "README.md").read_text()
    assert "license: other" in card
    assert "license_name: academic-non-commercial" in card
    assert "- Head: academic-non-commercial" in card
    assert "no real checkpoint was at hand" in card
    loaded = TTameModel.from_pretrained(folder / "out")
    assert loaded.config.head_license == "academic-non-commercial"  # and so a later push says it too
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = literal(checkpoint, body, x)[1]
        torch.testing.assert_close(loaded(x, class_ids="all").map_logits, expected, atol=1e-4, rtol=1e-4)


def test_a_card_that_somebody_wrote_stays(resnet, tmp_path):
    _, checkpoint, folder = resnet
    torch.save(checkpoint, folder / "card.ckpt")
    (tmp_path / "README.md").write_text("# mine")
    convert_to_folder(folder / "card.ckpt", tmp_path)
    assert (tmp_path / "README.md").read_text() == "# mine"


def test_another_attention_is_named(resnet):
    _, checkpoint, folder = resnet
    settings = {**checkpoint["hyper_parameters"], "attention_version": "TAttentionV9"}
    torch.save({**checkpoint, "hyper_parameters": settings}, folder / "other.ckpt")
    with pytest.warns(UserWarning, match=r"names the attention 'TAttentionV9', not 'TAttentionV1'.*skip_connection"):
        convert_reference_checkpoint(folder / "other.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # whoever says which ablation it is knows
        convert_reference_checkpoint(folder / "other.ckpt", skip_connection=False)


def test_without_batch_norm(resnet):
    body, _, folder = resnet
    checkpoint = make_checkpoint("resnet50", body, batch_norm=False)
    del checkpoint["hyper_parameters"]["layers"]
    torch.save(checkpoint, folder / "plain.ckpt")
    model = convert_reference_checkpoint(folder / "plain.ckpt")
    assert not model.config.batch_norm
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        torch.testing.assert_close(
            model(x, class_ids="all").map_logits, literal(checkpoint, body, x)[1], atol=1e-4, rtol=1e-4
        )


class _Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil-was-run"),))


def test_a_file_with_foreign_objects_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "hyper_parameters": _Evil()}, "evil.ckpt")
    with pytest.raises(ValueError, match="more than tensors and plain values and is not opened"):
        convert_reference_checkpoint("evil.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(ValueError, match=r"plain\.ckpt"):
        convert_reference_checkpoint("plain.ckpt")
    assert not (tmp_path / "evil-was-run").exists()


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"is not a file"):
        convert_reference_checkpoint(tmp_path / "nothing.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.ckpt"):
        convert_reference_checkpoint(tmp_path / "text.ckpt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="has no state_dict of tensors"):
        convert_reference_checkpoint(tmp_path / "other.ckpt")
    torch.save({"state_dict": {"model.conv.weight": torch.zeros(2)}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"is no T-TAME checkpoint.*model.conv"):
        convert_reference_checkpoint(tmp_path / "foreign.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("name", "the file's weights are those of resnet50, its model_name is 'vgg16'"),
        ("missing", "the backbone in .* is not torchvision's resnet50"),
        ("layers", "does not have one branch for each"),
        ("unknown", r"layer5"),
        ("shape", "does not fit resnet50 and its layers"),
    ],
)
def test_files_that_do_not_fit(resnet, change, message):
    _, checkpoint, folder = resnet
    state, settings = dict(checkpoint["state_dict"]), dict(checkpoint["hyper_parameters"])
    if change == "name":
        settings["model_name"] = "vgg16"
    elif change == "missing":
        state = {key: tensor for key, tensor in state.items() if "layer3.0.conv1" not in key}
    elif change == "layers":
        settings["layers"] = ["layer3", "layer4"]
    elif change == "unknown":
        settings["layers"] = ["layer2", "layer3", "layer5"]
    else:
        settings["layers"] = ["layer1", "layer3", "layer4"]
    torch.save({"state_dict": state, "hyper_parameters": settings}, folder / "bad.ckpt")
    with pytest.raises(ValueError, match=message):
        convert_reference_checkpoint(folder / "bad.ckpt")


@pytest.mark.parametrize(
    ("key", "settings", "message"),
    [
        ("fuser", [1], "hyper_parameters of .* must be a dict, got list"),
        ("fuser", "x", "hyper_parameters of .* must be a dict, got str"),
        ("convs.0", {"layers": ["layer4"]}, "lacks fuser.weight"),
    ],
)
def test_settings_of_a_wrong_type_and_a_missing_fuser(tmp_path, key, settings, message):
    names = (f"generic.attn_mech.{key}.weight", "generic.body.layer4.2.conv3.weight")
    state = {name: torch.zeros(1) for name in names}
    torch.save({"state_dict": state, "hyper_parameters": settings}, tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match=message):
        convert_reference_checkpoint(tmp_path / "c.ckpt")
