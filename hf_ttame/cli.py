"""The command `ttame`. Heavy imports stand inside the commands: `ttame --help` answers at once."""

import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from difflib import get_close_matches
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

    def tell(message: Warning | str, *_: object) -> None:
        typer.echo(f"ttame: {message}", err=True)  # without the line of code that warned

    warnings.showwarning = tell  # type: ignore[assignment]


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
    model: Annotated[str, typer.Option(help="Explainer: a folder, a Hub id, or efficientnet-lite0: the shipped one.")],
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
    if out.is_file():
        raise ValueError(f"--out {str(out)!r} is a file; give a folder for the overlays")
    if folder := next((path for path in images if path.is_dir()), None):
        raise ValueError(
            f"{str(folder)!r} is a folder; give pictures, or run `ttame explain-dataset {shlex.quote(str(folder))} "
            f"--model {shlex.quote(model)} --out maps`"
        )
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
    from .backbones import load_backbone
    from .features import probe_noise
    from .image_processing import measure_normalisation
    from .layer_choice import default_layers, find_pooled_classifier, tappable_layers

    loaded = load_backbone(name, pretrained=pretrained, revision=revision)
    loaded.model.eval()
    normalisation = measure_normalisation(loaded.processor)
    noise = probe_noise(len(normalisation.scale), normalisation.size)
    try:
        defaults = default_layers(loaded.model, noise)
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
def space(
    model: Annotated[
        str, typer.Option(help="Explainer: a folder, a Hub id, or efficientnet-lite0: the shipped one.")
    ] = "efficientnet-lite0",
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: this machine alone.")] = None,
    port: Annotated[int | None, typer.Option(help="Port. Default: the first free one from 7860 on.")] = None,
) -> None:
    """Look at explanations in the browser, test them and set them beside other methods. Ends with Ctrl-C."""
    _require("gradio", "space")
    _quiet()
    from .space.serving import launch

    launch(model, host, port)


@app.command("push-space")
def push_space(
    repo_id: Annotated[str, typer.Argument(help="'organisation/name' on the Hub; created where it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Only you and your organisation can see it.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
) -> None:
    """Publish the Space of `ttame space` on the Hub, in one commit."""
    _quiet()
    from .hub import push_folder

    info = push_folder(
        _shipped("spaces/ttame-demo/app.py").parent,
        repo_id,
        kind="space",
        private=private or None,
        commit_message=message,
        say=typer.echo,
    )
    typer.echo(f"published: {info.commit_url}")


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


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="Explainer: a folder, a Hub id, or efficientnet-lite0: the shipped one.")
    ],
    output: Annotated[Path, typer.Argument(help="File to write, .onnx; its facts go into a .json beside it.")],
    classes: Annotated[
        str, typer.Option(help="Maps of the class that is predicted, given (as an input), all, or top5 (any number).")
    ] = "predicted",
    batch: Annotated[int | None, typer.Option(help="Fix the batch; default: any batch.")] = None,
    check: Annotated[
        list[Path] | None,
        typer.Option(help="Picture, or folder of pictures, to check on; default: three shipped ones."),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantise, and report how far the result agrees.")] = False,
    calibration: Annotated[
        list[Path] | None, typer.Option(help="For int8: picture or folder, others than those of --check.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="Sentence for the facts.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Folder or Hub id of a backbone that is not recorded.")] = None,
) -> None:
    """Write an explainer as one ONNX file, checked against PyTorch on photographs."""
    _require("onnx", "export")
    _quiet()
    from .export import export_onnx

    report = export_onnx(
        _load(model, backbone),
        output,
        classes=classes,
        batch=batch,
        check=_pictures(check or []),
        int8=int8,
        calibration=_pictures(calibration or []),
        licence=licence,
    )
    for message in report.skipped:
        typer.echo(f"skipped: {message}", err=True)
    worst = ", ".join(
        f"{name} {'not compared' if value is None else f'{value:.1e}'}" for name, value in report.differences.items()
    )
    typer.echo(f"float32 graph against PyTorch on {report.pictures} pictures, largest differences: {worst}")
    if report.maps["faint"] or report.maps["left_out"]:
        typer.echo(
            f"maps: {report.maps['compared']} compared, {report.maps['faint']} faint ones held to a wider tolerance, "
            f"{report.maps['left_out']} left out: they vary too little for float32 to say what they are"
        )
    if agreement := report.agreement:
        alike = agreement["map_correlation"]
        typer.echo(
            f"int8 against float32 on {agreement['images']} pictures: same class {agreement['top1']:.1%}, "
            f"correlation of {agreement['maps']} maps {'not measured' if alike is None else f'{alike:.3f}'} "
            f"({agreement['maps_left_out']} left out), "
            f"largest difference of a score {agreement['largest_score_difference']:.2f}"
        )
    typer.echo(f"wrote {report.path} ({report.megabytes:.1f} MB) and {report.facts}")


def _pictures(paths: list[Path]) -> list[Path]:
    """The pictures named, and those in the folders named."""
    from .hub import PICTURES

    found: list[Path] = []
    for path in paths:
        inside = sorted(file for file in path.rglob("*") if file.name.lower().endswith(PICTURES))
        if path.is_dir() and not inside:
            raise ValueError(f"the folder {str(path)!r} holds no pictures")
        found += inside if path.is_dir() else [path]
    return found


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def train(context: typer.Context) -> None:
    """Train an explainer: `ttame train --backbone ... --dataset ... --output ...` (`ttame train --help` lists all)."""
    script = _shipped("training/train.py")
    _require("accelerate", "train")
    _require("datasets", "train")
    from .launching import run_training

    if status := run_training(script, context.args).status:  # the training has said why
        raise typer.Exit(status)


_DATASET = typer.Option(help="Pictures: a Hub id, a folder of parquet files or of pictures, a parquet file.")
_OUTPUT = typer.Option(help="Folder for the report; an interrupted run continues there.")
_BACKBONE = typer.Option(
    help="Folder or Hub id of a backbone that is not recorded; efficientnet-lite0: its package's."
)
_WHERE = typer.Option(help="Only some rows: 'column%N==R'.")
_PRECISION = typer.Option(help="Of the passes: float32, or bfloat16 or float16 where the machine is faster in it.")
_JUDGE = typer.Option(help="Sanity: another classifier, folder or Hub id.")
_SANITY_IMAGES = typer.Option(help="Sanity: images to check on.")
_SANITY_STEPS = typer.Option(help="Sanity: steps of the head that is retrained.")
_REVISION = typer.Option(help="Branch, tag or commit of a Hub dataset.")
_SHEET = typer.Option(help="Whether to draw contact_sheet.jpg: it shows six of the photographs.")
_BOXES = typer.Option(help="Column of a box (left, top, right, bottom) in pixels of the picture, or of several.")
_MASKS = typer.Option(help="The same from a column of pictures: inside where a pixel is not 0.")


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(help="Explainer: a folder, a Hub id, or efficientnet-lite0: the shipped one.")
    ],
    dataset: Annotated[str, _DATASET],
    metrics: Annotated[
        str, typer.Option(help="Comma-separated: confidence, adcc, road, insertion-deletion, mosaic, sanity; or all.")
    ] = "confidence,adcc,road,insertion-deletion,mosaic",
    output: Annotated[Path, _OUTPUT] = Path("evaluation"),
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "validation",
    limit: Annotated[int | None, typer.Option(help="Images; default: all.")] = None,
    curve_limit: Annotated[int, typer.Option(help="The first so many for ROAD, insertion, deletion.")] = 100,
    mosaics: Annotated[
        int | None, typer.Option(help="2 x 2 mosaics for grid pointing, at most. Default: --limit, 100 at most.")
    ] = None,
    revision: Annotated[str | None, _REVISION] = None,
    where: Annotated[str | None, _WHERE] = None,
    box_column: Annotated[str | None, _BOXES] = None,
    mask_column: Annotated[str | None, _MASKS] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of the pictures; found if not given.")] = None,
    backbone: Annotated[str | None, _BACKBONE] = None,
    judge: Annotated[str | None, _JUDGE] = None,
    sanity_images: Annotated[int, _SANITY_IMAGES] = 100,
    sanity_steps: Annotated[int, _SANITY_STEPS] = 100,
    contact_sheet: Annotated[bool, _SHEET] = True,
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 16,
    precision: Annotated[str, _PRECISION] = "float32",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Measure one explainer: faithfulness, localisation, sanity. Writes a report with intervals and plots."""
    from .baselines import MethodSettings

    plan = {
        **{"dataset": dataset, "split": split, "limit": limit, "curve_limit": curve_limit, "mosaics": mosaics},
        **{"where": where, "box_column": box_column, "mask_column": mask_column, "image_column": image_column},
        **{"revision": revision, "batch_size": batch_size, "precision": precision, "seed": seed},
        "methods": ("ttame",),
        "settings": MethodSettings(batch_size=max(32, batch_size), seed=seed),
    }
    checks = {"images": sanity_images, "steps": sanity_steps, "judge": judge}
    _measure(model, backbone, metrics, plan, output, checks, contact_sheet)


@app.command()
def compare(
    model: Annotated[
        str, typer.Argument(help="Explainer: a folder, a Hub id, or efficientnet-lite0: the shipped one.")
    ],
    dataset: Annotated[str, _DATASET],
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated: all, gradcam, gradcam@LAYER, scorecam, rise, ... Trivial maps are always there."
        ),
    ] = "all",
    metrics: Annotated[
        str, typer.Option(help="Comma-separated: confidence, adcc, road, insertion-deletion, mosaic, sanity; or all.")
    ] = "confidence,adcc,road,insertion-deletion,mosaic",
    output: Annotated[Path, _OUTPUT] = Path("comparison"),
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "validation",
    limit: Annotated[int | None, typer.Option(help="Images; default: all.")] = None,
    slow_limit: Annotated[int, typer.Option(help="The first so many for methods with dozens of passes.")] = 100,
    curve_limit: Annotated[int, typer.Option(help="The first so many for ROAD, insertion, deletion.")] = 100,
    mosaics: Annotated[
        int | None, typer.Option(help="2 x 2 mosaics for grid pointing, at most. Default: --limit, 100 at most.")
    ] = None,
    slow_mosaics: Annotated[int, typer.Option(help="The same for methods with dozens of passes per map.")] = 0,
    slow_adcc: Annotated[int, typer.Option(help="The first so many for ADCC of those methods: a second map.")] = 0,
    rise_masks: Annotated[int, typer.Option(help="Masks of RISE: its passes per map.")] = 4000,
    revision: Annotated[str | None, _REVISION] = None,
    where: Annotated[str | None, _WHERE] = None,
    box_column: Annotated[str | None, _BOXES] = None,
    mask_column: Annotated[str | None, _MASKS] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of the pictures; found if not given.")] = None,
    backbone: Annotated[str | None, _BACKBONE] = None,
    judge: Annotated[str | None, _JUDGE] = None,
    sanity_images: Annotated[int, _SANITY_IMAGES] = 100,
    sanity_steps: Annotated[int, _SANITY_STEPS] = 100,
    contact_sheet: Annotated[bool, _SHEET] = True,
    batch_size: Annotated[int, typer.Option(help="Images per batch; at least 32 masked copies per pass.")] = 16,
    precision: Annotated[str, _PRECISION] = "float32",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Measure an explainer beside other methods, on the same images. Distributed under `accelerate launch`."""
    _require("pytorch_grad_cam", "eval")
    from .baselines import MethodSettings

    plan = {
        **{"dataset": dataset, "split": split, "limit": limit, "slow_limit": slow_limit, "curve_limit": curve_limit},
        **{"mosaics": mosaics, "slow_mosaics": slow_mosaics, "slow_adcc": slow_adcc, "where": where},
        **{"box_column": box_column, "mask_column": mask_column, "image_column": image_column, "revision": revision},
        **{"batch_size": batch_size, "precision": precision, "seed": seed},
        "methods": tuple(methods.replace(" ", "").split(",")),
        "settings": MethodSettings(rise_masks=rise_masks, batch_size=max(32, batch_size), seed=seed),
    }
    checks = {"images": sanity_images, "steps": sanity_steps, "judge": judge}
    _measure(model, backbone, metrics, plan, output, checks, contact_sheet)


@app.command()
def explain_dataset(
    dataset: Annotated[
        str, typer.Argument(help="Pictures: a Hub id, a folder of parquet or tar files or of pictures, such a file.")
    ],
    model: Annotated[str, typer.Option(help="Explainer: a folder, a Hub id, or efficientnet-lite0: the shipped one.")],
    out: Annotated[Path, typer.Option(help="Folder for the maps; an interrupted run continues there.")],
    class_: Annotated[
        list[str] | None,
        typer.Option("--class", help="Label or id; repeat for several. Default: the predicted class."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="The K classes with the highest scores.")] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub dataset.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of the pictures; found if not given.")] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column that names the pictures; of a folder their paths, '' for none.")
    ] = None,
    keep_columns: Annotated[str, typer.Option(help="Comma-separated: columns to carry over.")] = "",
    overlays: Annotated[bool, typer.Option("--overlays", help="Also a JPEG of each map over its picture.")] = False,
    backbone: Annotated[str | None, _BACKBONE] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    batch_size: Annotated[int, typer.Option(help="Pictures per pass.")] = 32,
    workers: Annotated[int | None, typer.Option(help="Processes that decode pictures. Default: by the cores.")] = None,
    rows_per_file: Annotated[int, typer.Option(help="Pictures per file of maps, at most.")] = 512,
) -> None:
    """Explain every picture of a dataset into parquet files of maps. Distributed under `accelerate launch`."""
    _quiet()
    for module in ("accelerate", "datasets"):
        _require(module, "datasets")
    from accelerate import Accelerator

    from .explain_dataset import MapPlan
    from .explain_dataset import explain_dataset as run
    from .precision import PRECISIONS

    if dtype not in PRECISIONS:
        raise ValueError(f"--dtype must be one of {', '.join(PRECISIONS)}, got {dtype!r}")
    plan = MapPlan(
        dataset,
        split,
        revision,
        image_column,
        id_column,
        tuple(name.strip() for name in keep_columns.split(",") if name.strip()),
        tuple(class_) if class_ else None,
        top_k,
        overlays,
        rows_per_file,
        batch_size,
        workers,
    )
    accelerator = Accelerator()
    explainer = _load(model, backbone).to(PRECISIONS[dtype])
    try:
        report = run(explainer, plan, out, accelerator=accelerator, say=typer.echo)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; what is complete stands in {out}: run the same command again to continue", err=True)
        raise typer.Exit(130) from None
    if report:
        typer.echo(
            f"{report['pictures']} pictures explained, {report['unreadable']} unreadable (report.json); "
            f"{report['files']} files, {report['bytes'] / 1e6:.1f} MB in {out}"
        )
    else:
        typer.echo("this process has done its share; the one that finishes last writes the report")
    accelerator.end_training()


def _measure(
    model: str,
    backbone: str | None,
    metrics: str,
    plan: dict[str, Any],
    output: Path,
    checks: dict[str, Any],
    contact_sheet: bool,
) -> None:
    """Run an evaluation; with "sanity" among the metrics, the sanity checks too."""
    _quiet()
    for module in ("accelerate", "datasets", "matplotlib"):
        _require(module, "eval")
    from datetime import timedelta

    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from .evaluation import compare
    from .evaluation_plan import METRICS, Plan
    from .memory import keep_freed_memory
    from .paths import check_path

    groups = list(dict.fromkeys(metrics.replace(" ", "").strip(",").split(",")))
    if groups == ["all"]:
        groups = [*METRICS, "sanity"]
    if unknown := [name for name in groups if name not in (*METRICS, "sanity")]:
        raise ValueError(
            f"--metrics must be all alone, or of {', '.join(METRICS)}, sanity, got {', '.join(unknown) or 'none'}"
        )
    measured = tuple(name for name in groups if name != "sanity") or ("confidence",)
    made = Plan(**plan, metrics=measured)
    if checks["judge"]:
        check_path(checks["judge"], "judge")
    keep_freed_memory()
    # Processes wait for one another: for the one that makes the sanity checks, and for the one that is slowest.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))])
    explainer = _load(model, backbone)

    def sanity(plan: Plan) -> dict[str, Any]:
        from .sanity_checks import kept_checks, run_checks

        if "sanity" in groups:
            return run_checks(explainer, plan, say=typer.echo, folder=output, **checks)
        return kept_checks(explainer, plan, output)

    try:
        report = compare(explainer, made, output, accelerator=accelerator, sanity=sanity, contact_sheet=contact_sheet)
    except KeyboardInterrupt:
        typer.echo(
            f"interrupted; what is measured stands in {output}: run the same command again to continue", err=True
        )
        raise typer.Exit(130) from None
    if report:
        for image in report["unreadable_images"]:
            file = f" ({image['file']})" if image["file"] else ""
            typer.echo(f"skipped: row {image['row']}{file} cannot be read", err=True)
        if report["unreadable"]:
            typer.echo(f"{report['unreadable']} pictures could not be read", err=True)
        typer.echo(
            f"wrote {output / 'report.md'}, report.json and {', '.join(report['pictures'].values()) or 'no plots'}"
        )
    accelerator.end_training()


def _shipped(name: str) -> Path:
    """A file that lies inside the package where it is installed, and beside it in a clone of the repository."""
    package = Path(__file__).parent
    return next(path for path in (package / name, package.parent / name) if path.exists())


def _require(module: str, extra: str) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"this command needs {module}; run: pip install 'hf-ttame[{extra}]'")


def _load(model: str, backbone: str | None) -> Any:
    from .modeling_ttame import TTameModel
    from .paths import check_path, nearest_path

    if backbone not in (None, "efficientnet-lite0"):
        check_path(backbone, "backbone")
    module: Any = backbone
    if "efficientnet-lite0" in (model, backbone):  # the one that the package ships a head for
        from .demo import EXPLAINER, load_efficientnet_lite0

        model = str(EXPLAINER) if model == "efficientnet-lite0" else model
        module = load_efficientnet_lite0() if backbone in (None, "efficientnet-lite0") else backbone
    if not Path(model).exists() and "/" not in model:
        near = nearest_path(model) or next(iter(get_close_matches(model, ["efficientnet-lite0"])), None)
        raise ValueError(
            f"explainer {model!r} is neither a folder nor a Hub id of the form 'organisation/name'"
            + (f"; nearest: {near!r}" if near else "")
        )
    if runs := [part for part in ("best", "explainer") if Path(model, part, "config.json").exists()]:
        inside = ", ".join(str(Path(model, part)) for part in runs)
        raise ValueError(f"{model!r} is the folder of a training; give one of its explainers: {inside}")
    return TTameModel.from_pretrained(model, backbone=module)


def main() -> None:
    """Run the command; an expected error is one line and exit status 1, without a traceback."""
    run: Callable[[], Any] = app
    try:
        run()
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("TTAME_DEBUG"):
            raise
        from .disk import full_disk

        typer.echo(f"ttame: {full_disk(error) or error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
