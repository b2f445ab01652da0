"""AD and IC of an explainer beside random, centre Gaussian and Grad-CAM, on the same images in the same run.

    python benchmarks/confidence.py --model DIR --backbone efficientnet-lite0 --dataset FOLDER --split validation

Measured as in hf_ttame.metrics.confidence: soft and binary masks, 100, 50 and 15 percent. The random map is 7 x 7
uniform noise, the Gaussian has a standard deviation of a quarter of the side. Grad-CAM comes from the package
`grad-cam`, on the explainer's last feature layer and on the last stage or block, which need not be the same. Paired 95
percent bootstrap intervals of the difference to each other method stand beside the figures. Ends in one JSON line;
--output writes it, indented, to a file too. For a slow classifier, --methods leaves methods out and --precision
bfloat16 runs every pass under autocast.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from tqdm import tqdm

from hf_ttame import TTameModel
from hf_ttame.demo import load_efficientnet_lite0
from hf_ttame.features import inner_module, probe_layers
from hf_ttame.image_processing import preprocess
from hf_ttame.layer_choice import default_layers
from hf_ttame.metrics import judge_by, masked_confidence, paired_interval
from hf_ttame.metrics.confidence import drops, increases
from hf_ttame.pictures import decode, image_column, open_stream
from hf_ttame.records import head_fingerprint

METHODS = ("random", "gaussian", "gradcam", "ttame")


class Logits(nn.Module):
    """The classifier as grad-cam wants it: pixel values to a logits tensor."""

    def __init__(self, model: TTameModel):
        super().__init__()
        self.backbone = model.backbone
        self.classify = model.classify

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.classify(pixel_values).float()


def gaussian(size: int = 28) -> torch.Tensor:
    axis = torch.linspace(-1, 1, size)
    return torch.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / (2 * 0.5**2))


def interval(ours: torch.Tensor, theirs: torch.Tensor) -> list[float]:
    found = paired_interval(ours.numpy(), theirs.numpy())
    assert found is not None
    return [round(found.low, 2), round(found.high, 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--backbone", help="folder, or efficientnet-lite0: the one from its package")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--where-label", help="COLUMN%%N==R: only rows whose column modulo N is R")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated; ttame is always there")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of every pass")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    methods = {"ttame", *arguments.methods.replace(" ", "").split(",")}
    if unknown := methods - set(METHODS):
        parser.error(f"--methods must be of {', '.join(METHODS)}, got {', '.join(sorted(unknown))}")

    backbone = load_efficientnet_lite0() if arguments.backbone == "efficientnet-lite0" else arguments.backbone
    model = TTameModel.from_pretrained(arguments.model, backbone=backbone).to(memory_format=torch.channels_last)
    dataset = open_stream(arguments.dataset, arguments.split)
    column = image_column(dataset)
    examples = list(dataset)
    if arguments.where_label:
        name, _, rule = arguments.where_label.partition("%")
        modulus, rest = map(int, rule.split("=="))
        examples = [example for example in examples if example[name] % modulus == rest]
    examples = examples[: arguments.limit]

    shape = (2, len(model.config.pixel_scale), *model.config.image_size)
    blank = torch.zeros(shape)
    names = dict.fromkeys([model.layers[-1].name, default_layers(model.backbone, blank)[-1]])
    cam_layers = probe_layers(model.backbone, list(names), blank)
    # grad-cam needs parameters that ask for gradients; they are never stepped.
    logits = Logits(model)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, dict[str, list[torch.Tensor]]] = {}
    confidences = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            torch.autocast(model.device.type, torch.bfloat16, enabled=arguments.precision == "bfloat16")
        )
        gradcams = {
            f"gradcam {layer.name}": stack.enter_context(
                GradCAM(
                    model=logits,
                    target_layers=[inner_module(model.backbone).get_submodule(layer.name)],
                    reshape_transform=None if layer.layout == "NCHW" else layer.to_maps,
                )
            )
            for layer in cam_layers
            if "gradcam" in methods
        }
        for start in tqdm(range(0, len(examples), arguments.batch_size), unit="batch"):
            pictures = [decode(example[column]) for example in examples[start : start + arguments.batch_size]]
            pixel_values = preprocess(model.image_processor, pictures).to(memory_format=torch.channels_last)
            with torch.no_grad():
                output = model(pixel_values)
            targets = output.logits.argmax(dim=1)
            confidences.append(output.logits.float().softmax(dim=1)[torch.arange(len(targets)), targets])
            # grad-cam leaves parameters without requires_grad alone: gradients reach its layer through the input.
            wanted = [ClassifierOutputTarget(int(target)) for target in targets]
            cams = {
                name: torch.from_numpy(gradcam(pixel_values.clone().requires_grad_(), wanted))
                for name, gradcam in gradcams.items()
            }
            maps: dict[str, torch.Tensor] = {
                "random": torch.rand(len(targets), 7, 7, generator=generator),
                "gaussian": gaussian().expand(len(targets), -1, -1),
                **cams,
                "ttame sigmoid": output.map_logits[:, 0].float().sigmoid(),
                "ttame logits": output.map_logits[:, 0].float(),
            }
            with torch.no_grad():
                for method, batch in maps.items():
                    if method.split()[0] not in methods:
                        continue
                    measured = masked_confidence(judge_by(logits), pixel_values, targets, batch, model.fill())
                    for name, masked in measured.items():
                        found.setdefault(method, {}).setdefault(name, []).append(masked)

    p = torch.cat(confidences)
    own = f"ttame {model.config.map_scaling}"
    values: dict[str, dict[str, torch.Tensor]] = {}
    for method, per_batch in found.items():
        joined = {name: torch.cat(parts) for name, parts in per_batch.items()}
        values[method] = {"mean mask": joined.pop("mean")}
        for name, masked in joined.items():
            values[method][f"AD {name}"] = drops(p, masked)
            values[method][f"IC {name}"] = increases(p, masked)
    report: dict[str, Any] = {
        "images": len(p),
        "head_fingerprint": head_fingerprint(model.head.state_dict()),
        "backbone_fingerprint": model.config.backbone_fingerprint,
        "dataset": f"{Path(arguments.dataset).name} {arguments.split} {arguments.where_label or ''}".strip(),
        "map_scaling": model.config.map_scaling,
        "precision": arguments.precision,
        "methods": {
            method: {name: round(float(v.mean()), 2) for name, v in table.items()} for method, table in values.items()
        },
        "difference_to_ttame_95": {
            method: {name: interval(values[own][name], v) for name, v in table.items()}
            for method, table in values.items()
            if not method.startswith("ttame")
        },
    }
    columns = [name for name in values[own] if name != "mean mask"]
    print(f"{'':18s}{'mean':>6s}" + "".join(f"{name:>14s}" for name in columns), file=sys.stderr)
    for method, table in report["methods"].items():
        cells = "".join(f"{table[name]:14.1f}" for name in columns)
        print(f"{method:18s}{table['mean mask']:6.2f}{cells}", file=sys.stderr)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
