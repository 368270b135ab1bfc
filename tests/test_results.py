"""Published tables against results/mnist.jsonl, and the script that trains what they hold."""
import json
import re
import runpy
import shutil
from fractions import Fraction

import pytest
import torch
from conftest import ROOT, refused, run
from PIL import Image

import data

READMES = [ROOT / "README.md", ROOT / "results" / "README.md"]
FLAGS = re.compile(r"`(?:python train\.py )?(--[^`]*)`")    # the last cell of a row, as a whole


def table_rows(text):
    """Returns (cells, flags) for each table row whose last cell holds flags of train.py."""
    rows = []
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            found = FLAGS.fullmatch(cells[-1])
            if found:
                rows.append((cells, found[1]))
    return rows


def in_any_order(flags):
    return frozenset(re.split(r"\s+(?=--)", flags.strip()))


def check_rows(text, results):
    """Each row of a README must have the rate, its interval and the FID of its flags' result."""
    rows = table_rows(text)
    results = {in_any_order(result["flags"]): result for result in results}
    for cells, flags in rows:
        assert in_any_order(flags) in results, f"results/mnist.jsonl lacks {flags}"
        result = results[in_any_order(flags)]
        rate = "{rate:.3f} ({rate_low:.3f} to {rate_high:.3f})".format(**result)
        assert cells[1] == rate and cells[2] == f"{result['fid']:.2f}", flags
    return len(rows)


def test_the_tables_of_the_readmes_are_those_of_the_results():
    lines = (ROOT / "results" / "mnist.jsonl").read_text().splitlines()
    texts = [path.read_text() for path in READMES if path.exists()]
    assert sum(check_rows(text, map(json.loads, lines)) for text in texts) > 0


def test_a_wrong_row_is_found():
    result = dict(flags="--prior 0.5 --max_steps 9", rate=0.9, rate_low=0.89, rate_high=0.91, fid=4)
    right = "| PU | 0.900 (0.890 to 0.910) | 4.00 | 0.22 | 8 | `--max_steps 9 --prior 0.5` |"
    other = "| name | `--prior 0.5` in a sentence |\n|---|---|\n"
    assert check_rows(other + right, [result]) == 1
    for wrong in [right.replace("0.900", "0.901"), right.replace("4.00", "4.01"),
                  right.replace("0.910", "0.911"), right.replace("9 --prior", "8 --prior")]:
        with pytest.raises(AssertionError):
            check_rows(wrong, [result])


# -----------------------------------------------------------------------------
# results/table.py

def test_a_run_that_stands_in_several_tables_has_the_same_flags():
    tables = runpy.run_path(str(ROOT / "results" / "table.py"))["TABLES"]
    half, labels, _, starts = tables.values()
    assert half["PU"] == labels["2500"] == starts["1/2"] == "--prior 0.5 --max_steps 4000"
    assert half["PU by the paper"] == starts["0"]
    assert len({flags for runs in tables.values() for flags in runs.values()}) == 15


def test_its_flags_and_defaults_are_those_of_train_py(tmp_path):
    table = runpy.run_path(str(ROOT / "results" / "table.py"))
    usage = run("train.py", "--help").stdout
    for runs in table["TABLES"].values():
        for flags in runs.values():
            assert all(f"{name} " in usage for name in re.findall(r"--\w+", flags))
    run("train.py", "--prior", "0.5", "--max_steps", 2, "--batch_size", 16, "--device", "cpu",
        "--out_dir", tmp_path / "run")
    ckpt = torch.load(tmp_path / "run" / "ckpt.pt")
    args = ckpt["args"]
    defaults = table["DEFAULTS"]
    assert args["algorithm"] == defaults["algorithm"]
    assert ckpt["pu_start"] == 2 * Fraction(defaults["pu_start"])
    assert data.DATASETS["mnist"]["n_labeled"] == int(defaults["n_labeled"])


TRAIN = """\
import sys
from pathlib import Path
with open("calls.txt", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
folder = Path(sys.argv[sys.argv.index("--out_dir") + 1])
folder.mkdir(parents=True, exist_ok=True)
(folder / "ckpt.pt").touch()
if Path("fails").exists() and "supervised" in sys.argv:
    sys.exit("no more")
"""
EVALUATE = """\
import json
print("a report")
print(json.dumps(dict(rate=0.9, rate_low=0.89, rate_high=0.91, fid=4, fid_floor=0.2,
                      train_seconds=480)))
"""


def test_it_trains_what_is_missing_and_goes_on_after_a_failure(tmp_path):
    """With small scripts in the place of train.py and evaluate.py; three runs at a time, then one.
    """
    script = tmp_path / "results" / "table.py"
    script.parent.mkdir()
    shutil.copy(ROOT / "results" / "table.py", script)
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "evaluate.py").write_text(EVALUATE)
    assert run(script, "--print").stdout.count("`") == 0
    assert not (tmp_path / "calls.txt").exists()

    (tmp_path / "fails").touch()
    failed = run(script, "--jobs", 3, check=False)
    assert failed.returncode == 1 and "supervised" in failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr
    (tmp_path / "fails").unlink()
    printed = run(script).stdout
    again = run(script).stdout
    assert again == printed == run(script, "--print").stdout

    lines = (tmp_path / "results" / "mnist.jsonl").read_text().splitlines()
    assert len({json.loads(line)["flags"] for line in lines}) == len(lines) == 15
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    resumed = [call for call in calls if call.endswith(" --resume")]
    assert len(calls) == 15 + len(resumed)
    assert any("--algorithm supervised" in call for call in resumed)
    assert len(table_rows(printed)) == check_rows(printed, map(json.loads, lines)) == 18


# -----------------------------------------------------------------------------
# results/plot.py

def test_it_draws_the_log_of_a_run(small_run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.syspath_prepend(ROOT / "results")
    shutil.copy(small_run[0] / "log.csv", tmp_path)
    run("results/plot.py", tmp_path / "log.csv")
    with Image.open(tmp_path / "log.png") as image:
        assert image.width > 500
    (tmp_path / "empty.csv").touch()
    refused(1, "has no rows of train.py", "results/plot.py", tmp_path / "empty.csv")
    plot = runpy.run_path(str(ROOT / "results" / "plot.py"))
    plot["draw_labels"](tmp_path / "labels.png")
    assert (tmp_path / "labels.png").exists()
