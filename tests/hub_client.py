"""What a user does with the Hub, in a fresh process: `python hub_client.py TASK WORK`, results in WORK/TASK.json.

The server's address is in HF_ENDPOINT. Several steps share a process because the imports take seconds.
"""

import hashlib
import json
import os
import sys
import time
import traceback
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
from PIL import Image

WORK = Path(sys.argv[2]) if len(sys.argv) > 2 else Path()
TOKEN = os.environ.get("HF_TOKEN", "")


def ask(path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(os.environ["HF_ENDPOINT"] + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.loads(response.read())


def outcome(action: Callable[[], Any]) -> str:
    """ "ok", or the kind and text of the error."""
    try:
        action()
    except Exception as error:
        if TOKEN and TOKEN in "".join(traceback.format_exception(error)):
            return "THE TOKEN IS IN THE TRACEBACK"
        return f"{type(error).__name__}: {error}"
    return "ok"


def pixels(size: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(5))


def maps(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(pixels(model.config.image_size[0]), class_ids="all").map_logits


def seed_head(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.head.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 + 0.1)
    return model


def push() -> dict[str, Any]:
    """Explainers of a transformers and a timm repository; a dataset, a Space, a branch, a pull request."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

    found: dict[str, Any] = {"lines": []}
    found["not asked"] = outcome(lambda: AutoModel.from_pretrained("org/ready", trust_remote_code=False))
    found["processor, not imported"] = type(AutoImageProcessor.from_pretrained("org/ready")).__name__
    found["imported"] = "hf_ttame" in sys.modules
    remote = AutoModel.from_pretrained("org/ready", trust_remote_code=True)
    found["remote"] = [type(remote).__module__, remote.backbone is not None]
    found["remote config"] = type(AutoConfig.from_pretrained("org/ready", trust_remote_code=True)).__module__
    classifier = AutoModelForImageClassification.from_pretrained("org/ready", trust_remote_code=True)
    found["remote classifier"] = bool(torch.equal(classifier(pixels()).logits, remote(pixels()).logits))

    from hf_ttame import TTameModel
    from hf_ttame.hub import push_folder

    found["same class"] = type(remote) is TTameModel
    named = TTameModel.from_pretrained("org/ready", backbone="org/tiny-vit", strict=True)  # it had it included
    found["named"] = [named.config.backbone, named.config.backbone_revision]
    say = found["lines"].append
    for name, backbone in (("vit", "org/tiny-vit"), ("timm", "timm/tiny-resnet")):
        model = seed_head(TTameModel.from_backbone(backbone))
        found[f"revision {name}"] = model.config.backbone_revision
        np.save(WORK / f"{name}.npy", maps(model).numpy())
        info = model.push_to_hub(f"org/ttame-{name}", private=name == "timm", say=say)
        found[f"commit {name}"] = info.oid
        model.save_pretrained(WORK / name)
        if name == "vit":
            model.save_pretrained(WORK / "whole", include_backbone=True, max_shard_size="5KB")
            model.push_to_hub("org/ttame-whole", include_backbone=True, head_dtype=torch.float16, say=say)
            model.push_to_hub("org/ttame-vit", revision="v2", say=say)
            found["pr"] = model.push_to_hub("org/ttame-vit", create_pr=True, say=say).pr_url
            # A repository that exists, and a token that may write to it but not create any.
            ask("/_test/fault", {"kind": "403", "match": "POST /api/repos/create", "times": 9})
            found["no create"] = outcome(lambda: model.push_to_hub("org/ttame-vit", say=say))  # noqa: B023
            found["no repository"] = outcome(lambda: model.push_to_hub("org/ttame-new", say=say))  # noqa: B023
            ask("/_test/fault", {})
    again = TTameModel.from_pretrained("org/measured")
    again.push_to_hub("org/measured-again", include_backbone=False, head_dtype=torch.float16, say=say)
    with torch.no_grad():
        again.head.fuser.bias += 0.5
    again.push_to_hub("org/measured-other", include_backbone=False, say=say)
    measured = TTameModel.from_pretrained("org/measured")
    measured.save_pretrained(WORK / "records", include_backbone=False)
    (WORK / "records" / "report.json").rename(WORK / "records" / "measured.json")
    (WORK / "records" / "card.json").write_text(json.dumps({"report": "measured.json"}))
    push_folder(WORK / "records", "org/records", say=say)
    found["records before"] = huggingface_hub.list_repo_files("org/records")
    again.push_to_hub("org/records", include_backbone=False, say=say)
    again.push_to_hub("org/own-card", include_backbone=False, say=say)
    ask("/_test/fault", {"kind": "500", "match": "POST .*/commit/", "times": 1})
    found["pr, 500"] = outcome(lambda: again.push_to_hub("org/measured-other", create_pr=True, say=say))
    found["pr, 500 hits"] = ask("/_test/hits")["hits"]
    ask("/_test/fault", {})
    with warnings.catch_warnings(record=True) as caught:
        pickled = TTameModel.from_backbone("org/pickled-vit")
        found["pickled"] = [str(warning.message) for warning in caught if "pickle" in str(warning.message)]
    pickled.push_to_hub("org/ttame-of-pickled", say=say)
    found["evil pickle"] = outcome(lambda: TTameModel.from_backbone("org/evil-vit"))
    for what, token in (("a line's end", TOKEN + "\n"), ("a letter", TOKEN + "\u00e9")):
        found[f"token with {what}"] = [
            outcome(lambda: TTameModel.from_pretrained("org/ttame-vit", token=token)),  # noqa: B023
            outcome(lambda: TTameModel.from_backbone("org/tiny-vit", token=token)),  # noqa: B023
            outcome(lambda: push_folder(WORK / "vit", "org/ttame-vit", token=token, say=say)),  # noqa: B023
        ]
    from typer.testing import CliRunner

    from hf_ttame.cli import app

    command = ["push", str(WORK / "vit"), "org/by-command", "--private", "--message", "From the command"]
    done = CliRunner().invoke(app, command)
    found["command"] = [done.exit_code, done.output]
    for n, (kind, match) in enumerate([("500", "POST /api/repos/create"), ("429", "POST .*/branch/")]):
        ask("/_test/fault", {"kind": kind, "match": match, "times": 1})
        found[f"patient {n}"] = outcome(
            lambda: push_folder(WORK / "vit", f"org/patient-{n}", revision="b", say=say)  # noqa: B023
        )
        ask("/_test/fault", {})
    found["private"] = outcome(lambda: push_folder(WORK / "vit", "org/public", private=True, say=say))
    push_folder(WORK / "whole", "org/stale", say=say)
    push_folder(WORK / "vit", "org/stale", say=say)
    found["dataset"] = push_folder(WORK / "maps", "org/maps", say=say).oid
    found["space"] = push_folder(WORK / "space", "org/space", say=say).oid
    return found


def load() -> dict[str, Any]:
    """Every way to load; the printed code of cards; errors a user meets."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline

    from hf_ttame import TTameModel

    found: dict[str, Any] = {}
    for name in ("vit", "timm"):
        began = time.perf_counter()
        model = AutoModel.from_pretrained(f"org/ttame-{name}")
        found[f"seconds {name}"] = time.perf_counter() - began
        found[f"equal {name}"] = bool(np.array_equal(maps(model).numpy(), np.load(WORK / f"{name}.npy")))
        found[f"processor {name}"] = type(AutoImageProcessor.from_pretrained(f"org/ttame-{name}")).__name__
    whole = AutoModel.from_pretrained("org/ttame-whole")
    found["close whole"] = float(np.abs(maps(whole).numpy() - np.load(WORK / "vit.npy")).max())
    found["dtypes whole"] = sorted({str(p.dtype) for p in whole.head.parameters()})
    found["config"] = AutoConfig.from_pretrained("org/ttame-vit").backbone
    found["offline"] = outcome(lambda: AutoModel.from_pretrained("org/ttame-vit", local_files_only=True))
    half = AutoModel.from_pretrained("org/ttame-vit", dtype=torch.bfloat16, device_map="cpu", token=TOKEN)
    found["bfloat16"] = str(next(half.head.parameters()).dtype)
    found["branch"] = outcome(lambda: AutoModel.from_pretrained("org/ttame-vit", revision="v2"))
    commit = json.loads((WORK / "push.json").read_text())["commit timm"]
    found["commit"] = outcome(lambda: AutoModel.from_pretrained("org/ttame-timm", revision=commit))
    cache = WORK / "own-cache"
    found["cache_dir"] = outcome(lambda: AutoModel.from_pretrained("org/ttame-timm", cache_dir=cache))
    found["in cache_dir"] = sorted(p.name for p in cache.glob("models--*"))
    (WORK / "beside" / "org" / "ttame-cit").mkdir(parents=True)  # a folder that resembles a Hub id
    os.chdir(WORK / "beside")
    own = {"cache_dir": WORK / "another-cache"}
    found["beside a folder"] = outcome(lambda: TTameModel.from_pretrained("org/ttame-vit", **own))
    found["beside, nowhere"] = outcome(lambda: TTameModel.from_pretrained("org/ttame-cat", **own))

    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8))
    os.chdir(WORK)
    photo.save("photo.jpg")
    explain = pipeline("image-explanation", model="org/ttame-vit")
    found["pipeline"] = [type(explain).__name__, str(next(explain.model.head.parameters()).dtype)]
    found["explained"] = [entry["overlay"].size for entry in explain("photo.jpg", top_k=2)]
    found["no explainer"] = outcome(lambda: pipeline("image-explanation", model="org/tiny-vit"))

    moved = pipeline("image-explanation", model="org/ttame-vit", device="cpu", dtype=torch.bfloat16)
    found["moved pipeline"] = [str(moved.device), str(next(moved.model.head.parameters()).dtype)]
    found["moved map"] = str(moved("photo.jpg")[0]["explanation"].map.dtype)

    unwanted = ("gated", "bare", "outside", "absolute", "pickle", "included-pickle", "named-pickle", "inside-out")
    for name in ("nobody/nothing", *(f"org/ttame-{name}" for name in unwanted)):
        found[name] = outcome(lambda: AutoModel.from_pretrained(name))  # noqa: B023
    found["no revision"] = outcome(lambda: AutoModel.from_pretrained("org/ttame-vit", revision="v9"))
    found["remote backbone"] = outcome(lambda: AutoModel.from_pretrained("org/ttame-remote"))
    found["path backbone"] = outcome(lambda: AutoModel.from_pretrained("org/ttame-path"))
    found["outside"] = sorted(str(p) for p in WORK.rglob("evil*"))

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    found["offline mode"] = outcome(lambda: AutoModel.from_pretrained("org/ttame-timm"))
    found["offline mode, never seen"] = outcome(lambda: AutoModel.from_pretrained("org/never-seen"))
    huggingface_hub.constants.HF_HUB_OFFLINE = False

    import re

    blocks = []
    for card in sorted((WORK / "cards").glob("*.md")):
        for block in re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL):
            blocks.append((card.stem, outcome(lambda: exec(block, {}))))  # noqa: B023
    found["cards"] = blocks
    found["written"] = sorted(p.name for p in WORK.glob("photo_*.png"))
    return found


def half_written(cache: Path) -> list[str]:
    """Files under their final names in a cache whose contents are not those that the Hub announced."""
    broken = []
    for file in cache.rglob("*"):
        if file.is_file() and "snapshots" in file.parts:
            content, name = file.read_bytes(), file.resolve().name
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if name not in (git, hashlib.sha256(content).hexdigest()):
                broken.append(file.name)
    return broken


def faults(few: bool = False) -> dict[str, Any]:
    """The fault table: [where, fault, faults met, seconds, outcome, outcome of the next one without a fault].

    few: only the rows that a test needs; the benchmark runs them all.
    """
    from hf_ttame import TTameModel
    from hf_ttame.hub import push_folder

    expected = np.load(WORK / "vit.npy")
    table = []

    def loaded(cache: Path) -> str:
        problem = outcome(lambda: found.append(TTameModel.from_pretrained("org/ttame-vit", cache_dir=cache)))
        if broken := half_written(cache):
            return f"HALF-WRITTEN: {broken}"
        if problem == "ok" and not np.array_equal(maps(found.pop()).numpy(), expected):
            return "LOADED, BUT OTHER MAPS"
        return problem

    found: list[Any] = []
    for kind, match, times in DOWNLOAD_FAULTS[: 9 if few else None]:
        cache = WORK / "caches" / str(len(table))
        ask("/_test/fault", {"kind": kind, "match": match, "times": times})
        began = time.perf_counter()
        first = loaded(cache)
        spent = time.perf_counter() - began
        hits = ask("/_test/hits")["hits"]
        ask("/_test/fault", {})
        table.append([f"load, {match}", f"{kind} x {times}", hits, round(spent, 1), first, loaded(cache)])
    for kind, match, times in UPLOAD_FAULTS[: 3 if few else None]:
        name = f"org/fault-{len(table)}"
        ask("/_test/fault", {"kind": kind, "match": match, "times": times})
        began = time.perf_counter()
        lines: list[str] = []
        first = outcome(lambda: push_folder(WORK / "vit", name, say=lines.append))  # noqa: B023
        spent = time.perf_counter() - began
        hits = ask("/_test/hits")["hits"]
        ask("/_test/fault", {})
        again = outcome(lambda: push_folder(WORK / "vit", name, say=lines.append))  # noqa: B023
        table.append([f"push, {match}", f"{kind} x {times}", hits, round(spent, 1), first, again])
    return {"table": table, "left": sorted(p.name for p in WORK.glob("vit/*"))}


WEIGHTS = "GET /org/ttame-vit/resolve/.*model.safetensors"
DOWNLOAD_FAULTS = [
    ("500", WEIGHTS, 1),
    ("cut", WEIGHTS, 1),
    ("429", WEIGHTS, 1),
    ("checksum", WEIGHTS, 1),
    ("checksum", "GET /org/ttame-vit/resolve/.*config.json", 1),
    ("checksum", "GET /org/tiny-vit/resolve/.*model.safetensors", 1),
    ("checksum", "GET /org/tiny-vit/resolve/.*/config.json", 1),
    ("checksum", "GET /org/ttame-vit/resolve/.*preprocessor_config.json", 1),
    ("slow", WEIGHTS, 1),
    ("500", WEIGHTS, 99),
    ("500", "GET /org/ttame-vit/resolve/.*preprocessor_config.json", 1),
    ("500", "GET /org/tiny-vit/resolve/.*model.safetensors", 1),
    ("cut", "GET /org/tiny-vit/resolve/.*model.safetensors", 1),
    ("500", "HEAD /org/ttame-vit/resolve", 1),
    ("429", "HEAD /org/ttame-vit/resolve", 1),
    ("403", WEIGHTS, 99),
    ("gated", "/org/ttame-vit", 99),
    ("RepoNotFound", "/org/ttame-vit", 99),
    ("RevisionNotFound", "/org/ttame-vit", 99),
    ("EntryNotFound", "/org/ttame-vit/resolve/.*model.safetensors", 99),
]
UPLOAD_FAULTS = [
    ("500", "POST .*/commit/", 1),
    ("500", "PUT /_lfs", 1),
    ("400", "PUT /_lfs", 9),
    ("500", "POST .*preupload", 1),
    ("429", "PUT /_lfs", 1),
    ("cut", "POST .*info/lfs", 1),
    ("403", "POST .*/commit/", 1),
    ("slow", "PUT /_lfs", 1),
]


if __name__ == "__main__":
    task = sys.argv[1]
    tasks = {"push": push, "load": load, "faults": faults, "few": lambda: {**load(), "faults": faults(few=True)}}
    result = tasks[task]()
    (WORK / f"{task}.json").write_text(json.dumps(result, indent=1))
