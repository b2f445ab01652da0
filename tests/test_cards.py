"""Cards: what they say, that they are those in the repository, and that hostile text in a config has no power."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_ttame import TTameModel
from hf_ttame.cards import GENERATED, code, escape, render_card, write_card

CARDS = Path(__file__).parents[1] / "model_cards"
ASSET = Path(__file__).parents[1] / "hf_ttame" / "assets" / "efficientnet_lite0"
WRITTEN = ("vgg16", "resnet50", "vit_b_16", "efficientnet_lite0", "dinov2_small")
HOME = "/".join(("", "home", "me"))  # an invented home folder


@pytest.fixture(scope="module")
def folder(vit_folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("cards") / "explainer"
    TTameModel.from_backbone(vit_folder).save_pretrained(target)
    return target


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


@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "efficientnet_lite0"])
def test_a_card_without_a_report_has_no_figures(name):
    text = (CARDS / name / "README.md").read_text()
    figures = text.split("## Figures")[1].split("## Pictures")[0]
    assert "**not measured**" in figures
    assert not re.search(r"\d", figures)
    assert "model-index" not in text
    assert "- Cost: not measured" in text
    assert "How faithful these maps are was not measured." in text


def test_the_shipped_explainers_card_has_its_measured_figures():
    report = json.loads((CARDS / "efficientnet_lite0/confidence_imagenette_validation.json").read_text())
    text = (CARDS / "efficientnet_lite0/README.md").read_text()
    own = report["methods"]["ttame sigmoid"]
    row = next(line for line in text.splitlines() if "ttame sigmoid (this explainer)" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")][2:]
    expected = [(own[f"AD {m}"], own[f"IC {m}"]) for m in ("soft 100", "soft 50", "soft 15", "binary 50", "binary 15")]
    assert cells == [f"{drop:.1f} / {increase:.1f}" for drop, increase in expected]
    low, high = report["difference_to_ttame_95"]["gradcam blocks.6"]["AD soft 50"]
    assert f"AD soft 50 {low:.1f} to {high:.1f}" in text
    results = {result.metric_type: result.metric_value for result in ModelCard(text).data.eval_results}
    assert results["ad_soft_100"] == own["AD soft 100"]
    assert len(results) == len(own)


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
    (tmp_path / "x/training.json").write_text(
        json.dumps({"dataset": "org/pictures", "steps": 77, "last": {"total": 1.5}})
    )
    (tmp_path / "x/report.json").write_text(
        json.dumps({"images": 12, "dataset": "d", "methods": {"ttame": {"AD soft 50": 20.25}, "rise": {}}})
    )
    card = render_card(tmp_path / "x")
    assert "- Data: org/pictures" in card
    assert "steps 77" in card
    row = next(line for line in card.splitlines() if "(this explainer)" in line)
    assert row.count("not measured") == 6  # the mean mask, four kinds of mask, and IC soft 50
    assert "20.2 / not measured" in row
    assert "- not measured" in card.split("Paired")[1]  # no intervals in this report
    (tmp_path / "x/training.json").write_text(json.dumps({"dataset": f"{HOME}/patients"}))
    assert "/home" not in render_card(tmp_path / "x")


def test_a_report_of_ttame_compare(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "x")

    def entry(kind, drop, **cost):
        measure = {"mean": drop, "low": drop - 1, "high": drop + 1, "n": 40}
        return {"kind": kind, "measures": {"AD soft 50": measure, "ROAD MoRF accuracy": measure}, **cost}

    cost = {"forward_passes": 1.0, "backward_passes": 0.0, "ms_per_map": 12.25}
    report = {
        "images": 40,
        "data": f"{HOME}/patients validation",
        "methods": {"ttame": entry("ours", 30.125, **cost), "gradcam": entry("gradient", 41.0)},
        "differences": {"gradcam": {"AD soft 50": {"mean": -11, "low": -13.25, "high": -8.75, "n": 40}}},
        "environment": {"device": "cpu"},
        "sanity": {"randomised": {"value": 0.5, "must": "< 0.3", "passed": False}},
        "pictures": {"ROAD": "road.png"},
    }
    (tmp_path / "x/report.json").write_text(json.dumps(report))
    card = render_card(tmp_path / "x")
    assert "40 photographs of a local folder" in card
    assert "| **ttame (this explainer)** | not measured | not measured | 30.1 / not measured |" in card
    assert "- ROAD MoRF accuracy: 30.125 (29.125 to 31.125)" in card
    assert "- gradcam: AD soft 50 -13.2 to -8.8" in card
    assert "| ttame | 1.0 | 0.0 | 12.2 |" in card
    assert "- randomised: 0.5, must be &lt; 0.3: **not passed**" in card
    assert {r.metric_type: r.metric_value for r in ModelCard(card).data.eval_results}["ad_soft_50"] == 30.125


@pytest.mark.parametrize("name", ["data/patients/Smith", f"{HOME}/Smith", "C:\\me\\Smith", "../Smith", "Smith", 3])
def test_the_name_of_a_folder_of_pictures_is_not_shown(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path / "x")
    (tmp_path / "x/training.json").write_text(json.dumps({"dataset": name}))
    assert "- Data: a local folder\n" in render_card(tmp_path / "x")


def test_only_numbers_of_this_explainer_are_its_figures(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "x")
    config = json.loads((tmp_path / "x/config.json").read_text())
    (tmp_path / "x/config.json").write_text(json.dumps({**config, "backbone": "org/vit"}))
    own = {"AD soft 50": 1.5, "IC soft 50": float("nan"), "ok": True}
    report = {"methods": {"ttame random": {"AD soft 50": 99.0}, "ttame": own}}
    (tmp_path / "x/report.json").write_text(json.dumps(report))
    card = render_card(tmp_path / "x")
    assert [result.metric_value for result in ModelCard(card).data.eval_results] == [1.5]
    assert "1.5 / not measured" in card
    assert "**ttame (this explainer)**" in card
    assert "; included |" in card
    (tmp_path / "x/report.json").write_text(json.dumps({"methods": {"ttame random": {"AD soft 50": 99.0}}}))
    assert "(this explainer)" not in render_card(tmp_path / "x")


HOSTILE = "x](http://evil) <script>alert(1)</script> | `rm -rf` \n# Heading ![p](http://evil/p.png) ---\nlicense: mit"


def test_hostile_text_has_no_power(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "x")
    config = json.loads((tmp_path / "x/config.json").read_text())
    config["backbone_config"]["architectures"] = [HOSTILE]
    config["backbone_fingerprint"] = HOSTILE
    config["feature_layers"][0]["name"] = HOSTILE
    config["id2label"]["0"] = HOSTILE
    (tmp_path / "x/config.json").write_text(json.dumps(config))
    (tmp_path / "x/report.json").write_text(
        json.dumps({"images": HOSTILE, "dataset": HOSTILE, "methods": {HOSTILE: {"AD soft 50": HOSTILE}, "ttame": {}}})
    )
    (tmp_path / "x/training.json").write_text(json.dumps({"dataset": HOSTILE, "steps": HOSTILE, "last": {HOSTILE: 1}}))
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
        ({"report": "../../etc/report.json"}, "must lie beside it"),
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
