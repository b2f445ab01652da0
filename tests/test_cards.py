"""Cards: what they say, that they are those in the repository, and that hostile text in a config has no power."""

import contextlib
import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_vit
from huggingface_hub import ModelCard

from hf_ttame import TTameModel
from hf_ttame.card_text import without_secrets
from hf_ttame.cards import GENERATED, code, escape, render_card, write_card
from hf_ttame.evaluation import compare
from hf_ttame.evaluation_plan import Plan
from hf_ttame.hub import check_contents, files_to_push, push_folder
from hf_ttame.records import fingerprint_of_folder, head_fingerprint

CARDS = Path(__file__).parents[1] / "model_cards"
ASSET = Path(__file__).parents[1] / "hf_ttame" / "assets" / "efficientnet_lite0"
WRITTEN = ("vgg16", "resnet50", "vit_b_16", "efficientnet_lite0", "dinov2_small")
HOME = "/".join(("", "home", "me"))  # an invented home folder


@pytest.fixture(scope="module")
def folder(vit_folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("cards") / "explainer"
    TTameModel.from_backbone(vit_folder).save_pretrained(target)
    return target


def put(folder: Path, name: str, record: dict) -> None:
    """A record about the head that lies in the folder."""
    (folder / name).write_text(json.dumps({**record, "head_fingerprint": fingerprint_of_folder(folder)}))


def methods_of(**means: dict) -> dict:
    """The methods of a report as `ttame compare` writes them, from {method: {measure: mean}}."""
    return {
        name: {"measures": {measure: {"mean": mean} for measure, mean in values.items()}}
        for name, values in means.items()
    }


@pytest.mark.parametrize("name", WRITTEN)
def test_written_cards_are_what_their_facts_render(name):
    text = (CARDS / name / "README.md").read_text()
    assert text == render_card(CARDS / name), f"run: ttame card model_cards/{name}"
    data = ModelCard(text).data
    assert data.library_name == "hf_ttame"
    assert data.pipeline_tag == "image-classification"
    assert "xai" in data.tags
    for part in (
        "A map shows what this classifier used, not what is true.",
        "10.1109/ACCESS.2024.3405788",
        "Licences",
    ):
        assert part in text


@pytest.mark.parametrize("name", [name for name in WRITTEN if name not in ("efficientnet_lite0", "dinov2_small")])
def test_a_card_without_a_report_has_no_figures(name):
    text = (CARDS / name / "README.md").read_text()
    figures = text.split("## Figures")[1].split("## Pictures")[0]
    assert "**not measured**" in figures
    assert not re.search(r"\d", figures)
    assert "model-index" not in text
    assert "- Cost: not measured" in text
    assert "How faithful these maps are was not measured." in text


@pytest.mark.parametrize("name", ["efficientnet_lite0", "dinov2_small"])
def test_the_card_has_the_figures_of_its_comparison(name):
    """The card's tables and metadata hold what the report says of the explainer and of Grad-CAM."""
    report = json.loads((CARDS / name / "report.json").read_text())
    text = (CARDS / name / "README.md").read_text()
    own = {measure: interval["mean"] for measure, interval in report["methods"]["ttame"]["measures"].items()}
    row = next(line for line in text.splitlines() if "ttame (this explainer)" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")][3:]
    expected = [(own[f"AD {m}"], own[f"IC {m}"]) for m in ("soft 100", "soft 50", "soft 15", "binary 50", "binary 15")]
    assert cells == [f"{drop:.1f} / {increase:.1f}" for drop, increase in expected]
    results = {result.metric_type: result.metric_value for result in ModelCard(text).data.eval_results}
    assert results["ad_soft_100"] == own["AD soft 100"]
    assert len(results) == len(own)
    line = next(line for line in text.splitlines() if line.startswith("| AD soft 50 |"))
    column = ["better", "worse", "open"].index(report["verdicts"]["gradcam"]["AD soft 50"])
    assert "gradcam" in line.strip("| ").split(" | ")[1 + column].split(", ")


def test_the_trained_head_of_dinov2_fits_its_classifier():
    backbone = CARDS.parents[1] / "shared" / "models" / "dinov2-small-imagenette"
    if not backbone.exists():
        pytest.skip("the classifier is not there")
    model = TTameModel.from_pretrained(CARDS / "dinov2_small", backbone=backbone, strict=True)
    [explanation] = model.explain(ASSET.parent / "photographs" / "cat.jpg")
    assert explanation.map.std() > 0.1
    assert bool((model.head.class_counts > 0).all())


def test_its_config_is_the_shipped_ones():
    card, shipped = (
        json.loads((place / "config.json").read_text()) for place in (CARDS / "efficientnet_lite0", ASSET)
    )
    assert card.pop("num_labels") == len(shipped.pop("id2label"))
    for key in ("label2id", "transformers_version"):
        shipped.pop(key)
    assert card == shipped
    assert (CARDS / "efficientnet_lite0/training.json").read_text() == (ASSET / "training.json").read_text()


def test_facts_of_a_card(folder):
    card = render_card(folder, "org/mine")
    assert 'AutoModel.from_pretrained("org/mine")' in card
    assert "`ViTForImageClassification`, included" in card
    assert "| classes | 7 |" in card
    assert "`vit.layers.1.layernorm_before`" in card or "layernorm_before" in card
    size = sum(f.stat().st_size for f in folder.glob("model*.safetensors")) / 1e6
    assert f"{size:.1f} MB" in card
    assert "license" not in ModelCard(card).data.to_dict()  # nobody said which
    assert "- Head: not recorded" in card


def test_training_record_and_report(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "x")
    put(tmp_path / "x", "training.json", {"dataset": "org/pictures", "steps": 77, "last": {"total": 1.5}})
    put(
        tmp_path / "x",
        "report.json",
        {"images": 12, "data": "d", "methods": methods_of(ttame={"AD soft 50": 20.25}, rise={})},
    )
    card = render_card(tmp_path / "x")
    assert "- Data: org/pictures" in card
    assert "steps 77" in card
    row = next(line for line in card.splitlines() if "(this explainer)" in line)
    assert row.count("not measured") == 6  # the mean mask, four kinds of mask, and IC soft 50
    assert "20.2 / not measured" in row
    assert "- not measured" in card.split("beside the other maps")[1]  # no intervals in this report
    put(tmp_path / "x", "training.json", {"dataset": f"{HOME}/patients"})
    assert "/home" not in render_card(tmp_path / "x")


def test_a_report_of_ttame_compare(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "x")

    def entry(kind, drop, **cost):
        measure = {"mean": drop, "low": drop - 1, "high": drop + 1, "n": 40}
        measures = {"AD soft 50": measure, "ROAD MoRF accuracy": measure, "deletion black": {**measure, "n": 10}}
        if kind == "gradient":
            measures["IC soft 50"] = {**measure, "n": 12}
        return {"kind": kind, "measures": measures, **cost}

    cost = {"forward_passes": 1.0, "backward_passes": 0.0, "ms_per_map": 12.25, "times_ttame": 1.0}
    report = {
        "images": 40,
        "data": f"{HOME}/patients validation",
        "methods": {"ttame": entry("ours", 30.125, **cost), "gradcam": entry("gradient", 41.0)},
        "differences": {"gradcam": {"AD soft 50": {"mean": -11, "low": -13.25, "high": -8.75, "n": 40}}},
        "environment": {"device": "cpu"},
        "sanity": {"randomised": {"value": 0.5, "must": "< 0.3", "passed": False}},
        "pictures": {"ROAD": "road.png"},
    }
    put(tmp_path / "x", "report.json", report)
    card = render_card(tmp_path / "x")
    assert "40 photographs of a local folder" in card
    assert "| **ttame (this explainer)** | 40 | not measured | not measured | 30.1 / not measured |" in card
    assert "| gradcam | 40 / 12 | not measured |" in card, "a row says on how many it was measured"
    assert "- ROAD MoRF accuracy: 30.125 (29.125 to 31.125)" in card
    assert "| AD soft 50 | gradcam |  |  |" in card
    assert "| map | n | deletion black ↓ | forward | backward | ms | times T-TAME |" in card
    assert "| **ttame (this explainer)** | 10 | 30.125 | 1.0 | 0.0 | 12.2 | 1.0 |" in card
    assert "- randomised: 0.5, must be &lt; 0.3: **not passed**" in card
    assert {r.metric_type: r.metric_value for r in ModelCard(card).data.eval_results}["ad_soft_50"] == 30.125


@pytest.mark.parametrize("name", ["data/patients/Smith", f"{HOME}/Smith", "C:\\me\\Smith", "../Smith", "Smith", 3])
def test_the_name_of_a_folder_of_pictures_is_not_shown(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path / "x")
    put(tmp_path / "x", "training.json", {"dataset": name})
    assert "- Data: a local folder\n" in render_card(tmp_path / "x")


def test_methods_that_saw_fewer_photographs_are_shown_on_the_same_ones(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "x")

    def of(drop, n):
        return {"AD soft 100": {"mean": drop, "low": drop - 1, "high": drop + 1, "n": n}}

    def entry(drop, n, common):
        return {"kind": "gradient", "measures": of(drop, n), "measures_common": of(common, 25)}

    report = {"images": 40, "methods": {"ttame": entry(30.1, 40, 28.3), "slow": entry(27.2, 25, 27.2)}}
    put(tmp_path / "x", "report.json", report)
    first, second = render_card(tmp_path / "x").split("The same, on the photographs that every method explained:")
    assert "| **ttame (this explainer)** | 40 | not measured | 30.1 / not measured |" in first
    assert "| **ttame (this explainer)** | 25 | not measured | 28.3 / not measured |" in second
    assert "| slow | 25 | not measured | 27.2 / not measured |" in second
    report["methods"]["slow"] = entry(27.2, 40, 27.2)
    put(tmp_path / "x", "report.json", report)
    assert "The same, on the photographs" not in render_card(tmp_path / "x")


def test_only_numbers_of_this_explainer_are_its_figures(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "x")
    config = json.loads((tmp_path / "x/config.json").read_text())
    (tmp_path / "x/config.json").write_text(json.dumps({**config, "backbone": "org/vit"}))
    own = {"AD soft 50": 1.5, "IC soft 50": float("nan"), "ok": True}
    report = {"methods": methods_of(random={"AD soft 50": 99.0}, ttame=own)}
    put(tmp_path / "x", "report.json", report)
    card = render_card(tmp_path / "x")
    assert [result.metric_value for result in ModelCard(card).data.eval_results] == [1.5]
    assert "1.5 / not measured" in card
    assert "**ttame (this explainer)**" in card
    assert "; included |" in card
    put(tmp_path / "x", "report.json", {"methods": methods_of(random={"AD soft 50": 99.0})})
    assert "(this explainer)" not in render_card(tmp_path / "x")


@pytest.mark.parametrize("name", ["report.json", "training.json"])
def test_a_record_of_another_head_is_refused(folder, tmp_path, name):
    """The same folder trained on: its old report must not stand beside the new head, in no card and on no Hub."""
    shutil.copytree(folder, tmp_path / "x")
    put(tmp_path / "x", name, {"images": 12, "methods": methods_of(ttame={"AD soft 50": 20.25}), "steps": 77})
    assert re.search("20.2|steps 77", render_card(tmp_path / "x"))
    model = TTameModel.from_pretrained(tmp_path / "x")
    with torch.no_grad():
        model.head.fuser.bias += 0.5
    model.save_pretrained(tmp_path / "x")
    write_card(folder, output=tmp_path / "x/README.md")  # a card that is there already does not help
    for attempt in (render_card, lambda place: push_folder(place, "org/x", say=lambda line: None)):
        with pytest.raises(ValueError, match=f"{name} is about another head"):
            attempt(tmp_path / "x")
    (tmp_path / "x/card.json").write_text(json.dumps({"report": "other.json"}))  # the old one would still be sent
    with pytest.raises(ValueError, match=f"{name} is about another head"):
        render_card(tmp_path / "x")
    (tmp_path / "x" / name).write_text(json.dumps({"methods": methods_of(ttame={"AD soft 50": 1}), "steps": 77}))
    with pytest.raises(ValueError, match=f"{name} does not say which head it is about"):
        render_card(tmp_path / "x")


def test_a_report_alone_is_judged_by_the_configs_head():
    """The shipped explainer's card lies where no weights do."""
    assert fingerprint_of_folder(CARDS / "efficientnet_lite0") == fingerprint_of_folder(ASSET)


def test_the_fingerprint_of_a_head(folder):
    model = TTameModel.from_pretrained(folder)
    weights = model.head.state_dict()
    assert head_fingerprint(weights) == model.config.head_fingerprint == fingerprint_of_folder(folder)
    half = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
    assert head_fingerprint(half) == head_fingerprint(weights)
    counted = {**weights, "class_counts": weights["class_counts"] + 1}
    assert head_fingerprint(counted) == head_fingerprint(weights)
    assert head_fingerprint({**weights, "fuser.bias": weights["fuser.bias"] + 0.1}) != head_fingerprint(weights)


def test_what_compare_measured_is_shown_and_names_no_folder(folder, tmp_path, photo):
    pictures = tmp_path / "patients_smith"
    pictures.mkdir()
    for seed in range(2):
        photo(80, 70, seed).save(pictures / f"smith_{seed}.png")
    explainer = Path(shutil.copytree(folder, tmp_path / "x"))
    model = TTameModel.from_pretrained(explainer)
    plan = Plan(str(pictures), methods=("ttame",), metrics=("confidence",), batch_size=2)
    report = compare(model, plan, tmp_path / "out", progress=False)
    text = (tmp_path / "out/report.json").read_text()
    assert "smith" not in text
    assert "smith" not in (tmp_path / "out/report.md").read_text()
    shutil.copy(tmp_path / "out/report.json", explainer)
    card = render_card(explainer)
    assert "2 photographs of a local folder" in card
    own = report["methods"]["ttame"]["measures"]["AD soft 50"]
    assert f"- AD soft 50: {own['mean']:.3f} ({own['low']:.3f} to {own['high']:.3f})" in card
    check_contents(explainer, files_to_push(explainer, "model")[0])


def test_records_follow_their_head(folder, tmp_path):
    """What was measured and trained goes along, whoever saves or publishes the loaded explainer again."""
    shutil.copytree(folder, tmp_path / "x")
    put(tmp_path / "x", "measured.json", {"images": 12, "methods": methods_of(ttame={"AD soft 50": 20.25})})
    put(tmp_path / "x", "training.json", {"steps": 77})
    facts = {"license": "mit", "repo_id": "org/first", "report": "measured.json"}
    (tmp_path / "x/card.json").write_text(json.dumps(facts))
    model = TTameModel.from_pretrained(tmp_path / "x")
    shutil.rmtree(tmp_path / "x")
    copy.deepcopy(model).save_pretrained(tmp_path / "again", head_dtype=torch.float16)
    card = render_card(tmp_path / "again")
    assert "20.2 / not measured" in card
    assert "steps 77" in card
    assert "license: mit" in card
    assert "org/first" not in card
    with torch.no_grad():
        model.head.fuser.bias += 0.5  # another head
    model.save_pretrained(tmp_path / "other")
    assert {f.name for f in (tmp_path / "other").glob("*.json")} == {"config.json", "preprocessor_config.json"}


def test_records_do_not_follow_to_other_maps(folder, tmp_path):
    """The same head with another backbone, or another scaling of the map, was not measured."""
    shutil.copytree(folder, tmp_path / "x")
    put(tmp_path / "x", "report.json", {"images": 12, "methods": methods_of(ttame={"AD soft 50": 20.25})})
    put(tmp_path / "x", "training.json", {"steps": 77})
    with pytest.warns(UserWarning, match="are not those the head was trained on"):
        other = TTameModel.from_pretrained(tmp_path / "x", backbone=make_vit(seed=1))
    scaled = TTameModel.from_pretrained(tmp_path / "x")
    scaled.config.map_scaling = "logits"
    overridden = TTameModel.from_pretrained(tmp_path / "x", map_scaling="logits")
    for name, model in (("other", other), ("scaled", scaled), ("overridden", overridden)):
        model.save_pretrained(tmp_path / name)
        assert {f.name for f in (tmp_path / name).glob("*.json")} == {"config.json", "preprocessor_config.json"}, name
        assert "20.2" not in (tmp_path / name / "README.md").read_text()
    TTameModel.from_pretrained(tmp_path / "x").save_pretrained(tmp_path / "same")
    assert "20.2" in (tmp_path / "same/README.md").read_text()


@pytest.mark.parametrize("key", ["map_scaling", "backbone_fingerprint"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_report_of_other_maps_is_refused(folder, tmp_path, key, inside):
    shutil.copytree(folder, tmp_path / "x")
    own = json.loads((tmp_path / "x/config.json").read_text())[key]
    for value, right in ((own, True), ("logits", False)):
        facts = {"settings": {key: value}} if inside else {key: value}
        put(tmp_path / "x", "report.json", {"methods": methods_of(ttame={"AD soft 50": 20.25}), **facts})
        if right:
            assert "20.2" in render_card(tmp_path / "x")
        else:
            with pytest.raises(ValueError, match=f"about maps with {key} 'logits', the config here says"):
                render_card(tmp_path / "x")


@pytest.mark.parametrize(("classes", "shown"), [(1, 1), (2, 2), (7, 3)])
def test_the_printed_code_asks_for_no_more_classes_than_there_are(folder, tmp_path, classes, shown):
    shutil.copytree(folder, tmp_path / "x")
    config = json.loads((tmp_path / "x/config.json").read_text())
    config["id2label"] = {str(i): f"class {i}" for i in range(classes)}
    config["label2id"] = {f"class {i}": i for i in range(classes)}
    (tmp_path / "x/config.json").write_text(json.dumps(config))
    assert f'model.explain("photo.jpg", top_k={shown})' in render_card(tmp_path / "x")


def test_groups_that_were_not_measured_are_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "x")
    line = "Insertion and deletion, pointing game, latency, sanity checks: **not measured**."
    values = {"AD soft 50": 20.25, "ROAD MoRF accuracy": 3.0, "grid pointing": 50.0, "insertion black": None}
    put(tmp_path / "x", "report.json", {"methods": methods_of(ttame=values)})
    assert line in render_card(tmp_path / "x").splitlines()


def test_the_shipped_explainer_can_be_published_with_its_card(tmp_path):
    """As its card is written, under a Hub id, and with its reports."""
    target = Path(shutil.copytree(ASSET, tmp_path / "x"))
    names = {"report.json", "report_imagenet_samples.json", "card.json", "training.json"}
    for name in (names - {"training.json"}) | {"README.md"}:
        shutil.copy(CARDS / "efficientnet_lite0" / name, target)
    write_card(target, "org/ttame-lite0")
    sent = files_to_push(target, "model")[0]
    assert names <= {file.name for file in sent}
    check_contents(target, sent)
    # Two tables per report, and a third of the images that every method explained.
    assert (target / "README.md").read_text().count("ttame (this explainer)") == 6


def test_further_reports(folder, tmp_path):
    """Figures on other pictures stand below; they too must be about this head."""
    shutil.copytree(folder, tmp_path / "x")
    put(tmp_path / "x", "report.json", {"images": 12, "methods": methods_of(ttame={"AD soft 50": 20.25})})
    put(tmp_path / "x", "report_other.json", {"images": 34, "methods": methods_of(ttame={"AD soft 50": 31.5})})
    assert "31.5" not in render_card(tmp_path / "x")  # nobody asked
    (tmp_path / "x/card.json").write_text(json.dumps({"further_reports": {"report_other.json": "another set"}}))
    card = render_card(tmp_path / "x")
    assert "34 photographs of another set" in card
    assert card.index("20.2") < card.index("31.5")
    assert {r.metric_value for r in ModelCard(card).data.eval_results} == {20.25}
    write_card(tmp_path / "x")
    (tmp_path / "x/report_old.json").write_text('{"head_fingerprint": "of another"}')  # nobody named it
    sent, left_out = files_to_push(tmp_path / "x", "model")
    assert tmp_path / "x/report_other.json" in sent
    assert tmp_path / "x/report_old.json" in left_out
    for wrong in ({"report_missing.json": "x"}, {"../report_other.json": "x"}, {"report_other.json": 3}, ["x"]):
        (tmp_path / "x/card.json").write_text(json.dumps({"further_reports": wrong}))
        with pytest.raises(ValueError, match=r"further_reports|card\.json may hold"):
            render_card(tmp_path / "x")
    (tmp_path / "x/card.json").write_text(json.dumps({"further_reports": {"report_other.json": "another set"}}))
    (tmp_path / "x/report_other.json").write_text(json.dumps({"head_fingerprint": "0", "methods": {}}))
    with pytest.raises(ValueError, match=r"report_other\.json is about another head"):
        render_card(tmp_path / "x")


@pytest.mark.parametrize("name", ["patients_smith validation", f"{HOME}/x", "a/b/c test"])
def test_the_folder_of_a_report_is_not_named(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path / "x")
    put(
        tmp_path / "x", "report.json", {"images": 12, "data": name, "methods": methods_of(ttame={"AD soft 50": 20.25})}
    )
    card = render_card(tmp_path / "x")
    assert "12 photographs of a local folder" in card
    assert name.split()[0] not in card
    put(
        tmp_path / "x",
        "report.json",
        {"images": 12, "data": "org/set test", "methods": methods_of(ttame={"AD soft 50": 1})},
    )
    (tmp_path / "org/set").mkdir(parents=True)
    with contextlib.chdir(tmp_path):  # the same card, whatever lies in the current directory
        assert "12 photographs of org/set test" in render_card(tmp_path / "x")
    (tmp_path / "x/card.json").write_text(json.dumps({"measured_on": "a hospital's public set"}))
    assert "12 photographs of a hospital's public set" in render_card(tmp_path / "x")


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("report.json", {"methods": {"ttame": 3}}),
        ("report.json", {"methods": {"ttame": {}}, "differences": ["x"]}),
        ("report.json", {"methods": {"ttame": {}}, "sanity": {"x": 1}}),
        ("training.json", {"arguments": [1]}),
        ("training.json", {"last": 3}),
    ],
)
def test_records_of_another_form(folder, tmp_path, name, record):
    shutil.copytree(folder, tmp_path / "x")
    put(tmp_path / "x", name, record)
    with pytest.raises(ValueError, match="does not have the form"):
        render_card(tmp_path / "x")


def test_json_that_is_too_deep(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "x")
    (tmp_path / "x/report.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"report.json.*cannot be read as JSON"):
        render_card(tmp_path / "x")
    TTameModel.from_pretrained(tmp_path / "x")  # explains none the less


SECRETS = (
    f"{HOME}/patients/Smith_John/2021",
    "/".join(("", "gpfs", "hospital", "patients")),
    "~/patients/x",
    "C:\\me\\patients\\x",
    "D:\\patients",
    "file:///x/patients",
    "data:" + "/".join(("", "clinic", "patients")),
    "hf_" + "aZ9" * 10,
)


@pytest.mark.parametrize("secret", SECRETS)
def test_no_path_and_no_token_in_any_field(folder, tmp_path, secret):
    shutil.copytree(folder, tmp_path / "x")
    config = json.loads((tmp_path / "x/config.json").read_text())
    config |= {"backbone_included": False, "converted_from": secret, "head_license": secret}
    config["backbone_config"]["architectures"] = [secret]
    (tmp_path / "x/config.json").write_text(json.dumps(config))
    words = dict.fromkeys(
        (
            "status",
            "classifier",
            "classifier_origin",
            "measured_on",
            "measured_with",
            "training_data",
            "training_cost",
        ),
        f"by {secret} once",
    )
    words |= {"limits": [secret], "licences": {"data": secret}, "classifier_python": [f"x = '{secret}'"]}
    (tmp_path / "x/card.json").write_text(json.dumps({**words, "pictures": [{"path": "a.png", "caption": secret}]}))
    put(
        tmp_path / "x",
        "report.json",
        {"methods": methods_of(**{secret: {"AD soft 50": 1}, "ttame": {"AD soft 50": 1}})},
    )
    put(tmp_path / "x", "training.json", {"optimizer": secret, "last": {secret: 1}})
    card = render_card(tmp_path / "x")
    assert secret not in card
    for part in ("patients", "Smith", "2021"):
        assert part not in card.replace("arXiv 2403", "")


@pytest.mark.parametrize(
    "text",
    [
        "sheep and/or goats",
        "a grid of 28/14/7",
        "see https://www.apache.org/licenses/LICENSE-2.0 and http://x.y:80/a/b",
        "13.3 / 49.3 / x",
        "timm/resnet50 from model_cards/resnet50/README.md",
        "../../docs/demo.jpg",
        "[terms](/terms/of/use)",
        "<b>x</b>",
        "/tmp",
    ],
)
def test_what_is_no_path_stays(text):
    assert without_secrets(text) == text


def test_the_versions_of_the_training_are_words(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "x")
    machine = {"device": "cpu", "cores": 2, "versions": {"torch": "2.9.1", "timm": "1.0.20"}}
    put(tmp_path / "x", "training.json", {"seconds": 600, "machine": machine})
    assert "10 minutes (machine: device cpu, cores 2, torch 2.9.1, timm 1.0.20)" in render_card(tmp_path / "x")


def test_no_control_or_direction_characters_in_code(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "x")
    config = json.loads((tmp_path / "x/config.json").read_text())
    (tmp_path / "x/config.json").write_text(json.dumps({**config, "backbone_included": False}))
    own = {"classifier_python": ["if a:", "\tb = 'c\u202ed\x1be'"], "measured_with": "run\u2066 it\x07\n\tnow"}
    (tmp_path / "x/card.json").write_text(json.dumps(own))
    put(tmp_path / "x", "report.json", {"methods": methods_of(ttame={"AD soft 50": 1})})
    card = render_card(tmp_path / "x")
    assert "if a:\n    b = 'cde'\n" in card
    assert "    run it\n        now\n" in card
    assert all(c.isprintable() or c == "\n" for c in card)


@pytest.mark.parametrize("field", ["base_model", "datasets"])
def test_ids_in_the_metadata_are_ids(folder, tmp_path, field):
    shutil.copytree(folder, tmp_path / "x")
    for hostile in ("../x", f"{HOME}/x", "a\nlicense: mit"):
        (tmp_path / "x/card.json").write_text(json.dumps({field: [hostile] if field == "datasets" else hostile}))
        with pytest.raises(ValueError, match=r"Repo id must|repo_name"):
            render_card(tmp_path / "x")


HOSTILE = "x](http://evil) <script>alert(1)</script> | `rm -rf` \n# Heading ![p](http://evil/p.png) ---\nlicense: mit"


def test_hostile_text_has_no_power(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "x")
    config = json.loads((tmp_path / "x/config.json").read_text())
    config["backbone_config"]["architectures"] = [HOSTILE]
    config["backbone_fingerprint"] = HOSTILE
    config["feature_layers"][0]["name"] = HOSTILE
    config["id2label"]["0"] = HOSTILE
    (tmp_path / "x/config.json").write_text(json.dumps(config))
    methods = methods_of(**{HOSTILE: {"AD soft 50": HOSTILE}, "ttame": {}})
    put(tmp_path / "x", "report.json", {"images": HOSTILE, "data": HOSTILE, "methods": methods})
    put(tmp_path / "x", "training.json", {"dataset": HOSTILE, "steps": HOSTILE, "last": {HOSTILE: 1}})
    card = render_card(tmp_path / "x")
    _, front, body = card.split("---\n", 2)
    assert "license" not in yaml.safe_load(front)
    outside = re.sub(r"```.*?```", "", body, flags=re.DOTALL)
    outside = re.sub(r"`[^`\n]*`", "", outside.replace(r"\`", ""))
    assert "<script" not in outside
    assert not re.search(r"(?<!\\)\]\(http", outside)
    assert not re.search(r"^# Heading|^license:|^---", outside, re.MULTILINE)
    for line in outside.splitlines():
        if line.startswith("| ") and "classifier" in line:
            assert len(re.findall(r"(?<!\\)\|", line)) == 3


def test_nothing_becomes_a_link_or_turns_the_text_around():
    assert escape("see www.evil.com, mail a@b.com, http://x.y") == (
        "see www\u200b.evil.com, mail a\u200b@b.com, http:\u200b//x.y"
    )
    assert escape("a\u202eb\x00c\x1b[31m") == "abc\\[31m"
    assert code("a\u202eb") == "`ab`"


@pytest.mark.parametrize("text", ["a|b", "`", "[x](y)", "<b>", "$title", "a\n# b", "*x*_y_"])
def test_escaping(text):
    assert "\n" not in escape(text)
    assert not re.search(r"(?<!\\)[|`\[\]*_<>$#]", escape(text).replace("&lt;", "").replace("&gt;", ""))
    assert code(text).count("`") == 2
    assert "|" not in code(text)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"unheard": "x"}, "got 'unheard'"),
        ({"limits": "one"}, "got 'limits' of type str"),
        ({"report": "../../etc/report.json"}, "must be a .json file beside it"),
        ({"repo_id": "../x"}, "Repo id must"),
    ],
)
def test_card_json_is_checked(folder, tmp_path, own, message):
    shutil.copytree(folder, tmp_path / "x")
    (tmp_path / "x/card.json").write_text(json.dumps(own))
    with pytest.raises(ValueError, match=message):
        render_card(tmp_path / "x")


def test_code_from_card_json_stays_in_its_block(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "x")
    config = json.loads((tmp_path / "x/config.json").read_text())
    (tmp_path / "x/config.json").write_text(json.dumps({**config, "backbone_included": False}))
    lines = ["```", "# <script>", "backbone = 1"]
    (tmp_path / "x/card.json").write_text(json.dumps({"classifier_python": lines}))
    card = render_card(tmp_path / "x")
    assert card.count("```") == 4  # the code and the citation


def test_no_explainer(tmp_path):
    with pytest.raises(ValueError, match="holds no explainer"):
        write_card(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json.*cannot be read as JSON"):
        write_card(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_writing(folder, tmp_path):
    target = write_card(folder, output=tmp_path / "cards" / "one.md")
    assert GENERATED in target.read_text()
    assert [p.name for p in target.parent.iterdir()] == ["one.md"]
    assert target.stat().st_mode & 0o044  # others may read it, as the umask allows
