"""
Makes the tables of results: trains and evaluates each run that is missing, then prints all tables
as Markdown.

    python results/table.py --print     # only print
    python results/table.py --jobs 2    # two runs at a time

Results go to results/gpu.jsonl where there is a GPU, else to results/cpu.jsonl. A seed of a case,
or a curve, is printed from the file that holds more of its runs, never from both. An interrupted
run goes on from its checkpoint. To evaluate a run again, delete its line; to train it again, delete
its folder in out/table/ as well.

For a comparison of your own, empty both files, and delete what you do not want from SEEDS, CASES,
METHODS, CURVES and SAMPLERS. A case needs class labels, for the judge and the oracle: not a folder.
"""
import argparse
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
FILES = [ROOT / "results" / name for name in ["cpu.jsonl", "gpu.jsonl"]]
RESULTS = FILES[torch.accelerator.is_available()]    # a line a run: what evaluate.py says

# -----------------------------------------------------------------------------
# the runs

SEEDS = [0, 1, 2]
CASES = {    # title: flags of data.py, with --prior and without spaces in values; steps
    "MNIST, half of U is odd": ("--prior 0.5", 4000),
    "MNIST, 1 in 11 of U is odd": ("--prior 1/11", 2000),
    "Fashion-MNIST, half of U is shirts": (
        "--dataset fashion_mnist --sensitive shirt --prior 0.5 --n_unlabeled 10000 --n_labeled 500",
        3000),
}
METHODS = {    # name: flags of train.py, where SCORES is a file and KEEP a number, see run_flags
    "unsupervised": "--algorithm unsupervised",
    "supervised": "--algorithm supervised",
    "PU": "",
    "filter alone": "--algorithm unsupervised --scores SCORES",
    "filter, then PU": "--scores SCORES --keep KEEP",
    "oracle": "--algorithm oracle",
}


FILTERS = {}    # file of scores: the flags of pu_filter.py that make it


def run_flags(data: str, *others: str, seed: int = 0, max_steps: int = 4000) -> str:
    """The flags of train.py for one run. Those with their default value are left out, so that a run
    has the same flags in every table, and is trained once."""
    data = f"{data} --seed {seed}" if seed else data
    flags = " ".join([data, *filter(None, others), f"--max_steps {max_steps}"])
    scores = f"{folder('filter ' + data)}/scores.pt"
    FILTERS[scores] = data
    prior = Fraction(re.search(r"--prior (\S+)", data)[1])
    keep = f"{float(1 - prior * 4 / 5):.3g}"    # drops 4/5 of prior |U| images
    return flags.replace("SCORES", scores).replace("KEEP", keep)


def folder(text: str) -> str:
    text = re.sub(r"out/table/\S+/scores\.pt", "filtered", text)    # its name has the same flags
    return "out/table/" + text.replace("--", "").replace("/", "_").replace(" ", "-")


def vary(name: str, values: list, default: str, data: str = "--prior 0.5",
         max_steps: int = 4000) -> dict:
    """One run of train.py by value of one of its flags."""
    return {v: run_flags(data, "" if v == default else f"--{name} {v}", max_steps=max_steps)
            for v in values}


def seeds_of(title: str, method: str) -> list:
    """The runs of a bar in the chart, one for each seed."""
    data, steps = CASES[title]
    return [run_flags(data, METHODS[method], seed=seed, max_steps=steps) for seed in SEEDS]


COMPARISONS = {
    title: {f"{method}, seed {seed}": run
            for method in METHODS for seed, run in zip(SEEDS, seeds_of(title, method))}
    for title in CASES}
LABELS = ["2500", "500", "100", "20"]
CURVES = {
    "seed": dict(zip(SEEDS, seeds_of("MNIST, half of U is odd", "PU"))),
    "steps": {n: run_flags("--prior 0.5", max_steps=n) for n in [1000, 2000, 4000]},
    "labeled images": vary("n_labeled", LABELS, default="2500"),
    "labeled images, filter alone": {
        n: run_flags("--prior 0.5" if n == "2500" else f"--prior 0.5 --n_labeled {n}",
                     METHODS["filter alone"]) for n in LABELS},
    "prior in the risk, half of U is odd": vary(
        "loss_prior", ["0.25", "0.5", "0.7"], "0.5", max_steps=1000),
    "prior in the risk, 1 in 11 is odd": vary(
        "loss_prior", ["1/22", "1/11", "2/11"], "1/11", "--prior 1/11", max_steps=2000),
    "where the PU risk begins": vary("pu_start", ["0", "1/3", "1/2", "2/3", "3/4"], default="1/2"),
}
TABLES = COMPARISONS | CURVES    # title: {name of the row: flags of train.py}
SAMPLED = run_flags("--prior 0.5")
SAMPLERS = [f"--sampler {name} --steps {steps}" for name, steps in [
    ("dpm++", 5), ("dpm++", 10), ("dpm++", 20), ("ddim", 20)]]    # for the images of one run


# -----------------------------------------------------------------------------
# training and evaluation

def scores_of(flags: str):
    """-> the file of pu_filter.py that a run needs, or None."""
    words = flags.split()
    return words[words.index("--scores") + 1] if "--scores" in words else None


def finish(*command: str, env: dict) -> str:
    """-> what a script of this project prints. Raises CalledProcessError where it fails."""
    return subprocess.run([sys.executable, *command], check=True, env=env, cwd=ROOT, text=True,
                          stdout=subprocess.PIPE).stdout


def score(scores: str, env: dict):
    """Has pu_filter.py write these scores, unless they exist."""
    if not (ROOT / scores).exists():
        out_dir = str(Path(scores).parent)
        finish("pu_filter.py", *FILTERS[scores].split(), "--out_dir", out_dir, env=env)


def train(flags: str, env: dict):
    """Does one run, or goes on with it."""
    out_dir = folder(flags)
    finish("train.py", *flags.split(), "--out_dir", out_dir, "--resume", env=env)


def evaluate(flags: str, env: dict, evaluate_flags: str = ""):
    """Appends a line to the results."""
    command = ["evaluate.py", "--ckpt", f"{folder(flags)}/ckpt.pt", *evaluate_flags.split()]
    result = json.loads(finish(*command, env=env).splitlines()[-1])
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    else:
        machine = str(torch.accelerator.current_accelerator() or f"{os.cpu_count()} CPU cores")
    result = dict(flags=flags, evaluate_flags=evaluate_flags, machine=machine) | result
    with RESULTS.open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(f"{flags} {evaluate_flags}: done", file=sys.stderr, flush=True)


def make(jobs: int):
    """Does and evaluates all that has no line yet, several at a time. Raises CalledProcessError
    where one fails, once those that run have ended."""
    known = read_results(RESULTS)
    env = dict(os.environ, OMP_NUM_THREADS=str(max(1, os.cpu_count() // jobs)))
    distinct = dict.fromkeys(flags for runs in TABLES.values() for flags in runs.values())
    missing = [flags for flags in distinct if (flags, "") not in known]
    samplers = [flags for flags in SAMPLERS if (SAMPLED, flags) not in known]
    if samplers and SAMPLED not in missing and not (ROOT / folder(SAMPLED) / "ckpt.pt").exists():
        missing.append(SAMPLED)    # its line is there, its checkpoint is not
    with ThreadPoolExecutor(jobs) as pool:
        scored, done = {}, {}
        for flags in missing:
            scores = scores_of(flags)
            if scores and scores not in scored:
                scored[scores] = pool.submit(score, scores, env)

        def complete(flags):
            if scores_of(flags):
                scored[scores_of(flags)].result()    # has begun: it was submitted before
            train(flags, env)
            evaluate(flags, env)

        def sample(sampler_flags):
            if SAMPLED in done:
                done[SAMPLED].result()
            evaluate(SAMPLED, env, sampler_flags)

        for flags in missing:
            done[flags] = pool.submit(complete, flags)
        for sampler_flags in samplers:
            done[sampler_flags] = pool.submit(sample, sampler_flags)
        try:
            for future in done.values():
                future.result()
        except BaseException:    # also Ctrl-C
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# -----------------------------------------------------------------------------
# the tables

def read_lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_results(path: Path) -> dict:
    """-> {(flags of train.py, of evaluate.py): result} of what was evaluated."""
    return {(result["flags"], result["evaluate_flags"]): result for result in read_lines(path)}


def best_results(runs) -> dict:
    """-> read_results of the file that holds more of these runs"""
    runs = set(runs)
    return max(map(read_results, FILES), key=lambda known: len(known.keys() & runs))


def figures(results: list) -> list:
    """-> cells: the rates, the half width of the widest of their intervals, the FIDs"""
    halves = [(r["rate_high"] - r["rate_low"]) / 2 for r in results if "rate_high" in r]
    return [", ".join(f"{result['rate']:.3f}" for result in results),
            f"± {max(halves):.3f}" if halves else "",
            ", ".join(f"{result['fid']:.2f}" for result in results)]


def mean(results: list) -> str:
    """-> a cell: mean rate and mean FID"""
    if not results:
        return ""
    rate, fid = (sum(result[key] for result in results) / len(results) for key in ["rate", "fid"])
    return f"{rate:.3f}, {fid:.2f}"


def table(head: list, rows: list) -> str:
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in [head, *rows]]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def evaluated(title: str) -> dict:
    """-> {method: results of its seeds} of a case. All of a seed are from one machine."""
    found = {}
    for runs in zip(*(seeds_of(title, method) for method in METHODS)):
        known = best_results((run, "") for run in runs)
        for method, run in zip(METHODS, runs):
            if (run, "") in known:
                found.setdefault(method, []).append(known[run, ""])
    return found


def real(found: dict) -> dict:
    """-> what the judge says of the real normal test images, and the floor of FID"""
    result = next(iter(found.values()))[0]
    return dict(rate=1 - result["false_alarms"], fid=result["fid_floor"])


def markdown() -> dict:
    """-> {title: table} of all that was evaluated"""
    tables = {}
    cases = {title: found for title in CASES if (found := evaluated(title))}
    if cases:
        rows = [[method, *[mean(found.get(method, [])) for found in cases.values()]]
                for method in METHODS]
        rows.append(["real normal images", *[mean([real(found)]) for found in cases.values()]])
        heads = [f"{title}, {CASES[title][1]:,} steps" for title in cases]
        tables["means"] = table(["rate, FID", *heads], rows)
    for title, found in cases.items():
        data, steps = CASES[title]
        rows = [[f"{method} `{METHODS[method]}`".replace(" ``", ""), *figures(results)]
                for method, results in found.items()]
        rows.append(["real normal images", *figures([real(found)])])
        head = [f"`{data} --max_steps {steps}` and", "non-sensitive rate", "95 %", "FID"]
        tables[title] = table(head, rows)
    for title, runs in CURVES.items():
        known = best_results((run, "") for run in runs.values())
        rows = [[name, *figures([known[flags, ""]]), f"`{flags}`"]
                for name, flags in runs.items() if (flags, "") in known]
        if len(rows) > 1:    # a curve
            tables[title] = table([title, "non-sensitive rate", "95 %", "FID", "flags"], rows)
    known = best_results((SAMPLED, flags) for flags in SAMPLERS)
    rows = [[f"`{flags}`", *figures([known[SAMPLED, flags]])]
            for flags in SAMPLERS if (SAMPLED, flags) in known]
    if len(rows) > 1:
        tables["samplers"] = table(["sampler", "non-sensitive rate", "95 %", "FID"], rows)
    return tables | other_tables()


def other_tables() -> dict:
    """-> the tables of second_judge.py, bench.py and library_loop.py"""
    tables, folder = {}, ROOT / "results"
    judged = {(r["dataset"], r["images"]): r for r in read_lines(folder / "judges.jsonl")}
    rows = [[*names, r["n"], f"{r['rate']:.3f}", f"{r['rate_by_second']:.3f}",
             f"{r['agreement']:.3f}", r["sensitive_to_either"], r["sensitive_to_both"]]
            for names, r in judged.items()]
    if rows:
        tables["judges"] = table(["", "images", "n", "rate by the judge", "by the second",
                                  "agreement", "sensitive to either", "to both"], rows)
    rows = []
    for r in read_lines(folder / "speed.jsonl"):
        how = r.get("how", "compiled" if r["compile"] else "not compiled")
        speeds = [r["train_images_per_second"], r["sample_images_per_second"]]
        cells = [r["machine"], r["model"], how, r["batch_size"],
                 *[f"{x:,.0f}" if x >= 10 else f"{x:.2f}" for x in speeds], r["steps"]]
        if "rival" in r:
            cells += [r["rival"], f"{r['train_ratio']:.2f}", f"{r['sample_ratio']:.2f}"]
        rows.append(cells)
    if rows:
        head = ["", "network", "", "batch", "training, images/s", "sampling, images/s", "steps",
                "diffusers has", "training, times", "sampling, times"]
        tables["speed"] = table(head, rows)
    loops = [("train.py", r) for r in map(read_results(FILES[0]).get, [
        (flags, "") for flags in CURVES["steps"].values()]) if r]
    loops += [("library_loop.py", r) for r in read_lines(folder / "library.jsonl")]
    rows = [[name, f"{r['train_seconds'] / 60:.0f}", r["train_steps"], r["n"], *figures([r])]
            for name, r in loops]
    if rows:
        tables["time"] = table(["loop", "minutes", "steps", "images judged", "non-sensitive rate",
                                "95 %", "FID"], rows)
    return tables


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="train nothing")
    parser.add_argument("--jobs", type=int, default=1, choices=range(1, 65), metavar="N",
                        help="runs at a time, which share the cores (default: 1)")
    args = parser.parse_args()
    if not args.print:
        try:
            make(args.jobs)
        except subprocess.CalledProcessError as error:
            sys.exit(f"results/table.py: error: {' '.join(error.cmd)} failed: see above")
        except KeyboardInterrupt:
            sys.exit("results/table.py: interrupted; the same command goes on")
    print("\n\n".join(markdown().values()))
