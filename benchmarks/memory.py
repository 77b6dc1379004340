"""Peak memory, one cell per process.

``python -m benchmarks.memory 3c3d batch_l2 backpack extensions`` measures one. On the CPU it is the
peak of the resident set above its value when models and inputs stood ready, after one plain step
had loaded whatever is loaded lazily. On CUDA it is the allocator's own count.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import re
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from benchmarks.contenders import LIBRARIES, Contender, plain
from benchmarks.problems import PROBLEMS, instantiate
from benchmarks.quantities import ROWS

STEPS = 3
# The C library keeps freed blocks for later, more or fewer from run to run. Told to give back all
# but small ones at once, it makes the resident set follow the tensors; runs agree within a percent.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
ROOT = Path(__file__).resolve().parent.parent


def resident(field: str) -> int:
    """Return ``VmRSS``, ``VmHWM`` or ``RssFile`` in bytes."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    if found is None:
        raise OSError(f"{field} is not reported here")
    return 1024 * int(found.group(1))


def settle() -> None:
    """Give free memory back, so that later use of it is seen."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_on_cpu(contender: Contender) -> tuple[int, int, bool]:
    """Return bytes above the start at the peak of the first step and of those after it; whether it could be reset."""
    settle()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        start, was_reset = resident("VmRSS") - resident("RssFile"), True
    except OSError:
        start, was_reset = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, False
    contender.step()
    if not was_reset:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start
        return peak, peak, False
    # Pages of program files that are loaded as their code first runs are not what a step needs.
    first = resident("VmHWM") - resident("RssFile") - start
    settle()
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(STEPS):
        contender.step()
    return first, resident("VmHWM") - resident("RssFile") - start, True


def peak_on_cuda(contender: Contender, device: torch.device) -> tuple[int, int, bool]:
    """Return allocated bytes above the start at the peak of the first step, and of those after it."""
    settle()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    contender.step()
    torch.cuda.synchronize(device)
    first = torch.cuda.max_memory_allocated(device) - start
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(STEPS):
        contender.step()
    torch.cuda.synchronize(device)
    return first, torch.cuda.max_memory_allocated(device) - start, True


def measure_here(problem: str, row: str, library: str, variant: str, device: torch.device) -> tuple[int, int, bool]:
    """Measure one cell in this process."""
    for other in LIBRARIES.values():
        other.installed  # noqa: B018  imports it: all processes load the same code
    instance = instantiate(PROBLEMS[problem], device)
    if library == "plain":
        contender = plain(instance)
    else:
        contender = LIBRARIES[library].variants(instance, ROWS[row])[variant]()
    warm = plain(instance)
    warm.step()
    warm.clear()
    del warm
    if device.type == "cuda":
        return peak_on_cuda(contender, device)
    return peak_on_cpu(contender)


def measure(problem: str, row: str, library: str, variant: str, *, device: str, threads: int) -> dict[str, int] | None:
    """Measure one cell in a process of its own: bytes of the first step and of later ones; None if that fails."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory"]
    command += [problem, row, library, variant, "--device", device, "--threads", str(threads)]
    variables = {**os.environ, **ALLOCATOR}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure the cell named on the command line and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("problem", "row", "library", "variant"):
        parser.add_argument(name)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    first, peak, was_reset = measure_here(
        options.problem,
        options.row,
        options.library,
        options.variant,
        torch.device(options.device),
    )
    print(json.dumps({"bytes": peak, "first": first, "reset": was_reset}))


if __name__ == "__main__":
    main()
