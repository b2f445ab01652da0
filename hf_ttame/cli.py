"""The command `ttame`. Heavy imports stand inside the commands: `ttame --help` answers at once."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="ttame",
    help="Explain image classifiers in one forward pass (T-TAME).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _quiet() -> None:
    """Leave the screen to this command's own words."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Picture to write.")] = Path("ttame_demo.png"),
    top_k: Annotated[int, typer.Option(help="Classes per photograph.")] = 3,
) -> None:
    """Explain photographs with EfficientNet-Lite0: no download, nothing else needed."""
    _quiet()
    from .demo import run_demo

    run_demo(output, top_k, typer.echo)


@app.command()
def explain(
    images: Annotated[list[Path], typer.Argument(help="Pictures.")],
    model: Annotated[str, typer.Option(help="Explainer: a folder or a Hub id.")],
    class_: Annotated[
        list[str] | None,
        typer.Option("--class", help="Label or id; repeat for several. Default: the predicted class."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="The K classes with the highest scores.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the overlays.")] = Path("explanations"),
    backbone: Annotated[str | None, typer.Option(help="Folder or Hub id of a backbone that is not recorded.")] = None,
    raw: Annotated[bool, typer.Option(help="Also write the raw maps as .npy.")] = False,
) -> None:
    """Write an overlay for each picture and class. A broken picture is reported and does not stop the others."""
    _quiet()
    from .image_processing import load_image

    if class_ and top_k is not None:
        raise ValueError("give --class or --top-k, not both")
    explainer = _load(model, backbone)
    if class_:
        explainer.resolve_classes(class_)  # before any picture is touched
    broken = 0
    taken: set[str] = set()
    for path in images:
        try:
            load_image(path)
            began = time.perf_counter()
            explanations = explainer.explain(path, class_ids=class_ or None, top_k=top_k)
            spent = 1000 * (time.perf_counter() - began)
        except (ValueError, TypeError) as error:
            if class_ is None and top_k is not None and not 1 <= top_k <= explainer.config.num_labels:
                raise
            broken += 1
            typer.echo(f"skipped: {error}", err=True)
            continue
        typer.echo(f"{path} ({spent:.0f} ms)")
        names = (path.stem if n == 1 else f"{path.stem}-{n}" for n in count(1))
        stem = next(name for name in names if name not in taken)
        taken.add(stem)
        for explanation in explanations:
            target = out / f"{stem}_{explanation.class_id}.png"
            explanation.save(target)
            if raw:
                explanation.save(target.with_suffix(".npy"))
            typer.echo(f"  {explanation.score:6.1%}  {explanation.label}  -> {target}")
    if broken:
        typer.echo(f"{broken} of {len(images)} pictures could not be explained", err=True)
        raise typer.Exit(1)


@app.command()
def layers(
    name: Annotated[str, typer.Argument(help="Backbone: a Hub id, a folder, or with --no-pretrained a timm name.")],
    pretrained: Annotated[bool, typer.Option(help="Load weights; without, NAME is a timm architecture.")] = True,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
) -> None:
    """List the modules that can be tapped, with their shapes; the defaults are marked with *."""
    _quiet()
    import torch

    from .backbones import load_backbone
    from .features import default_layers, find_pooled_classifier, tappable_layers
    from .image_processing import measure_normalisation

    loaded = load_backbone(name, pretrained=pretrained, revision=revision)
    loaded.model.eval()
    normalisation = measure_normalisation(loaded.processor)
    shape = (2, len(normalisation.scale), *normalisation.size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    try:
        defaults = default_layers(loaded.model)
    except ValueError:
        defaults = []
    if defaults and (pooled := find_pooled_classifier(loaded.model, noise)):
        defaults[-1] = pooled.layer  # the head starts from this one
    typer.echo(f"  {'module':44s} {'channels':>8s}  grid      layout")
    for layer in tappable_layers(loaded.model, noise):
        mark = "*" if layer.name in defaults else " "
        grid = f"{layer.grid[0]} x {layer.grid[1]}"
        typer.echo(f"{mark} {layer.name:44s} {layer.channels:8d}  {grid:8s}  {layer.layout}")
    typer.echo("* default feature layers; pass others with feature_layers=[...], fine to coarse")


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="Explainer: a folder with config.json, report.json, training.json.")],
    repo_id: Annotated[str | None, typer.Option(help="Where it will be published: the card's code names it.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write. Default: README.md in the folder.")] = None,
) -> None:
    """Write an explainer's model card. What was not measured says so; card.json adds licences and origin."""
    _quiet()
    from .cards import write_card

    typer.echo(f"wrote {write_card(folder, repo_id, output)}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Explainer, dataset of maps, or Space.")],
    repo_id: Annotated[str, typer.Argument(help="'organisation/name' on the Hub; created where it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Only you and your organisation can see it.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; created where it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    include_examples: Annotated[
        bool, typer.Option("--include-examples", help="Also send pictures and their names; never without this.")
    ] = False,
    kind: Annotated[str | None, typer.Option(help="model, dataset or space. Default: what the folder holds.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
) -> None:
    """Publish a folder in one commit; every file is listed first. The token is the one of `hf auth login`."""
    _quiet()
    from .hub import push_folder

    info = push_folder(
        folder,
        repo_id,
        kind=kind,
        include_examples=include_examples,
        commit_message=message,
        private=private or None,
        revision=revision,
        create_pr=create_pr,
        say=typer.echo,
    )
    typer.echo(f"published: {info.pr_url or info.commit_url}")


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="The authors' .ckpt: VGG-16, ResNet-50 or ViT-B/16.")],
    output: Annotated[Path, typer.Option(help="Folder for the explainer.")],
) -> None:
    """Convert a checkpoint of the paper's authors (for academic, non-commercial use) to an explainer."""
    _quiet()
    from .convert import convert_to_folder

    model = convert_to_folder(checkpoint, output)
    typer.echo(f"wrote {output}: {model.config.converted_from}; for academic, non-commercial use only")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def train(context: typer.Context) -> None:
    """Train an explainer: `ttame train --backbone ... --dataset ... --output ...` (`ttame train --help` lists all)."""
    package = Path(__file__).parent
    script = next(
        path for path in (package / "training" / "train.py", package.parent / "training" / "train.py") if path.exists()
    )
    _require("accelerate", "train")
    _require("datasets", "train")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", str(script), *context.args]
    raise typer.Exit(subprocess.call(command, env=environment))


def _require(module: str, extra: str) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"this command needs {module}; run: pip install 'hf-ttame[{extra}]'")


def _load(model: str, backbone: str | None) -> Any:
    from .modeling_ttame import TTameModel

    if not Path(model).exists() and model.count("/") != 1:
        raise ValueError(f"explainer {model!r} is neither a folder nor a Hub id of the form 'organisation/name'")
    return TTameModel.from_pretrained(model, backbone=backbone)


def main() -> None:
    """Run the command; an expected error is one line and exit status 1, without a traceback."""
    run: Callable[[], Any] = app
    try:
        run()
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("TTAME_DEBUG"):
            raise
        typer.echo(f"ttame: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
