"""Folding of batch norms: the same logits, features and gradients, or nothing is changed."""

import copy

import pytest
import timm
import torch
from timm.layers import StdConv2d
from torch import nn

from hf_ttame import TTameModel
from hf_ttame.features import inner_module
from training.folding import fold_batch_norms


def trained_norms(backbone: nn.Module) -> int:
    """Give every batch norm statistics and weights that matter; how many there are."""
    generator = torch.Generator().manual_seed(1)
    norms = [module for module in backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.running_mean.normal_(0, 0.2, generator=generator)
        norm.running_var.uniform_(0.5, 1.5, generator=generator)
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
        nn.init.normal_(norm.bias, 0, 0.2, generator=generator)
    return len(norms)


def answers(model: TTameModel, x: torch.Tensor) -> list[torch.Tensor]:
    """Logits, features, and the gradient of the masked pass."""
    with torch.no_grad():
        logits, features = model.features(x)
    x = x.clone().requires_grad_()
    model.classify(x).square().sum().backward()
    return [logits, *features, x.grad]


# Plain norms, norms with their activation, norms of a skip connection (they stay), none at all.
@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("test_resnet", "all"),
        ("test_efficientnet", "all"),
        ("repvgg_a0", "some"),
        ("test_vit", "none"),
    ],
)
def test_folded_backbones_answer_alike(name: str, folded: str) -> None:
    backbone = timm.create_model(name, num_classes=5).eval()
    norms = trained_norms(backbone)
    model = TTameModel.from_backbone(backbone)
    model.double()  # in float32 a ReLU may open elsewhere, and gradients jump
    x = torch.randn(2, 3, *model.config.image_size, generator=torch.Generator().manual_seed(2)).double()
    before, layers = answers(model, x), [layer.name for layer in model.layers]
    count = fold_batch_norms(model)
    assert {"all": count == norms > 0, "some": 0 < count < norms, "none": count == 0}[folded]
    for old, new in zip(before, answers(model, x), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-9 * float(old.abs().max()))
    assert [layer.name for layer in model.layers] == layers
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())


class Block(nn.Module):
    """A convolution and a norm, which subclasses connect in ways that forbid folding."""

    def __init__(self, convolution: type[nn.Conv2d] = nn.Conv2d):
        super().__init__()
        self.conv, self.bn = convolution(32, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))


class UsedTwice(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        convolved = self.conv(x)
        return self.bn(convolved) + convolved


class RunTwice(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x)) + self.conv(x.flip(-1))


def explainer_with(block: nn.Module) -> tuple[TTameModel, int]:
    """An explainer of a small ResNet with the block after its stem, and how many norms it has."""
    model = TTameModel.from_backbone(timm.create_model("test_resnet", num_classes=5).eval())
    inner_module(model.backbone).maxpool = block.eval()
    return model, trained_norms(model.backbone)


# A convolution whose output is used beside the norm's, and weights that are normalised in each pass.
@pytest.mark.parametrize("block", [UsedTwice(), Block(StdConv2d)], ids=["used twice", "standardised weights"])
def test_where_folding_would_change_the_answers_nothing_changes(block: nn.Module) -> None:
    model, _ = explainer_with(block)
    before = copy.deepcopy(model.backbone.state_dict())
    assert fold_batch_norms(model) == 0
    after = model.backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_convolution_that_runs_twice_stays() -> None:
    model, norms = explainer_with(RunTwice())
    check_all_but_one_folded(model, norms)


def test_a_convolution_that_the_explainer_reads_stays() -> None:
    backbone = timm.create_model("test_resnet", num_classes=5).eval()
    norms = trained_norms(backbone)
    check_all_but_one_folded(TTameModel.from_backbone(backbone, feature_layers=["layer1.0.conv1"]), norms)


def check_all_but_one_folded(model: TTameModel, norms: int) -> None:
    x = torch.randn(2, 3, *model.config.image_size, generator=torch.Generator().manual_seed(2))
    before = answers(model, x)[:-1]
    assert fold_batch_norms(model) == norms - 1
    for old, new in zip(before, answers(model, x)[:-1], strict=True):
        torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-4 * float(old.abs().max()))
