"""Memory that is freed and kept, in a process of its own: it would hold for the whole test run."""

import platform
import subprocess
import sys

import pytest

MEASURE = """
import resource
from hf_ttame.memory import keep_freed_memory

def faults(rounds=5, size=64 << 20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        bytearray(b"1") * size
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = faults()
keep_freed_memory()
faults(1)
print(plain, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives it back")
def test_freed_memory_is_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    plain, kept = map(int, done.stdout.split())
    assert kept < plain / 10, f"{plain} page faults before, {kept} after"
