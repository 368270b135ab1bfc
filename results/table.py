"""
Makes the tables of results: trains and evaluates each run that is missing, then prints all tables
as Markdown.

    python results/table.py --print     # only print
    python results/table.py --jobs 2    # two runs at a time

Results go to results/results.jsonl, on CPUs in float32. cpu.jsonl and gpu.jsonl hold those of
commit cd2fdee. A seed of a case, or a curve, is printed from the file that holds most of its runs,
never from several; controls are printed from results.jsonl. An interrupted run goes on from its
checkpoint. To evaluate a run again, delete its line; to train it again, delete its folder in
out/table/ as well. For a comparison of your own, empty the three files, and change SEEDS, CASES,
METHODS, CURVES and CONTROLS. A case needs class labels: not a folder.
"""
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import runtime  # noqa: E402

GPU = torch.cuda.is_available()
FILES = ["results.jsonl", "cpu.jsonl", "gpu.jsonl"]
PRECISION = [] if GPU else ["--dtype", "float32"]    # some CPUs are faster at bfloat16
SEEDS = [0, 1, 2]
CASES = {    # title: flags of data.py, with --prior and without spaces in values; steps
    "MNIST, half of U is odd": ("--prior 0.5", 4000),
    "MNIST, 1 in 11 of U is odd": ("--prior 1/11", 2000),
    "Fashion-MNIST, half of U is shirts": (
        "--dataset fashion_mnist --sensitive shirt --prior 0.5 --n_unlabeled 10000 --n_labeled 500",
        3000)}
METHODS = {    # name: flags of train.py, where SCORES is a file and KEEP a number, see `run`
    "unsupervised": "--algorithm unsupervised",
    "supervised": "--algorithm supervised",
    "PU": "",
    "filter alone": "--algorithm unsupervised --scores SCORES",
    "filter, then PU": "--scores SCORES --keep KEEP",
    "oracle": "--algorithm oracle"}
REAL = "real normal images"
FILTERS = {}    # file of scores: the flags of pu_filter.py that make it

def folder(text: str) -> str:
    """-> a folder for the run, or the filter, with these flags"""
    text = re.sub(r"out/table/\S+/scores\.pt", "filtered", text)    # its name has the same flags
    return "out/table/" + text.replace("--", "").replace("/", "_").replace(" ", "-")

def run(data: str, method: str = "", max_steps: int = 4000, seed: int = 0) -> tuple:
    """-> the flags of train.py and of evaluate.py for a result. Those with their default value are
    left out, so that a run has the same flags in every table, and is trained once."""
    data = f"{data} --seed {seed}" if seed else data
    scores = f"{folder('filter ' + data)}/scores.pt"
    FILTERS[scores] = data
    keep = float(1 - Fraction(re.search(r"--prior (\S+)", data)[1]) * 4 / 5)    # of U
    method = method.replace("SCORES", scores).replace("KEEP", f"{keep:.3g}")
    return " ".join(filter(None, [data, method, f"--max_steps {max_steps}"])), ""

def vary(flag: str, values: list, default: str, data: str = "--prior 0.5", steps: int = 4000):
    """-> {value of this flag of train.py: run}"""
    return {value: run(data, "" if value == default else f"{flag} {value}", steps)
            for value in values}

COMPARISONS = {    # title: {method: its runs, one per seed}
    title: {method: [run(data, flags, steps, seed) for seed in SEEDS]
            for method, flags in METHODS.items()} for title, (data, steps) in CASES.items()}
HEADLINE = "--prior 0.5 --max_steps 4000"
CURVES = {    # what is varied, and for what: {value: run}
    "seed": dict(zip(SEEDS, COMPARISONS["MNIST, half of U is odd"]["PU"])),
    "steps": {n: run("--prior 0.5", max_steps=n) for n in [1000, 2000, 4000]},
    "labeled images": vary("--n_labeled", ["2500", "500", "100", "20"], "2500"),
    "prior in the risk, half of U is odd": vary(
        "--loss_prior", ["0.25", "0.5", "0.7"], "0.5", steps=1000),
    "prior in the risk, 1 in 11 is odd": vary(
        "--loss_prior", ["1/22", "1/11", "2/11"], "1/11", "--prior 1/11", steps=2000),
    "where the PU risk begins": vary("--pu_start", ["0", "1/3", "1/2", "2/3", "3/4"], "1/2"),
    "steps of the sampler, dpm++": {
        n: (HEADLINE, f"--sampler dpm++ --steps {n}") for n in [5, 10, 20]},
    "steps of the sampler, ddim": {20: (HEADLINE, "--sampler ddim --steps 20")}}
HALF = "--prior 0.5"
PART = "--prior 0.5 --labeled 1,3,5"
EMOJI = "--dataset folder --data_dir data/emoji --recipe tiny --prior 0.133"    # by emoji.py
CONTROLS = {    # title: {row: run}
    "half of U is odd, 4,000 steps": {
        "PU": run(HALF),
        "PU, seed 1": run(HALF, seed=1),
        "PU without the cap": run(HALF, "--limit inf"),
        "PU from step 1": run(HALF, "--pu_start 0"),
        "unsupervised": run(HALF, "--algorithm unsupervised"),
        "oracle": run(HALF, "--algorithm oracle"),
        "oracle, 22,500 images": run(f"{HALF} --n_unlabeled 45000", "--algorithm oracle")},
    "labeled images, without the cap": {
        n: run(f"{HALF} --n_labeled {n}", "--limit inf") for n in [500, 100, 20]},
    "S shows 1, 3 and 5": {
        "PU": run(PART), "filter alone": run(PART, METHODS["filter alone"])},
    "emoji, flags are sensitive": {
        name: (run(EMOJI, flags, max_steps=3000)[0], "--n 1000")
        for name, flags in [("PU", ""), ("PU without the cap", "--limit inf")]}}
RUNS = dict.fromkeys(sum([runs for case in COMPARISONS.values() for runs in case.values()], [])
                     + [run for rows in [*CURVES.values(), *CONTROLS.values()]
                        for run in rows.values()])

# -----------------------------------------------------------------------------
# training and evaluation

def finish(command: list) -> str:
    """-> what a script of this project prints. Raises UserError where it fails."""
    result = subprocess.run([sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    if result.returncode:
        raise runtime.UserError(f"{' '.join(command)} failed: see above")
    return result.stdout

def complete(flags: str, evaluations: list):
    """Trains, or goes on with it; then appends a line to the results for each evaluation."""
    out_dir = folder(flags)
    finish(["train.py", *flags.split(), *PRECISION, "--out_dir", out_dir, "--resume"])
    for more in evaluations:
        printed = finish(["evaluate.py", "--ckpt", f"{out_dir}/ckpt.pt", *PRECISION, *more.split()])
        machine = torch.cuda.get_device_name() if GPU else f"{os.cpu_count()} CPU cores"
        result = dict(flags=flags, evaluate_flags=more, machine=machine)
        with (ROOT / "results" / FILES[0]).open("a") as file:
            file.write(json.dumps(result | json.loads(printed.splitlines()[-1])) + "\n")
        runtime.warn(f"{flags} {more}: done")

def make(jobs: int):
    """Does all that has no line yet, several runs at a time. Raises UserError where one fails."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // jobs))
    done, todo = read_results(FILES[0]), {}    # flags of train.py: several of evaluate.py
    for flags, more in [run for run in RUNS if run not in done]:
        todo.setdefault(flags, []).append(more)
    filters = [["pu_filter.py", *data.split(), "--out_dir", str(Path(scores).parent)]
               for scores, data in FILTERS.items() if not (ROOT / scores).exists()
               and any(f"--scores {scores} " in flags for flags in todo)]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(finish, filters))    # what one raises cancels those that have not begun
        list(pool.map(complete, todo, todo.values()))

# -----------------------------------------------------------------------------
# the tables

def read_results(name: str) -> dict:
    """-> {run: result}. For a folder, rate and FID are by likeness to S and by colours in cells."""
    path, results = ROOT / "results" / name, {}
    for line in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        if "groups" in line:
            images = line["groups"]["images"]
            line |= dict(rate=1 - images["like_s"], rate_low=1 - images["like_s_high"],
                         rate_high=1 - images["like_s_low"], fid=images["distance"])
        results[line["flags"], line["evaluate_flags"]] = line
    return results

def find(runs: dict) -> dict:
    """{name: run} -> {name: result}, all from the file that has most of them"""
    results = max(map(read_results, FILES),
                  key=lambda results: len(results.keys() & set(runs.values())))
    return {name: results[run] for name, run in runs.items() if run in results}

def evaluated(title: str) -> dict:
    """-> {method: results of its seeds} of a case, and what the judge says of real normal images,
    with the floor of FID. All of a seed are from one machine."""
    found = {}
    for runs in zip(*COMPARISONS[title].values()):    # of one seed
        for method, result in find(dict(zip(METHODS, runs))).items():
            found.setdefault(method, []).append(result)
    if found:
        found[REAL] = [dict(rate=1 - result["false_alarms"], fid=result["fid_floor"])]
    return found

def mean(results: list) -> str:
    """-> a cell: mean rate and mean FID"""
    rate, fid = (sum(result[key] for result in results) / len(results) for key in ["rate", "fid"])
    return f"{rate:.3f}, {fid:.2f}"

def figures(results: list) -> list:
    """-> cells: the rates, the half width of the widest of their intervals, the FIDs"""
    halves = [(r["rate_high"] - r["rate_low"]) / 2 for r in results if "rate_high" in r]
    return [", ".join(f"{result['rate']:.3f}" for result in results),
            f"± {max(halves):.3f}" if halves else "",
            ", ".join(f"{result['fid']:.2f}" for result in results)]

def markdown() -> dict:
    """-> {title: table} of all that was evaluated"""
    columns, cases = ["non-sensitive rate", "95 %", "FID"], {t: evaluated(t) for t in CASES}
    heads = [f"{title}, {steps:,} steps" for title, (_, steps) in CASES.items()]
    tables = {"means": [["rate, FID", *heads]] + [    # title: rows
        [method, *[mean(found[method]) if method in found else "" for found in cases.values()]]
        for method in [*METHODS, REAL]]}
    for title, (data, steps) in CASES.items():
        tables[title] = [[f"`{data} --max_steps {steps}` and", *columns]] + [
            [f"{method} `{METHODS.get(method, '')}`".replace(" ``", ""), *figures(results)]
            for method, results in cases[title].items()]
    for title, runs in CURVES.items():
        tables[title] = [[title, *columns, "flags"]] + [
            [value, *figures([result]), f"`{runs[value][1] or runs[value][0]}`"]
            for value, result in find(runs).items()]
    results = read_results(FILES[0])
    for title, runs in CONTROLS.items():
        found = {row: results[run] for row, run in runs.items() if run in results}
        own = any("groups" in result for result in found.values())    # without classes
        heads = ["not like S", "95 %", "distance", ""] if own else [*columns, "1, 3, 5, 7, 9 drawn"]
        tables[title] = [[title, *heads, "flags"]] + [
            [row, *figures([result]), ", ".join(map(str, result.get("classes", [])[1::2])),
             f"`{runs[row][0]}`"] for row, result in found.items()]
    tables = {title: rows for title, rows in tables.items() if rows[1:]}
    for title, (head, *rows) in tables.items():
        lines = [f"| {' | '.join(map(str, cells))} |" for cells in rows]
        tables[title] = "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines])
    return tables

if __name__ == "__main__":
    parser = runtime.make_parser(__doc__, "python results/table.py [--flag value]")
    parser.add_argument("--print", action="store_true", help="train nothing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    args = parser.parse_args()
    if not args.print:
        make(args.jobs)
    print("\n\n".join(markdown().values()))
