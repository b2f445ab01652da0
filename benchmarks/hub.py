"""Sizes of explainer repositories, time to the first map, reload equality and the fault table, on a loopback Hub.

    python benchmarks/hub.py --dinov2 FOLDER --output benchmarks/hub.json

Needs the `test` extra. Sizes: an explainer saved as `ttame push` sends it, card included, head in float32 and in
float16; VGG-16, ResNet-50 and ViT-B/16 have random weights, which are as large. Times: EfficientNet-Lite0 (timm form)
and, where the folder is given, DINOv2-S (transformers form) in a fresh process, from the Hub on loopback with an empty
cache, and again with a full one. Without --dinov2 its size is that of random weights and its time is not measured.
Ends in one JSON line.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
ORG = "bench"


def first_map(repo_id: str, photo: str) -> dict[str, Any]:
    """In a fresh process: seconds to import, to load, to the first map; and the maps themselves."""
    began = time.perf_counter()
    import numpy as np
    import torch

    from hf_ttame import TTameModel

    imported = time.perf_counter()
    model = TTameModel.from_pretrained(repo_id)
    loaded = time.perf_counter()
    explanation = model.explain(photo)[0]
    done = time.perf_counter()
    size = model.config.image_size
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        maps = model(x, class_ids=[[0, 1], [2, 3]]).map_logits
    np.save("maps.npy", maps.numpy())
    return {
        "import s": round(imported - began, 2),
        "from_pretrained s": round(loaded - imported, 2),
        "first map s": round(done - loaded, 2),
        "map": list(explanation.map.shape),
    }


def repository_size(model: Any, dtype: Any) -> int:
    from hf_ttame.cards import write_card
    from hf_ttame.hub import files_to_push

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, include_backbone=False, head_dtype=dtype)
        write_card(folder, f"{ORG}/explainer")
        return sum(file.stat().st_size for file in files_to_push(Path(folder), "model")[0])


def _portable(text: str, folder: str, url: str) -> str:
    """Without the names of this run's folder and server, and of the site whose manual an error points to."""
    return re.sub(r"https://\S+?/docs", "DOCS", text.replace(folder, "WORK").replace(url, "HUB"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dinov2", type=Path, help="DINOv2-S classifier in transformers form")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--skip-sizes", action="store_true")
    parser.add_argument("--client", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client:
        print(json.dumps(first_map(*arguments.client)))
        return

    import numpy as np
    import torch
    from conftest import make_vit, vit_processor
    from hub_contents import fill
    from hub_server import running_hub
    from timm.models._hub import save_for_hf
    from transformers import Dinov2Config, Dinov2ForImageClassification

    from hf_ttame import TTameModel
    from hf_ttame.backbones import wrap_backbone
    from hf_ttame.demo import EXPLAINER, PHOTOGRAPHS, load_efficientnet_lite0
    from hf_ttame.image_processing import processor_from_timm

    def explainer(name: str) -> Any:
        if name == "EfficientNet-Lite0":
            return TTameModel.from_pretrained(EXPLAINER, backbone=load_efficientnet_lite0())
        if name == "DINOv2-S" and arguments.dinov2:
            return TTameModel.from_backbone(arguments.dinov2)
        if name == "DINOv2-S":
            config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=224, num_labels=10)
            cfg = {"input_size": (3, 224, 224), "mean": (0.5,) * 3, "std": (0.5,) * 3}
            return TTameModel.from_backbone(Dinov2ForImageClassification(config), processor=processor_from_timm(cfg))
        return TTameModel.from_backbone(name, pretrained=False, head_init="random")

    report: dict[str, Any] = {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
    if not arguments.skip_sizes:
        names = ("EfficientNet-Lite0", "DINOv2-S", "vgg16", "resnet50", "vit_base_patch16_224")
        report["repository MB"] = {}
        for name in names:
            model = explainer(name)
            model.config.backbone, model.config.backbone_revision = f"{ORG}/backbone", "0" * 40
            sizes = [repository_size(model, dtype) for dtype in (torch.float32, torch.float16)]
            report["repository MB"][name] = {
                "classes": model.config.num_labels,
                "float32": round(sizes[0] / 1e6, 2),
                "float16": round(sizes[1] / 1e6, 2),
            }
            print(f"{name:22s} {report['repository MB'][name]}", file=sys.stderr)

    with running_hub() as hub, tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        report["first map"] = {}
        for name in ["EfficientNet-Lite0", *(["DINOv2-S"] if arguments.dinov2 else [])]:
            model = explainer(name)
            slug = name.lower()
            if name == "DINOv2-S":
                commit = hub.put(f"{ORG}/{slug}", arguments.dinov2)
            else:
                module = wrap_backbone(model.backbone).model.timm_model
                save_for_hf(module, str(work / slug), safe_serialization=True)
                commit = hub.put(f"{ORG}/{slug}", work / slug)
            model.config.backbone, model.config.backbone_revision = f"{ORG}/{slug}", commit
            model.save_pretrained(work / f"{slug}-explainer", include_backbone=False)
            hub.put(f"{ORG}/ttame-{slug}", work / f"{slug}-explainer")
            x = torch.randn(2, 3, *model.config.image_size, generator=torch.Generator().manual_seed(5))
            with torch.no_grad():
                expected = model(x, class_ids=[[0, 1], [2, 3]]).map_logits.numpy()
            del model
            for cache in ("empty", "full"):
                command = [sys.executable, __file__, "--client", f"{ORG}/ttame-{slug}", str(PHOTOGRAPHS / "cat.jpg")]
                environment = {**hub.environment(work / f"home-{slug}"), "PYTHONPATH": str(ROOT)}
                environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # other counts round differently
                done = subprocess.run(
                    command, env=environment, cwd=work, stdout=subprocess.PIPE, text=True, check=True
                )
                found = json.loads(done.stdout.splitlines()[-1])
                found["equal to the bit"] = bool(np.array_equal(np.load(work / "maps.npy"), expected))
                report["first map"][f"{name}, {cache} cache"] = found
                print(f"{name}, {cache} cache: {found}", file=sys.stderr)

        make_vit().save_pretrained(work / "tiny-vit")
        vit_processor().save_pretrained(work / "tiny-vit")
        fill(hub, work, work / "tiny-vit")
        for task in ("push", "faults"):
            environment = hub.environment(work / f"home-{task}", HF_HUB_DOWNLOAD_TIMEOUT="1", PYTHONPATH=str(ROOT))
            subprocess.run(
                [sys.executable, str(ROOT / "tests" / "hub_client.py"), task, str(work)],
                env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        columns = ("where", "fault", "faults met", "seconds", "outcome", "the next one")
        table = json.loads((work / "faults.json").read_text())["table"]
        report["faults"] = [
            dict(
                zip(
                    columns,
                    [_portable(cell, folder, hub.url) if isinstance(cell, str) else cell for cell in row],
                    strict=True,
                )
            )
            for row in table
        ]
        for row in report["faults"]:
            print(f"{row['where'][:60]:60s} {row['fault']:14s} {row['outcome'][:90]!r}", file=sys.stderr)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
