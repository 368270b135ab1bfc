"""
Makes the tables of results: trains and evaluates each run that results/mnist.jsonl lacks, then
prints all tables as Markdown.

    python results/table.py --print     # only print
    python results/table.py --jobs 2    # two runs at a time

An interrupted run goes on from its checkpoint. To evaluate a run again, delete its line in
results/mnist.jsonl; to train it again, delete its folder in out/table/ as well.
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "mnist.jsonl"    # a run per line: its flags, and what evaluate.py says

# -----------------------------------------------------------------------------
# the runs

DEFAULTS = dict(algorithm="pu", n_labeled="2500", pu_start="1/2")    # of train.py, for MNIST


def run_flags(prior: str, max_steps: int, **others: str) -> str:
    """Returns the flags of train.py for one run. Flags with their default value are left out, so
    that a run has the same flags in every table, and is trained once."""
    flags = dict(prior=prior)
    for name, value in others.items():
        if value != DEFAULTS[name]:
            flags[name] = value
    flags["max_steps"] = max_steps
    return " ".join(f"--{name} {value}" for name, value in flags.items())


def half(**others: str) -> str:
    return run_flags("0.5", 4000, **others)


def one_in_eleven(**others: str) -> str:
    return run_flags("1/11", 8000, **others)


TABLES = {    # title: {name of the row: flags}
    "odd digits are sensitive, half of U": {
        "unsupervised": half(algorithm="unsupervised"),
        "supervised": half(algorithm="supervised"),
        "PU": half(),
        "PU by the paper": half(pu_start="0"),
        "oracle": half(algorithm="oracle"),
    },
    "PU by number of labels": {n: half(n_labeled=n) for n in ["2500", "500", "100", "20"]},
    "odd digits are sensitive, 1 in 11 of U": {
        "unsupervised": one_in_eleven(algorithm="unsupervised"),
        "supervised": one_in_eleven(algorithm="supervised"),
        "PU": one_in_eleven(),
        "oracle": one_in_eleven(algorithm="oracle"),
    },
    "where the PU risk begins": {
        start: half(pu_start=start) for start in ["0", "1/3", "1/2", "2/3", "3/4"]},
}


def train_and_evaluate(flags: str, env: dict):
    """Does one run, and appends its line to the results. Raises CalledProcessError."""
    out_dir = "out/table/" + flags.replace("--", "").replace("/", "_").replace(" ", "-")
    ckpt = f"{out_dir}/ckpt.pt"
    train = [sys.executable, "train.py", *flags.split(), "--out_dir", out_dir]
    if (ROOT / ckpt).exists():
        train.append("--resume")
    subprocess.run(train, check=True, env=env, cwd=ROOT, stdout=subprocess.DEVNULL)
    evaluate = [sys.executable, "evaluate.py", "--ckpt", ckpt]
    printed = subprocess.run(evaluate, check=True, env=env, cwd=ROOT, text=True,
                             stdout=subprocess.PIPE).stdout
    result = dict(flags=flags, **json.loads(printed.splitlines()[-1]))
    with RESULTS.open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(f"{flags}: done", file=sys.stderr, flush=True)


# -----------------------------------------------------------------------------
# the tables

def read_results() -> dict:
    """Returns {flags: result} of the runs that were evaluated."""
    if not RESULTS.exists():
        return {}
    results = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return {result["flags"]: result for result in results}


def markdown() -> str:
    """Returns all tables, with a row for each run that was evaluated."""
    results, lines = read_results(), []
    for title, runs in TABLES.items():
        lines += [f"| {title} | non-sensitive rate (95 %) | FID | floor | minutes | flags |",
                  "|---|---|---|---|---|---|"]
        for name, flags in runs.items():
            if flags in results:
                r = results[flags]
                lines.append(f"| {name} | {r['rate']:.3f} ({r['rate_low']:.3f} to "
                             f"{r['rate_high']:.3f}) | {r['fid']:.2f} | {r['fid_floor']:.2f} | "
                             f"{r['train_seconds'] / 60:.0f} | `{flags}` |")
        lines.append("")
    return "\n".join(lines).strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="train nothing")
    parser.add_argument("--jobs", type=int, default=1, choices=range(1, 65), metavar="N",
                        help="runs at a time, which share the cores (default: 1)")
    args = parser.parse_args()
    if not args.print:
        distinct = dict.fromkeys(flags for runs in TABLES.values() for flags in runs.values())
        missing = [flags for flags in distinct if flags not in read_results()]
        env = dict(os.environ, OMP_NUM_THREADS=str(max(1, os.cpu_count() // args.jobs)))
        try:
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(lambda flags: train_and_evaluate(flags, env), missing))
        except subprocess.CalledProcessError as error:
            sys.exit(f"results/table.py: error: {' '.join(error.cmd)} failed: see above")
        except KeyboardInterrupt:
            sys.exit("results/table.py: interrupted; the same command goes on")
    print(markdown())
