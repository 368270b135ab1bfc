"""What the tests of the scripts share: running one as a user would, and a small real run to look at."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def command(script, *flags):
    return [sys.executable, str(ROOT / script), *map(str, flags)]


def run(script, *flags, check=True, cwd=None):
    """Runs a script of the project -> its CompletedProcess, with stdout and stderr as text. check: it must succeed."""
    result = subprocess.run(command(script, *flags), capture_output=True, text=True, timeout=300, cwd=cwd)
    assert not check or result.returncode == 0, result.stderr
    return result


def refused(status, words, script, *flags):
    """The script must say no in one line, with this exit status and these words, and no traceback -> that line."""
    result = run(script, *flags, check=False)
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert words in last, result.stderr
    assert len(result.stderr.splitlines()) <= 2    # argparse puts a line of usage first
    return last


SMALL = ["--dataset", "mnist", "--prior", "0.5", "--device", "cpu", "--batch_size", 32, "--warmup_steps", 5]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """The main job, 30 steps of it -> (its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("run") / "results"
    result = run("train.py", *SMALL, "--max_steps", 30, "--log_interval", 10, "--sample_interval", 20, "--out_dir", folder)
    return folder, result.stdout
