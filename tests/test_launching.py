"""Starting the training script: its exit status, its surroundings, and signals. The scripts here are small ones."""

import os
import signal
from pathlib import Path

import pytest
import torch

from hf_ttame import launching
from hf_ttame.launching import Ended, run_training

pytest.importorskip("accelerate")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "a script.py"


@pytest.mark.parametrize(
    ("code", "ended"),
    [
        ("pass", Ended(0, False)),
        ("raise SystemExit(3)", Ended(3, False)),
        ("raise SystemExit(130)", Ended(130, True)),  # the training was stopped, and has saved
        ("import os; os.kill(os.getpid(), 9)", Ended(137, False)),
    ],
)
def test_the_exit_status_is_kept(script: Path, code: str, ended: Ended, capfd: pytest.CaptureFixture[str]) -> None:
    script.write_text(code)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    path = os.environ.get("PYTHONPATH")
    assert run_training(script, []) == ended
    assert capfd.readouterr().err == "", "no traceback of the launcher"
    assert before == {number: signal.getsignal(number) for number in before}
    assert os.environ.get("PYTHONPATH") == path


def test_arguments_arrive_and_the_package_is_found(script: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script.write_text("import importlib.util, sys\nprint(sys.argv[1:], importlib.util.find_spec('hf_ttame').origin)")
    assert run_training(script, ["--name", "with a space"], ["--num_processes", "1"]).status == 0
    assert (
        capfd.readouterr().out == f"['--name', 'with a space'] {Path(launching.__file__).with_name('__init__.py')}\n"
    )


@pytest.mark.skipif(torch.accelerator.is_available(), reason="about a machine with nothing but a CPU")
def test_on_a_cpu_every_core_works(
    script: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Accelerate alone gives a process one thread."""
    from accelerate.commands.config import config_args

    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "none"))
    script.write_text("import os; print(os.environ['OMP_NUM_THREADS'])")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    for given, found in ((None, "5"), ("3", "3")):
        monkeypatch.delenv("OMP_NUM_THREADS") if given is None else monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert run_training(script, []).status == 0
        assert capfd.readouterr().out.strip() == found


def test_ctrl_c_is_passed_on_as_a_polite_request(script: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The terminal sends it to both; sent on as it came, it would be the second one, which ends a training at once."""
    script.write_text(
        "import os, signal, sys, time\n"
        "came = []\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    signal.signal(number, lambda number, _: came.append(number))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "while not came: time.sleep(0.01)\n"
        "print(came == [signal.SIGTERM])\n"
    )
    assert run_training(script, []) == Ended(0, True)
    assert capfd.readouterr().out == "True\n"


def test_a_signal_before_the_training_starts_ends_at_once(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_launch", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr("psutil.Process.children", lambda _: [])
    assert run_training(script, []) == Ended(143, True)
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN
