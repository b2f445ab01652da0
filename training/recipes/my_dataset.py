"""Template: your own fine-tuned classifier and a few hundred of your own photographs. Copy it and change it.

    python training/recipes/my_dataset.py BACKBONE PICTURES OUTPUT --compare-fills
    python training/recipes/my_dataset.py BACKBONE PICTURES OUTPUT --fill blur

BACKBONE: a folder with your fine-tuned timm or transformers classifier and its preprocessing, or a Hub id. PICTURES: a
folder of photographs (sub-folders are read too), of parquet or of webdataset tar files. No labels are needed: the
classifier's own predictions are the targets. Use pictures like those that you will explain; those that the classifier
was trained on will do. Further arguments go to training/train.py.

Which fill? While it trains, the mask replaces what it hides by a fill, and the head learns what the classifier needs
*in contrast to that*. On everyday photographs black works. Where black means something to your classifier, it does
not: a black patch looks like a dark lesion on skin or a shadow in an X-ray, and hiding evidence then *adds* evidence.
"mean" paints the mean colour of the classifier's own normalisation, "blur" removes shape and keeps local colour.
--compare-fills trains all three and prints a table: a fill whose mask area is near 0 or 1 does not suit your data. AD
and IC are judged with black in every row, also for runs with another fill: where black adds evidence, they favour the
run that trained with it and cannot settle the choice. `ttame evaluate OUTPUT/FILL/explainer ... --metrics sanity`,
check (e), judges an explainer with mean, blur and ROAD's imputation as well. Look at OUTPUT/FILL/samples.png before
you decide.

Hardware: a laptop. Expected time: 300 steps of 16 views take about four times as long as classifying 4,800 pictures,
and the validations come on top. Measured: 500 photographs (of Imagenette's training part) and EfficientNet-Lite0, 14
minutes on one thread, beside other jobs that took half of its time; figures of it in training/LOG.md. Yours depend on
your data.
"""

import json
import sys
from pathlib import Path

from launch import train

COMMAND = ["--steps", "300", "--batch_size", "16", "--min_crop", "0.5", "--holdout", "0.15", "--validate_every", "100"]
FILLS = ("black", "mean", "blur")
SHOWN = ("mask area", "AD soft 50", "IC soft 50", "AD binary 50", "IC binary 50")


def main() -> None:
    if len(sys.argv) < 4 or any(argument.startswith("-") for argument in sys.argv[1:4]):
        sys.exit(__doc__)
    backbone, pictures, output = sys.argv[1:4]
    further = [argument for argument in sys.argv[4:] if argument != "--compare-fills"]
    if "--compare-fills" in sys.argv and any(argument.startswith("--fil") for argument in sys.argv):
        sys.exit("my_dataset: --compare-fills trains all three fills; drop --fill")
    where = ["--backbone", backbone, "--dataset", pictures]
    if "--compare-fills" not in sys.argv:
        train(*where, "--output", output, *COMMAND, further=further)
        return
    for fill in FILLS:
        train(*where, "--output", f"{output}/{fill}", *COMMAND, "--fill", fill, "--resume", further=further)
    count = len(json.loads(Path(output, FILLS[0], "validation.json").read_text())["mask area"])
    print(
        f"AD and IC on {count} held-out pictures, judged with black pixels in every row; with mean, blur and ROAD: "
        "`ttame evaluate --metrics sanity`"
    )
    if count < 100:
        print("on so few pictures differences of several points mean nothing: look at samples.png, or hold out more")
    print(f"{'fill':8s}" + "".join(f"{name:>14s}" for name in SHOWN))
    for fill in FILLS:
        last = json.loads(Path(output, fill, "report.json").read_text())["validations"][-1]
        print(f"{fill:8s}" + "".join(f"{last[name]:14.2f}" for name in SHOWN))


if __name__ == "__main__":
    main()
