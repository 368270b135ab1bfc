"""Published tables and figures against results/*.jsonl, and the scripts that make them."""
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

RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def table():
    return runpy.run_path(str(RESULTS / "table.py"))


def lost(tables, text):
    """The titles of the tables that a text does not hold word for word."""
    return [title for title, rows in tables.items() if rows not in text]


def unknown_figures(text, tables):
    """The numbers with two or three decimals in a text that no table holds."""
    known = set(re.findall(r"\d+\.\d{2,3}\b", " ".join(tables.values())))
    return [number for number in re.findall(r"\d+\.\d{2,3}\b", text) if number not in known]


def test_published_tables_and_figures_are_those_of_the_results(table):
    tables = table["markdown"]()
    text = (RESULTS / "README.md").read_text()
    assert tables and not lost(tables, text)
    readme = (ROOT / "README.md").read_text()
    assert tables["means"] in readme
    works = readme.split("## Does it work?")[1].split("\n## ")[0]
    assert len(works) > 500 and not unknown_figures(works, tables)
    found = text.split("## What we found")[1].split("\n## ")[0]
    assert len(found) > 500 and not unknown_figures(found, tables)


def test_a_wrong_figure_is_found():
    tables = {"PU": "| PU | 0.900 | 4.00 |"}
    assert not lost(tables, "Text.\n| PU | 0.900 | 4.00 |\n")
    assert lost(tables, "| PU | 0.901 | 4.00 |") == ["PU"]
    assert not unknown_figures("A rate of 0.900, in 13.7 minutes.", tables)
    assert unknown_figures("A rate of 0.901 and an FID of 4.01.", tables) == ["0.901", "4.01"]


# -----------------------------------------------------------------------------
# results/table.py

def test_a_run_that_stands_in_several_tables_has_the_same_flags(table):
    tables, default = table["TABLES"], "--prior 0.5 --max_steps 4000"
    assert tables["MNIST, half of U is odd"]["PU, seed 0"] == default == table["SAMPLED"]
    for title, value in [("steps", 4000), ("labeled images", "2500"),
                         ("where the PU risk begins", "1/2")]:
        assert tables[title][value] == default
    assert tables["prior in the risk, half of U is odd"]["0.5"] == tables["steps"][1000]
    for seed in table["SEEDS"]:
        assert tables["seed"][seed] == tables["MNIST, half of U is odd"][f"PU, seed {seed}"]


def test_its_flags_and_defaults_are_those_of_train_py(table, tmp_path):
    usage = run("train.py", "--help").stdout
    for runs in table["TABLES"].values():
        for flags in runs.values():
            assert all(f"{name} " in usage for name in re.findall(r"--\w+", flags))
    run("train.py", "--prior", "0.5", "--max_steps", 2, "--batch_size", 16, "--device", "cpu",
        "--out_dir", tmp_path / "run")
    ckpt = torch.load(tmp_path / "run" / "ckpt.pt")
    assert ckpt["args"]["algorithm"] == "pu"
    assert ckpt["pu_start"] == 2 * Fraction("1/2")
    assert data.DATASETS["mnist"]["n_labeled"] == 2500


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
FILTER = """\
import sys
from pathlib import Path
with open("calls.txt", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
folder = Path(sys.argv[sys.argv.index("--out_dir") + 1])
folder.mkdir(parents=True)
(folder / "scores.pt").touch()
"""
EVALUATE = """\
import json
print("a report")
print(json.dumps(dict(rate=0.9, rate_low=0.89, rate_high=0.91, fid=4, fid_floor=0.2, n=5000,
                      false_alarms=0.01, train_seconds=480, train_steps=1000)))
"""


@pytest.fixture
def script(tmp_path):
    """A copy of table.py, with results of its own."""
    (tmp_path / "results").mkdir()
    return shutil.copy(RESULTS / "table.py", tmp_path / "results" / "table.py")


def test_it_trains_what_is_missing_and_goes_on_after_a_failure(table, script, tmp_path):
    """With small scripts in the place of the real ones; three runs at a time, then one."""
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "evaluate.py").write_text(EVALUATE)
    (tmp_path / "pu_filter.py").write_text(FILTER)
    results = script.with_name("cpu.jsonl")
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

    lines = [json.loads(line) for line in results.read_text().splitlines()]
    distinct = {(line["flags"], line["evaluate_flags"]) for line in lines}
    n_runs = len({flags for runs in table["TABLES"].values() for flags in runs.values()})
    assert len(lines) == len(distinct) == n_runs + len(table["SAMPLERS"])
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert len(set(calls)) == n_runs + 9 + 3    # filters: of three cases, and with few labels
    assert printed.count("0.900, 0.900, 0.900") == 3 * 6 and printed.count("0.9, 4.00") == 0
    assert printed.count("| 0.900, 4.00 | 0.900, 4.00 | 0.900, 4.00 |") == 6


def test_all_methods_of_a_seed_are_printed_from_one_machine(table, script):
    title = "MNIST, 1 in 11 of U is odd"
    for name, rate, rows in [("gpu", 0.75, ["PU, seed 0", "oracle, seed 0", "oracle, seed 1"]),
                             ("cpu", 0.25, ["PU, seed 0", "PU, seed 1", "supervised, seed 1"])]:
        lines = [json.dumps(dict(flags=table["COMPARISONS"][title][row], evaluate_flags="",
                                 rate=rate, fid=4, false_alarms=0, fid_floor=0.2)) for row in rows]
        script.with_name(f"{name}.jsonl").write_text("\n".join(lines))
    found = {line.split("|")[1].split("`")[0].strip(): line.split("|")[2].strip()
             for line in run(script, "--print").stdout.splitlines() if line.count("|") == 5}
    assert (found["PU"], found["oracle"], found["supervised"]) == ("0.750, 0.250", "0.750", "0.250")


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
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\n\x80")
    for name in ["empty.csv", "binary.csv"]:
        refused(1, "has no rows of train.py", "results/plot.py", tmp_path / name)
    plot = runpy.run_path(str(ROOT / "results" / "plot.py"))
    for draw in ["draw_methods", "draw_curves"]:
        plot[draw](tmp_path / "plot.png")
        with Image.open(tmp_path / "plot.png") as image:
            assert image.width > 500


# -----------------------------------------------------------------------------
# results/second_judge.py

def test_the_second_judge_sees_patches_and_what_both_say_is_counted():
    second = runpy.run_path(str(RESULTS / "second_judge.py"))
    torch.manual_seed(0)
    model = second["Transformer"](image_channels=1, image_size=8, n_classes=3).eval()
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        logits, _ = model(x)
        model.position.zero_()
        unplaced, _ = model(x)
        assert not torch.allclose(unplaced, logits)    # it knew where a patch lies
        swapped, _ = model(torch.cat([x[..., 4:], x[..., :4]], dim=-1))
        assert torch.allclose(swapped, unplaced, atol=1e-5)    # whole patches of 4x4
    first, other = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 2, 0, 1])
    row = second["compare"]("samples", first, other, sensitive=[2])
    assert row == {"images": "samples", "n": 4, "rate": 0.5, "rate_by_second": 0.75,
                   "agreement": 0.25, "sensitive_to_either": 3, "sensitive_to_both": 0}
