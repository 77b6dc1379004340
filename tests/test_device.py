"""Where tensors lie: the library on a device that is not there, which refuses what a GPU refuses (see pretend.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices in Python",
)
def test_everything_stays_on_the_device() -> None:
    """Cases of the table, optimizers, monitor, oracles, attacks: the numbers of the CPU, on the model's device."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.on_device"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.stdout.splitlines() == ["end"], run.stdout + run.stderr[-3000:]
