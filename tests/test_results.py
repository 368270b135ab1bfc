"""Published tables and figures against results/results.jsonl, and the scripts that make them."""
import importlib
import json
import re
import shutil

import pytest
from conftest import ROOT, run
from PIL import Image

from runtime import UserError


@pytest.fixture
def table(monkeypatch):
    """results/table.py, imported."""
    monkeypatch.syspath_prepend(ROOT / "results")
    return importlib.import_module("table")


def unknown_figures(text, tables):
    """The numbers with two or three decimals in a text that no table holds."""
    published = set(re.findall(r"\d+\.\d{2,3}\b", " ".join(tables.values())))
    return [number for number in re.findall(r"\d+\.\d{2,3}\b", text) if number not in published]


def test_published_tables_and_figures_are_those_of_the_results(table):
    tables = table.markdown()
    text = (ROOT / "results" / "README.md").read_text()
    assert tables and all(rows in text for rows in tables.values())
    readme = (ROOT / "README.md").read_text()
    works = readme.split("## Does it work?")[1].split("\n## ")[0]
    assert len(works) > 500 and not unknown_figures(works, tables)
    pairs = re.findall(r"(\d\.\d{3})\**, \**(\d+\.\d\d)\b", works)    # a rate and its FID
    of_rows = re.findall(r"\| (\d\.\d{3}) \|[^|]*\| (\d+\.\d\d) \|", " ".join(tables.values()))
    of_seeds = re.findall(r"(\d\.\d{3}), (\d+\.\d\d)", " ".join(tables.values()))
    assert len(pairs) > 10 and set(pairs) <= {*of_rows, *of_seeds}
    found = text.split("## What we found")[1].split("\n## ")[0]
    assert len(found) > 500 and not unknown_figures(found, tables)


def test_its_flags_are_those_of_the_scripts(table):
    help_of = {script: run(script, "--help").stdout for script in ["train.py", "evaluate.py"]}
    for flags, evaluate_flags in table.all_runs():
        for script, words in [("train.py", flags), ("evaluate.py", evaluate_flags)]:
            assert all(f"{name} " in help_of[script] for name in re.findall(r"--\w+", words))
    curves, title = table.CURVES, "MNIST, half of U is odd"
    assert {table.TABLES[title]["PU"], curves["steps"][4000], curves["labeled images, PU"][2500],
            curves["steps of the sampler, dpm++"][20]} == {("--prior 0.5 --max_steps 4000", "")}


SCRIPT = """\
import json, sys
from pathlib import Path
with open("calls.txt", "a") as file:
    print(*sys.argv, file=file)
if sys.argv[0] == "evaluate.py":
    print(json.dumps(dict(rate=0.9, rate_low=0.89, rate_high=0.91, fid=4, fid_floor=0.2,
                          false_alarms=0.01)))
elif sys.argv[0] == "pu_filter.py":
    folder = Path(sys.argv[sys.argv.index("--out_dir") + 1])
    folder.mkdir(parents=True)
    (folder / "scores.pt").touch()
elif Path("fails").exists() and "supervised" in sys.argv:
    sys.exit("no more")
"""


def test_it_makes_what_is_missing_and_goes_on_after_a_failure(table, monkeypatch, tmp_path):
    """With small scripts in the place of the real ones; three runs at a time, then one."""
    title = "MNIST, half of U is odd"
    tables = {title: table.TABLES[title] for title in [title, "steps of the sampler, dpm++"]}
    monkeypatch.setattr(table, "TABLES", tables)
    monkeypatch.setattr(table, "BY_SEED", {title: {"PU": table.BY_SEED[title]["PU"]}})
    runs = table.all_runs()
    monkeypatch.setattr(table, "CASES", {title: table.CASES[title]})
    (tmp_path / "results").mkdir()
    for name in ["train.py", "evaluate.py", "pu_filter.py"]:
        (tmp_path / name).write_text(SCRIPT)
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")    # restored for other tests: make() changes it
    (tmp_path / "fails").touch()
    with pytest.raises(UserError, match="supervised"):
        table.make(jobs=3)
    (tmp_path / "fails").unlink()
    table.make(jobs=1)
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    table.make(jobs=1)
    assert (tmp_path / "calls.txt").read_text().splitlines() == calls    # nothing is done twice

    lines = [json.loads(line) for line in (tmp_path / "results" / "results.jsonl").open()]
    assert {(line["flags"], line["evaluate_flags"]) for line in lines} == set(runs)
    assert len(lines) == len(runs)
    assert {line["flags"] for line in lines} > {
        "--prior 0.5 --max_steps 4000", "--prior 0.5 --seed 2 --max_steps 4000"}
    assert sum(line.startswith("pu_filter.py") for line in calls) == 1    # for two methods
    assert table.markdown()[title].count("| 0.900 | ± 0.010 | 4.00 |") == len(table.METHODS)
    assert "| PU | 0.900 | ± 0.010 | 4.00 | 0.900, 4.00; 0.900, 4.00 | `" in table.markdown()[title]


def test_it_draws_the_log_of_a_run(table, small_run, tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    shutil.copy(small_run[0] / "log.csv", tmp_path)
    run("results/plot.py", tmp_path / "log.csv")
    with Image.open(tmp_path / "log.png") as image:
        assert image.width > 500
    plot = importlib.import_module("plot")
    curves = {title.split(",")[0] for title in table.CURVES}
    for figure, columns in [(plot.draw_curves(), curves), (plot.draw_methods(), table.CASES)]:
        assert len(figure.axes) == 2 * len(columns) and all(axes.lines for axes in figure.axes)
