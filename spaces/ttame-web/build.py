"""Put the complete static Space into a folder: pages, photographs, the exported explainer, onnxruntime-web from npm.

python build.py OUT
"""

import argparse
import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.resources import files
from pathlib import Path

HERE = Path(__file__).parent
PAGES = ("README.md", "index.html", "style.css", "app.js", "explainer.js")
PACKAGE = "onnxruntime-web@1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def add_runtime(target: Path) -> None:
    """onnxruntime-web's three files, from npm or its cache, checked against the package's known hash."""
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError("npm is not installed; install Node.js, which brings it")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", PACKAGE, "--prefer-offline", "--silent", "--pack-destination", folder]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        archive = next(Path(folder).glob("*.tgz"), None)
        if done.returncode or archive is None:
            raise ValueError(f"npm could not fetch {PACKAGE}: {done.stderr.strip() or done.stdout.strip()}")
        found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if found != INTEGRITY:
            raise ValueError(f"{PACKAGE} has the hash {found}, expected {INTEGRITY}; it was damaged or replaced")
        target.mkdir(exist_ok=True)
        with tarfile.open(archive) as package:
            for name in RUNTIME:
                content = package.extractfile(f"package/dist/{name}")
                assert content is not None
                (target / name).write_bytes(content.read())


def add_explainer(target: Path) -> None:
    """The shipped explainer as explainer.onnx with explainer.json."""
    from hf_ttame.demo import load_explainer
    from hf_ttame.export import export_onnx

    export_onnx(load_explainer(), target / "explainer.onnx", classes="top5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to fill; files of an earlier build are replaced")
    parser.add_argument(
        "--explainer", type=Path, help="an .onnx file exported with --classes top5; default: export now"
    )
    arguments = parser.parse_args()
    try:
        (arguments.out / "photographs").mkdir(parents=True, exist_ok=True)
        for name in PAGES:
            shutil.copy(HERE / name, arguments.out / name)
        for photograph in sorted((Path(str(files("hf_ttame"))) / "assets" / "photographs").iterdir()):
            shutil.copy(photograph, arguments.out / "photographs" / photograph.name)
        add_runtime(arguments.out / "ort")
        if arguments.explainer is None:
            add_explainer(arguments.out)
        else:
            shutil.copy(arguments.explainer, arguments.out / "explainer.onnx")
            shutil.copy(arguments.explainer.with_suffix(".json"), arguments.out / "explainer.json")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"build: {error}")
    size = sum(file.stat().st_size for file in arguments.out.rglob("*") if file.is_file())
    print(f"wrote {arguments.out} ({size / 1e6:.0f} MB); push it as a static Space or serve it with any web server")


if __name__ == "__main__":
    main()
