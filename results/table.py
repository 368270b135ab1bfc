"""
The tables of the README: trains and evaluates what results/mnist.jsonl does not hold yet, then prints them as Markdown.

    python results/table.py --print     # only print
    python results/table.py --jobs 2    # two runs at a time, which on two cores is quicker than one after the other

Whatever is interrupted goes on where it was. Delete a line of results/mnist.jsonl to have that run evaluated again, and
its folder in out/table/ to have it trained again.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "mnist.jsonl"
STEPS = 2000

CASES = {    # every row of the first table is one of these with an algorithm
    "half of U odd": "--prior 0.5",
    "1 in 11 of U odd": "--prior 1/11",
    "half of U even": "--prior 0.5 --sensitive even",
}
ALGORITHMS = ["unsupervised", "supervised", "pu", "oracle"]
RUNS = [f"{flags} --algorithm {algorithm}" for flags in CASES.values() for algorithm in ALGORITHMS]
SEEDS = [f"--prior 0.5 --algorithm {algorithm} --seed {seed}" for seed in [1, 2] for algorithm in ["unsupervised", "pu"]]
SWEEP = [f"--prior 0.1 --algorithm pu --loss_prior {guess}" for guess in [0.02, 0.05, 0.1, 0.2, 0.4]]


def results() -> dict:
    """-> what evaluate.py said of each run, by the flags that it was trained with"""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {figures.pop("flags"): figures for figures in map(json.loads, lines)}


def train_and_evaluate(flags: str, threads: int):
    out_dir = ROOT / "out" / "table" / flags.replace("--", "").replace("/", "_").replace(" ", "-")
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    resume = ["--resume"] * (out_dir / "ckpt.pt").exists()
    train = [sys.executable, ROOT / "train.py", "--max_steps", str(STEPS), "--out_dir", out_dir, *flags.split(), *resume]
    subprocess.run(train, check=True, env=env, stdout=subprocess.DEVNULL)
    said = subprocess.run([sys.executable, ROOT / "evaluate.py", "--ckpt", out_dir / "ckpt.pt"], check=True, env=env, capture_output=True, text=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps({"flags": flags, **json.loads(said.stdout.splitlines()[-1])}) + "\n")
    print(f"{flags}: done", file=sys.stderr, flush=True)


def row(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def interval(r: dict) -> str:
    return f"{r['rate']:.3f} ({r['rate_low']:.3f} to {r['rate_high']:.3f})"


def tables() -> str:
    """The README's tables, of all runs that are in results/mnist.jsonl."""
    found = results()
    lines = [row("U", "flags of `train.py`", "non-sensitive rate", "FID", "FID floor", "minutes"), row(*["---"] * 6)]
    for case, flags in CASES.items():
        for run in [f"{flags} --algorithm {algorithm}" for algorithm in ALGORITHMS]:
            if r := found.get(run):
                lines.append(row(case, f"`{run}`", interval(r), f"{r['fid']:.2f}", f"{r['fid_floor']:.2f}", f"{r['train_seconds'] / 60:.0f}"))
    lines += ["", row("flags of `train.py`", "seed 0", "seed 1", "seed 2", "mean", "standard deviation"), row(*["---"] * 6)]
    for algorithm in ["unsupervised", "pu"]:
        flags = f"--prior 0.5 --algorithm {algorithm}"
        seeds = [found.get(run) for run in [flags, f"{flags} --seed 1", f"{flags} --seed 2"]]
        if all(seeds):
            for key, name, digits in [("rate", "rate", 3), ("fid", "FID", 2)]:
                values = [r[key] for r in seeds]
                lines.append(row(f"`{flags}`: {name}", *[f"{v:.{digits}f}" for v in [*values, statistics.mean(values), statistics.stdev(values)]]))
    lines += ["", row("true prior 0.1, `--loss_prior`", "non-sensitive rate", "FID"), row(*["---"] * 3)]
    for run in SWEEP:
        if r := found.get(run):
            lines.append(row(run.split()[-1], interval(r), f"{r['fid']:.2f}"))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default: 1)")
    parser.add_argument("--print", action="store_true", help="train nothing")
    args = parser.parse_args()
    if not args.print:
        missing = [run for run in RUNS + SEEDS + SWEEP if run not in results()]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda run: train_and_evaluate(run, max(1, os.cpu_count() // args.jobs)), missing))
    print(tables())
