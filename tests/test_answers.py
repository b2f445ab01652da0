"""What logits mean: softmax, several classes at once, a single yes-or-no logit."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_timm, make_vit, vit_processor

from hf_ttame import TTameModel
from hf_ttame.answers import answered, choose_targets, class_logits, classification_loss, probabilities
from hf_ttame.losses import ttame_loss


def multi_label_vit() -> torch.nn.Module:
    vit = make_vit()
    vit.config.problem_type = "multi_label_classification"
    return vit


def single_logit_vit(label: str = "malignant") -> torch.nn.Module:
    vit = make_vit(classes=1)
    vit.config.id2label, vit.config.label2id = {0: label}, {label: 0}
    return vit


def noise(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))


# ---- by hand ------------------------------------------------------------------------------------------------------


def test_probabilities_by_hand():
    logits = torch.tensor([[0.0, math.log(3)]])
    torch.testing.assert_close(probabilities(logits, "softmax"), torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(probabilities(logits, "sigmoid"), torch.tensor([[0.5, 0.75]]))
    single = class_logits(torch.tensor([[math.log(3)]]), "single_logit")
    torch.testing.assert_close(probabilities(single, "single_logit"), torch.tensor([[0.25, 0.75]]))


def test_answered_by_hand():
    logits = torch.tensor([[2.0, -1.0, 0.5], [-3.0, -1.0, -2.0]])
    assert answered(logits, "softmax").tolist() == [[True, False, False], [False, True, False]]
    assert answered(logits, "sigmoid").tolist() == [[True, False, True], [False, True, False]]


def test_targets_of_a_multi_label_classifier_are_drawn_among_the_positive_classes():
    logits = torch.tensor([[2.0, -1.0, 0.5, -4.0]]).repeat(400, 1)
    drawn = choose_targets(logits, "sigmoid", torch.Generator().manual_seed(0)).bincount(minlength=4)
    assert drawn[1] == drawn[3] == 0
    assert 150 < drawn[0] < 250
    assert choose_targets(logits, "softmax").unique().tolist() == [0]
    assert choose_targets(-logits[:, :1], "sigmoid").unique().tolist() == [0]


def test_classification_loss_by_hand():
    logits, targets = torch.tensor([[0.0, 2.0], [1.0, -1.0]]), torch.tensor([1, 1])
    cross_entropy = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))) / 2
    binary = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2
    assert classification_loss(logits, targets, "softmax").item() == pytest.approx(cross_entropy, abs=1e-6)
    assert classification_loss(logits, targets, "sigmoid").item() == pytest.approx(binary, abs=1e-6)
    masks = torch.rand(2, 1, 4, 4)
    assert ttame_loss(logits, targets, masks, outputs="sigmoid").cross_entropy.item() == pytest.approx(
        binary, abs=1e-6
    )


# ---- in the model -------------------------------------------------------------------------------------------------


def test_multi_label_explains_every_positive_class(photo):
    vit = multi_label_vit()
    with torch.no_grad():
        vit.classifier.bias.copy_(torch.tensor([9.0, -9, 9, -9, -9, -9, 8]))
    model = TTameModel.from_backbone(vit, processor=vit_processor())
    found = model.explain([photo(), photo(seed=1)])
    by_image = [[e.class_id for e in found if e.image_index == i] for i in (0, 1)]
    assert [sorted(ids) for ids in by_image] == [[0, 2, 6], [0, 2, 6]]
    assert all(e.score > 0.5 for e in found)
    scores = [e.score for e in found if e.image_index == 0]
    assert scores == sorted(scores, reverse=True)
    (alone,) = model.explain(photo(), class_ids=2)
    assert np.allclose(next(e for e in found if e.class_id == 2).map, alone.map, atol=1e-5)
    with torch.no_grad():
        vit.classifier.bias.fill_(-9)
    (top,) = model.explain(photo())
    assert top.score < 0.5


def test_multi_label_of_timm_is_said_by_the_user(tmp_path):
    model = TTameModel.from_backbone(make_timm("test_resnet"), outputs="sigmoid")
    assert model.config.classifier_outputs == "sigmoid"
    model.save_pretrained(tmp_path / "explainer")
    assert TTameModel.from_pretrained(tmp_path / "explainer").config.classifier_outputs == "sigmoid"
    assert TTameModel.from_backbone(make_timm("test_resnet")).config.classifier_outputs == "softmax"


def test_single_logit_explains_the_side_of_the_answer(photo, tmp_path):
    vit = single_logit_vit()
    for bias, label, class_id in ((5.0, "malignant", 1), (-5.0, "not malignant", 0)):
        with torch.no_grad():
            vit.classifier.bias.fill_(bias)
        model = TTameModel.from_backbone(vit, processor=vit_processor())
        (answer,) = model.explain(photo())
        assert (answer.label, answer.class_id) == (label, class_id)
        assert answer.score > 0.5
    with torch.no_grad():
        z = vit(noise()).logits[:, 0]
        output = model(noise())
    torch.testing.assert_close(output.logits, torch.stack([-z, z], dim=1))
    assert [e.label for e in model.explain(photo(), class_ids=["malignant", "not malignant"])] == [
        "malignant",
        "not malignant",
    ]
    model.save_pretrained(tmp_path / "explainer")
    again = TTameModel.from_pretrained(tmp_path / "explainer")
    assert torch.equal(again(noise(), class_ids="all").map_logits, model(noise(), class_ids="all").map_logits)


def test_single_logit_trains_both_sides():
    vit = single_logit_vit()
    model = TTameModel.from_backbone(vit, processor=vit_processor()).train()
    logits, features = model.features(noise(4))
    targets = choose_targets(logits, "single_logit")
    assert torch.equal(targets, (logits[:, 1] > 0).long())
    masks = model.head(features, torch.tensor([0, 1])).sigmoid()
    terms = ttame_loss(model.classify(noise(4)), targets, masks, outputs="single_logit")
    expected = F.softplus(-logits[:, 1].abs()).mean()  # -log sigmoid of the answered side
    torch.testing.assert_close(terms.cross_entropy, expected)


def test_warm_start_of_a_single_logit():
    model = TTameModel.from_backbone(make_timm("test_resnet", classes=1))
    assert (model.config.head_init, model.config.num_labels) == ("classifier", 2)
    with torch.no_grad():
        output = model(noise(), class_ids="all")
    torch.testing.assert_close(output.map_logits.mean(dim=(-2, -1)), output.logits, rtol=1e-4, atol=1e-4)


def test_a_regressor_is_refused():
    vit = single_logit_vit()
    vit.config.problem_type = "regression"
    with pytest.raises(ValueError, match=r"regression.*outputs='single_logit'"):
        TTameModel.from_backbone(vit, processor=vit_processor())
    assert TTameModel.from_backbone(vit, processor=vit_processor(), outputs="single_logit").config.num_labels == 2
    with pytest.raises(ValueError, match="does not fit a classifier of 7 logits"):
        TTameModel.from_backbone(make_timm("test_resnet"), outputs="single_logit")
    with pytest.raises(ValueError, match="classifier_outputs must be one of"):
        TTameModel.from_backbone(make_timm("test_resnet"), outputs="sigmoids")
