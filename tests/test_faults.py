"""The faults of faults.py, a few of each kind, in a process of its own: it forks."""
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("resource")    # not on Windows


def test_nothing_is_lost_and_nothing_is_silently_wrong():
    result = subprocess.run([sys.executable, ROOT / "tests" / "faults.py", "--quick"],
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    kinds = [line.split(": ")[0] for line in result.stdout.splitlines() if " tried, " in line]
    assert {"kills", "signals", "full disks", "bits of checkpoint", "mutated files",
            "flags"} <= set(kinds)
