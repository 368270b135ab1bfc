"""
Makes the tables of results: trains and evaluates each run that results.jsonl does not hold, then
prints all tables as Markdown. On two cores that takes days.

    python results/table.py --print     # only print
    python results/table.py --jobs 2    # two runs at a time

Results go to results/results.jsonl, on CPUs in float32. The emoji need the folder that emoji.py
makes. An interrupted run goes on from its checkpoint. To evaluate a run again, delete its line; to
train it again, delete its folder in out/table/ as well. For a comparison of your own, empty that
file, and change CASES, METHODS, CURVES and OTHERS.
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
PRECISION = [] if GPU else ["--dtype", "float32"]    # some CPUs are faster at bfloat16
HALF, RARE = "--prior 0.5", "--prior 1/11"
SHIRTS = "--dataset fashion_mnist --sensitive shirt --prior 0.5 --n_unlabeled 10000 --n_labeled 500"
PHOTOS = "--dataset cifar10 --prior 0.5 --n_unlabeled 8000 --n_labeled 2000"
EMOJI = "--dataset folder --data_dir data/emoji --prior 0.133"    # by emoji.py
CASES = {    # title: flags of data.py, with --prior and without spaces in values; steps
    "MNIST, half of U is odd": (HALF, 4000),
    "MNIST, 1 in 11 of U is odd": (RARE, 2000),
    "Fashion-MNIST, half of U is shirts": (SHIRTS, 3000)}
METHODS = {    # name: flags of train.py, where SCORES is a file and KEEP a number, see `run`
    "unsupervised": "--algorithm unsupervised",
    "supervised": "--algorithm supervised",
    "PU": "",
    "filter alone": "--algorithm unsupervised --scores SCORES",
    "filter, then PU": "--scores SCORES --keep KEEP",
    "oracle": "--algorithm oracle"}
SEEDS = ["", " --seed 1", " --seed 2"]
REAL = "real normal images"
FILTERS = {}    # file of scores: the flags of pu_filter.py that make it; filled by `run`

def short(flags: str) -> str:
    """-> the flags, without long paths: a folder is named by the flags that made it"""
    flags = re.sub(r"out/table/\S+/scores\.pt", "SCORES", flags)
    return re.sub(r"out/table/\S+/ckpt\.pt", "MODEL", flags)

def folder(flags: str) -> str:
    """-> a folder for the run, or the filter, with these flags"""
    return "out/table/" + short(flags).replace("--", "").replace("/", "_").replace(" ", "-")

def run(data: str, method: str = "", max_steps: int = 4000, more: str = "") -> tuple:
    """-> the flags of train.py and of evaluate.py for a result. Those with their default value are
    left out, so that a run has the same flags in every table, and is trained once."""
    scores = f"{folder('filter ' + data)}/scores.pt"
    FILTERS[scores] = data
    keep = float(1 - Fraction(re.search(r"--prior (\S+)", data)[1]) * 4 / 5)    # drops 0.8 prior
    method = method.replace("SCORES", scores).replace("KEEP", f"{keep:.3g}")
    return " ".join(f"{data} {method} --max_steps {max_steps}".split()), more

LABELS = {2500: HALF} | {n: f"{HALF} --n_labeled {n}" for n in [500, 100, 20]}
CURVES = {    # what is varied, and for what: {value: run}
    "steps": {n: run(HALF, max_steps=n) for n in [1000, 4000, 8000]},
    "labeled images, PU": {n: run(data) for n, data in LABELS.items()},
    "labeled images, no cap": {n: run(data, "--limit inf") for n, data in LABELS.items()},
    "labeled images, filter": {
        n: run(data, METHODS["filter alone"]) for n, data in LABELS.items()},
    "labeled images, filter, then PU": {
        n: run(data, METHODS["filter, then PU"])
        for n, data in LABELS.items() if n > 20},    # of 20 the filter leaves 4
    "prior in the risk": {
        prior: run(HALF, "" if prior == "0.5" else f"--loss_prior {prior}", 1000)
        for prior in ["0.25", "0.5", "0.7"]},
    "steps of the sampler, dpm++": {
        n: run(HALF, more="" if n == 20 else f"--steps {n}") for n in [5, 10, 20]},
    "steps of the sampler, ddim": {20: run(HALF, more="--sampler ddim")}}
TRAINED = f"{folder(run(HALF, METHODS['unsupervised'])[0])}/ckpt.pt"
OTHERS = {    # title: {row: run}
    "controls, half of U is odd": {
        "PU, 100 labels, a cap of 10": run(LABELS[100], "--limit 10"),
        "PU from step 1": run(HALF, "--pu_start 0"),
        "oracle, 22,500 images": run(f"{HALF} --n_unlabeled 45000", "--algorithm oracle"),
        "PU, S shows 1, 3 and 5": run(f"{HALF} --labeled 1,3,5")},
    "half of U is odd, cleaned in 1,000 steps": {
        "before": run(HALF, METHODS["unsupervised"])} | {
        f"{name}{lr}": run(HALF, f"{METHODS[name]} --init_from {TRAINED} {lr[2:]}", 1000)
        for name in ["PU", "filter alone"] for lr in ["", ", --lr 1e-3"]},
    "photographs, half of U shows animals": {
        name: run(PHOTOS, f"--recipe small {METHODS[name]}", 3000)
        for name in ["PU", "unsupervised", "oracle"]}}
BY_SEED = {    # title: {method: a run with each seed}
    title: {method: [run(data + seed, flags, steps) for seed in SEEDS]
            for method, flags in METHODS.items()}
    for title, (data, steps) in CASES.items()}
BY_SEED["1 in 11 is odd, prior in the risk"] = {
    f"{name}, {steps:,} steps": [run(RARE + seed, flags, steps) for seed in SEEDS]
    for steps in [2000, 4000]
    for name, flags in [("half of it", "--loss_prior 1/22"), ("the true one", ""),
                        ("twice it", "--loss_prior 2/11")]}
BY_SEED["emoji, flags are sensitive"] = {
    method: [run(EMOJI + seed, f"--recipe tiny {flags}", 3000, more="--n 1000") for seed in SEEDS]
    for method, flags in (METHODS | {"PU without the cap": "--limit inf"}).items()
    # a folder has no labels; the filter leaves too few images of S for PU training after it
    if method not in ("oracle", "filter, then PU")}
TABLES = {    # title: {row: run}
    title: {method: runs[0] for method, runs in rows.items()} for title, rows in BY_SEED.items()}
TABLES["Fashion-MNIST, half of U is shirts"]["filter alone, --keep 0.35"] = run(
    SHIRTS, f"{METHODS['filter alone']} --keep 0.35", 3000)
TABLES |= CURVES | OTHERS

def all_runs() -> list:
    """-> the runs of all tables, each once"""
    seeds = [runs for rows in BY_SEED.values() for runs in rows.values()]
    return list(dict.fromkeys(sum([list(rows.values()) for rows in TABLES.values()] + seeds, [])))

# -----------------------------------------------------------------------------
# training and evaluation

def run_script(command: list) -> str:
    """Runs a script of this project -> what it prints. Raises UserError where it fails."""
    result = subprocess.run([sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    if result.returncode:
        raise runtime.UserError(f"{' '.join(command)} failed: see above")
    return result.stdout

def complete(flags: str, evaluations: list):
    """Trains, or goes on with it; then appends a line to the results for each evaluation."""
    out_dir = folder(flags)
    run_script(["train.py", *flags.split(), *PRECISION, "--out_dir", out_dir, "--resume"])
    for more in evaluations:
        command = ["evaluate.py", "--ckpt", f"{out_dir}/ckpt.pt", *PRECISION, *more.split()]
        result = json.loads(run_script(command).splitlines()[-1])
        machine = torch.cuda.get_device_name() if GPU else f"{os.cpu_count()} CPU cores"
        about = dict(flags=flags, evaluate_flags=more, machine=machine)
        with (ROOT / "results" / "results.jsonl").open("a") as file:
            file.write(json.dumps(about | result) + "\n")
        runtime.warn(f"{flags} {more}: done")

def make(jobs: int):
    """Does all that has no line yet, several runs at a time. Raises UserError where one fails."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // jobs))
    done, todo = read_results(), {}    # flags of train.py: several of evaluate.py
    for flags, more in all_runs():
        if (flags, more) not in done:
            todo.setdefault(flags, []).append(more)
    filters = [["pu_filter.py", *data.split(), "--out_dir", str(Path(scores).parent)]
               for scores, data in FILTERS.items() if not (ROOT / scores).exists()
               and any(f"--scores {scores} " in flags for flags in todo)]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run_script, filters))    # what one raises cancels those that have not begun
        for starts_from_another in [False, True]:
            now = [flags for flags in todo if ("--init_from" in flags) == starts_from_another]
            list(pool.map(complete, now, map(todo.get, now)))

# -----------------------------------------------------------------------------
# the tables

def read_results() -> dict:
    """-> {run: result}. For a folder, rate and FID are by likeness to S and by colours in cells."""
    path, results = ROOT / "results" / "results.jsonl", {}
    for line in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        if "groups" in line:
            images = line["groups"]["images"]
            line |= dict(rate=1 - images["like_s"], rate_low=1 - images["like_s_high"],
                         rate_high=1 - images["like_s_low"], fid=images["distance"])
        results[line["flags"], line["evaluate_flags"]] = line
    return results

def evaluated(title: str) -> dict:
    """-> {row: result} of a table"""
    results = read_results()
    found = {row: results[run] for row, run in TABLES[title].items() if run in results}
    if found and title in CASES:    # what the judge says of real images, and the floor of FID
        result = next(iter(found.values()))
        found[REAL] = dict(rate=1 - result["false_alarms"], fid=result["fid_floor"])
    return found

def other_seeds(title: str, row: str) -> list:
    """-> the results with the other seeds, as far as they were evaluated"""
    results = read_results()
    return [results[run] for run in BY_SEED[title].get(row, [])[1:] if run in results]

def markdown() -> dict:
    """-> {title: table} of all that was evaluated. 95 %: half the width of the rate's interval"""
    tables = {}
    for title in TABLES:
        found, columns = evaluated(title), [title, "non-sensitive rate", "95 %", "FID", "flags"]
        if any("groups" in result for result in found.values()):    # images without classes
            columns[1:4] = ["not like S", "95 %", "distance"]
        if title in BY_SEED:
            columns.insert(4, "seeds 1 and 2")
        lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
        for row, result in found.items():
            interval = ""
            if row != REAL:
                interval = f"± {(result['rate_high'] - result['rate_low']) / 2:.3f}"
            cells = [str(row), f"{result['rate']:.3f}", interval, f"{result['fid']:.2f}"]
            if title in BY_SEED:
                cells.append("; ".join(f"{other['rate']:.3f}, {other['fid']:.2f}"
                                       for other in other_seeds(title, row)))
            flags = TABLES[title].get(row, [])
            cells.append(", ".join(f"`{short(words)}`" for words in flags if words))
            lines.append(f"| {' | '.join(cells)} |")
        if found:
            tables[title] = "\n".join(lines)
    return tables

if __name__ == "__main__":
    parser = runtime.make_parser(__doc__, "python results/table.py [--flag value]")
    parser.add_argument("--print", action="store_true", help="train nothing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    args = parser.parse_args()
    if not args.print:
        make(args.jobs)
    print("\n\n".join(markdown().values()))
