"""The config: round trips, and an error for every fact that cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from hf_ttame import TTameConfig
from hf_ttame.configuration_ttame import FORMAT_VERSION

LAYER: dict[str, Any] = {
    "name": "layer4",
    "channels": 2048,
    "grid": [7, 7],
    "layout": "NCHW",
    "prefix_tokens": 0,
    "clone": False,
}
FACTS: dict[str, Any] = {
    "backbone": "timm/resnet50.a1_in1k",
    "backbone_revision": "0123abc",
    "backbone_included": True,
    "backbone_fingerprint": "f00d",
    "backbone_config": {"architecture": "resnet50", "num_classes": 3},
    "feature_layers": [
        LAYER,
        {**LAYER, "name": "blocks.11.norm1", "layout": "tokens", "prefix_tokens": 1, "clone": True},
    ],
    "image_size": [192, 256],
    "pixel_scale": [4.0, 5.0, 6.5],
    "pixel_shift": [-2.0, -2.25, -1.5],
    "map_size": [24, 32],
    "skip_connection": False,
    "batch_norm": False,
    "branch_activation": "sigmoid",
    "last_layer_relu": False,
    "class_token": "multiply",
    "head_init": "classifier",
    "map_scaling": "sigmoid",
}


def facts_of(config: TTameConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in (*FACTS, "format_version")}


@pytest.mark.parametrize("loader", [TTameConfig, AutoConfig], ids=["TTameConfig", "AutoConfig"])
@pytest.mark.parametrize("facts", [FACTS, {}], ids=["all set", "defaults"])
def test_saving_and_loading_keeps_every_fact(tmp_path: Path, facts: dict[str, Any], loader: Any) -> None:
    labels = {0: "cat", 1: "dog", 2: "owl"}
    config = TTameConfig(**facts, id2label=labels)
    config.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is TTameConfig
    assert facts_of(loaded) == facts_of(config)
    assert facts_of(loaded).items() >= facts.items()
    assert loaded.id2label == labels
    assert loaded.num_labels == 3


def test_the_file_states_every_fact_even_where_it_is_the_default(tmp_path: Path) -> None:
    TTameConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "ttame"
    assert written.keys() >= {*FACTS, "format_version"}


def test_default_construction() -> None:
    config = TTameConfig()
    assert config.format_version == FORMAT_VERSION
    assert config.feature_layers == []
    assert (config.skip_connection, config.batch_norm, config.last_layer_relu) == (True, True, True)
    assert (config.branch_activation, config.class_token, config.head_init) == ("relu", "drop", "random")


def test_a_config_shares_nothing_with_its_arguments() -> None:
    layer, size = dict(LAYER), [14, 14]
    config = TTameConfig(feature_layers=[layer], map_size=size)
    layer["name"], size[0] = "other", 1
    assert config.feature_layers == [LAYER]
    assert config.map_size == [14, 14]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"format_version": FORMAT_VERSION + 1}, "format_version.*pip install -U"),
        ({"format_version": 0}, "format_version"),
        ({"branch_activation": "gelu"}, "branch_activation must be one of .*'gelu'"),
        ({"branch_activation": None}, "branch_activation"),
        ({"class_token": "keep"}, "class_token must be one of .*'keep'"),
        ({"head_init": "zeros"}, "head_init must be one of .*'zeros'"),
        ({"map_scaling": "softmax"}, "map_scaling must be one of .*'softmax'"),
        ({"image_size": [224]}, "image_size must be"),
        ({"image_size": [224, 0]}, "image_size must be"),
        ({"map_size": [14, 14, 14]}, "map_size must be"),
        ({"map_size": [-1, 14]}, "map_size must be"),
        ({"map_size": [28, 10**6]}, "both in 1..8192"),
        ({"num_labels": 10**9}, "num_labels must lie in"),
        ({"transformers_weights": "adapter_model.bin"}, "could be a pickle"),
        ({"pixel_scale": [1.0, 0.0, 1.0]}, "no scale may be 0"),
        ({"pixel_scale": [1.0]}, "one entry per channel"),
        ({"pixel_shift": [0.0, 0.0]}, "one entry per channel"),
        ({"feature_layers": [{**LAYER, "layout": "NCWH"}]}, "layout of feature layer 'layer4'"),
        ({"feature_layers": [LAYER, {**LAYER, "channels": 0}]}, "channels >= 1"),
        ({"feature_layers": [{**LAYER, "grid": [7]}]}, "grid"),
        ({"feature_layers": [{**LAYER, "grid": [7, 0]}]}, "grid"),
        *(
            ({"feature_layers": [{key: value for key, value in LAYER.items() if key != name}]}, rf"lacks \['{name}'\]")
            for name in LAYER
        ),
    ],
    ids=str,
)
def test_impossible_facts_raise(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TTameConfig(**facts)


def test_loading_a_newer_format_says_what_to_do(tmp_path: Path) -> None:
    TTameConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": FORMAT_VERSION + 1}))
    with pytest.raises(ValueError, match="pip install -U hf-ttame"):
        TTameConfig.from_pretrained(tmp_path)
