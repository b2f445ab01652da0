"""A whole dataset explained, beside plain classification of the same stream; and the memory that it takes.

    python benchmarks/explain_dataset.py path/to/pictures --output benchmarks/explain_dataset.json

Both read the same files with the same loader, workers and batches, in the same processes; the explaining also computes
maps and writes parquet files. They take turns; the ratio is the median over the rounds of explained / plain time. Peak
memory is that of the main process and of the largest of its workers (getrusage), in a process of its own per size. The
pictures are copied to parquet files of 500 rows first, and used again where there are too few. Ends in one JSON line;
--output writes it, indented, to a file too.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator

from hf_ttame import TTameModel
from hf_ttame.dataset_input import open_input
from hf_ttame.dataset_loader import Prepare, make_loader
from hf_ttame.demo import load_explainer
from hf_ttame.explain_dataset import MapPlan, explain_dataset

ROWS_PER_SHARD = 500


def load(name: str) -> TTameModel:
    if name == "efficientnet-lite0":
        return load_explainer()
    return TTameModel.from_pretrained(name)


def copy_rows(dataset: str, split: str, count: int, folder: Path) -> None:
    """`count` pictures of a dataset as parquet files with row groups of 100."""
    source = open_input(dataset, split)
    rows = itertools.cycle(itertools.chain.from_iterable(map(source._rows, range(source.shards))))
    kind = datasets.Features(image=datasets.Image())
    folder.mkdir()
    for number, start in enumerate(range(0, count, ROWS_PER_SHARD)):
        cells = [next(rows)[source.column] for _ in range(min(ROWS_PER_SHARD, count - start))]
        part = datasets.Dataset.from_dict({"image": cells}, features=kind)
        part.to_parquet(str(folder / f"part-{number:03d}.parquet"), batch_size=100)


@torch.no_grad()
def classify(model: TTameModel, plan: MapPlan, accelerator: Accelerator) -> int:
    """Predicted classes of this process's share, and nothing else."""
    source = open_input(plan.dataset, rows_per_file=plan.rows_per_file)
    rank, world = accelerator.process_index, accelerator.num_processes
    prepare = Prepare(model.image_processor, len(model.config.pixel_scale))

    def batches() -> Any:
        return source.batches(plan.batch_size, rank, world, set(), {})

    seen = 0
    for batch in make_loader(batches, prepare, plan.workers or 0, pin=model.device.type == "cuda"):
        if batch.pixel_values is not None:
            pixel_values = batch.pixel_values.to(model.device, non_blocking=True, memory_format=torch.channels_last)
            seen += len(model.classify(pixel_values).argmax(dim=1).tolist())
    return seen


def speed(model: TTameModel, plan: MapPlan, rounds: int) -> dict[str, Any] | None:
    """Seconds of each round; None from all processes but the first."""
    accelerator = Accelerator()
    model.to(accelerator.device).to(memory_format=torch.channels_last)
    seconds: dict[str, list[float]] = {"plain": [], "explain": []}
    with tempfile.TemporaryDirectory() as folder:
        outs = [str(Path(folder, "maps"))] if accelerator.is_main_process else [""]
        if accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(outs)
        for turn in range(-1, rounds):  # the first round warms up
            for kind in ("plain", "explain") if turn % 2 else ("explain", "plain"):
                accelerator.wait_for_everyone()
                began = time.perf_counter()
                if kind == "plain":
                    classify(model, plan, accelerator)
                else:
                    explain_dataset(
                        model, plan, f"{outs[0]}-{turn}", accelerator=accelerator, progress=False, say=lambda _: None
                    )
                accelerator.wait_for_everyone()
                if turn >= 0:
                    seconds[kind].append(time.perf_counter() - began)
        main = accelerator.is_main_process
        accelerator.wait_for_everyone()
    accelerator.end_training()
    return seconds if main else None


def memory(model: TTameModel, plan: MapPlan) -> dict[str, float]:
    """Peak memory in MB of an explained dataset."""
    accelerator = Accelerator()
    with tempfile.TemporaryDirectory() as folder:
        explain_dataset(model, plan, folder, accelerator=accelerator, progress=False)
    unit = 1e3 if sys.platform == "linux" else 1e6
    return {
        "main": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
        "largest_worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit,
    }


def run_child(arguments: argparse.Namespace, kind: str, folder: Path, processes: int) -> Any:
    """This script again, as a launch of one or several processes; what its first process printed last."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), __file__, str(folder), "--child", kind]
    command += ["--model", arguments.model, "--rounds", str(arguments.rounds)]
    command += ["--batch-size", str(arguments.batch_size), "--workers", str(arguments.workers)]
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the {kind} run with {processes} processes ended with exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--split", default="train")
    parser.add_argument("--model", default="efficientnet-lite0")
    parser.add_argument("--images", type=int, default=1024, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1, help="per process")
    parser.add_argument("--memory", type=int, nargs="*", default=[1000, 7000], help="images")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", choices=("speed", "memory"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.images < 1:
        parser.error("--rounds and --images must be at least 1")

    if arguments.child:
        plan = MapPlan(
            arguments.dataset, batch_size=arguments.batch_size, workers=arguments.workers, rows_per_file=128
        )
        model = load(arguments.model).eval()
        found = memory(model, plan) if arguments.child == "memory" else speed(model, plan, arguments.rounds)
        if found is not None:
            print(json.dumps(found), flush=True)
        return

    speeds, peaks = {}, {}
    with tempfile.TemporaryDirectory(prefix="ttame-benchmark-") as work:
        copy_rows(arguments.dataset, arguments.split, arguments.images, Path(work, "speed"))
        for processes in arguments.processes:
            seconds = run_child(arguments, "speed", Path(work, "speed"), processes)
            ratios = [e / p for e, p in zip(seconds["explain"], seconds["plain"], strict=True)]
            speeds[str(processes)] = {
                "plain_images_per_second": round(arguments.images / statistics.median(seconds["plain"]), 2),
                "explain_images_per_second": round(arguments.images / statistics.median(seconds["explain"]), 2),
                "explain_over_plain": round(statistics.median(ratios), 3),
                "explain_over_plain_of_each_round": [round(ratio, 3) for ratio in ratios],
            }
            print(f"{processes} processes: {speeds[str(processes)]}", file=sys.stderr)
        for count in arguments.memory:
            copy_rows(arguments.dataset, arguments.split, count, Path(work, f"memory-{count}"))
            peaks[str(count)] = run_child(arguments, "memory", Path(work, f"memory-{count}"), 1)
            print(f"{count} images: {peaks[str(count)]} MB", file=sys.stderr)
    report = {
        "dataset": Path(arguments.dataset).name,
        "model": Path(arguments.model).name,
        "images": arguments.images,
        "rounds": arguments.rounds,
        "batch_size": arguments.batch_size,
        "workers_per_process": arguments.workers,
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: version(name) for name in ("torch", "datasets", "accelerate", "hf-ttame")},
        "speed_by_processes": speeds,
        "peak_memory_mb_by_images": peaks,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
