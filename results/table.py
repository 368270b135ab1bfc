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
RESULTS = ROOT / "results" / "mnist.jsonl"        # of evaluate.py, for models trained with different flags
SAMPLERS = ROOT / "results" / "samplers.jsonl"    # of evaluate.py with different flags, for one model
STEPS = 2000    # of every run that does not say otherwise


def folder(flags: str) -> str:
    return "out/table/" + flags.replace("--", "").replace("/", "_").replace(" ", "-")


PLAIN = "--scores none --push_limit inf --sensitive_share 0.5"    # the paper's risk on all of U, and half of each batch from S
DDPM = "--schedule linear --prediction eps"      # the paper's diffusion
HALF = f"--prior 0.5 --algorithm unsupervised {DDPM}"    # the model that others start from
PU = f"--prior 0.5 {PLAIN} {DDPM}"
CLEAN = f"--prior 0.5 {PLAIN} --init_from {folder(HALF)}/ckpt.pt --lr 1e-3 --warmup_steps 50 --max_steps"


def four(flags: str) -> list:
    """The paper's experiment: the two baselines, its method and the oracle."""
    return [(name, f"{flags} {PLAIN if name == 'pu' else f'--algorithm {name}'} {DDPM}") for name in ["unsupervised", "supervised", "pu", "oracle"]]


DEFAULT, FEW = "--prior 0.5 --max_steps 4000", "--prior 0.5 --n_labeled 100 --max_steps 4000"
ALONE = "--algorithm unsupervised --scores auto"    # the default's classifier, and no PU risk on what it keeps: as the default does, where little of S is left
RISK = "--sensitive_share 1/16"    # the PU risk all the same, with 8 images of S a step
WEAK = "out/table/weak/scores.pt"    # of a classifier that is trained for too short a time
POOR = f"--prior 0.5 --max_steps 1000 --scores {WEAK}"
TABLES = {    # title: rows of a name and the flags of train.py
    "odd digits are sensitive, half of U": four("--prior 0.5") + [("pu, 4000 steps", f"{PU} --max_steps 4000")],
    "odd digits are sensitive, half of U: what train.py does by default": [
        ("pu", DEFAULT), ("pu, 100 labeled", FEW), ("oracle", f"{DEFAULT} --algorithm oracle")],
    "the same, after a poor classifier, one of 20 steps": [("pu", POOR), ("classifier alone", f"{POOR} --algorithm unsupervised")],
    "odd digits are sensitive, 1 in 11 of U": four("--prior 1/11"),
    "odd digits are sensitive, 1 in 11 of U: what train.py does by default": [
        ("pu", "--prior 1/11 --max_steps 4000"), ("pu, 8000 steps", "--prior 1/11 --max_steps 8000"),
        ("oracle, 8000 steps", "--prior 1/11 --max_steps 8000 --algorithm oracle")],
    "even digits are sensitive, half of U": four("--prior 0.5 --sensitive even"),
    "a model that was trained unsupervised": [("before", HALF), ("cleaned, 500 steps", f"{CLEAN} 500"), ("cleaned, 1000 steps", f"{CLEAN} 1000"),
                                              ("pu from scratch, 2000 steps", PU)],
    "the prior is 0.1, what the paper's risk assumes": [(guess, f"--prior 0.1 --loss_prior {guess} {PLAIN} --max_steps 1000")
                                                        for guess in ["0.02", "0.05", "0.1", "0.2", "0.4"]],
}
SEEDS = {name: [flags + seed for seed in ["", " --seed 1", " --seed 2"][:n]] for name, flags, n in [
    ("unsupervised", HALF, 3), ("the paper's pu", PU, 3), ("pu by the defaults", f"{DEFAULT} {ALONE}", 2), ("the same, with the PU risk on the 3 or 4 of S that are left", f"{DEFAULT} {RISK}", 2),
    ("pu by the defaults, 100 labeled", f"{FEW} {ALONE}", 2), ("the same, with the PU risk on the 2 that are left", f"{FEW} {RISK}", 2)]}


WAYS = [f"--sampler {sampler} --steps {steps} --n 2000"    # to sample the default's model
        for steps in [10, 20, 50, 1000] for sampler in ["ddpm", "ddim", "dpm++"] if steps < 1000 or sampler == "ddpm"]


def results(path: Path = RESULTS) -> dict:
    """-> what evaluate.py said, by the flags that the model was trained with, or that evaluate.py was given"""
    lines = path.read_text().splitlines() if path.exists() else []
    return {figures.pop("flags"): figures for figures in map(json.loads, lines)}


def train(flags: str, env: dict):
    resume = ["--resume"] * (ROOT / folder(flags) / "ckpt.pt").exists()
    command = [sys.executable, "train.py", "--max_steps", str(STEPS), *flags.split(), "--out_dir", folder(flags), *resume]
    subprocess.run(command, check=True, env=env, cwd=ROOT, stdout=subprocess.DEVNULL)


def train_and_evaluate(flags: str, env: dict):
    if "--init_from" in flags:
        train(HALF, env)
    if WEAK in flags and not (ROOT / WEAK).exists():
        subprocess.run([sys.executable, "pu_filter.py", "--steps", "20", "--out_dir", str(Path(WEAK).parent)], check=True, env=env, cwd=ROOT)
    train(flags, env)
    evaluate(f"--ckpt {folder(flags)}/ckpt.pt", env, flags, RESULTS)


def evaluate(how: str, env: dict, flags: str, path: Path):
    command = [sys.executable, "evaluate.py", *how.split()]
    figures = json.loads(subprocess.run(command, check=True, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    with path.open("a") as file:
        file.write(json.dumps({"flags": flags, **figures}) + "\n")
    print(f"{flags}: done", file=sys.stderr, flush=True)


def row(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def tables() -> str:
    """All tables, without the runs that results/mnist.jsonl does not hold."""
    found, lines = results(), []
    for title, rows in TABLES.items():
        if any(flags in found for _, flags in rows):
            lines += ["", row(title, "non-sensitive rate (95 %)", "FID", "floor", "minutes", "`python train.py`"), row(*["---"] * 6)]
        for name, flags in rows:
            if r := found.get(flags):
                rate = f"{r['rate']:.3f} ({r['rate_low']:.3f} to {r['rate_high']:.3f})"
                steps = "" if "--max_steps" in flags else f" --max_steps {STEPS}"
                lines.append(row(name, rate, f"{r['fid']:.2f}", f"{r['fid_floor']:.2f}", f"{r['train_seconds'] / 60:.0f}", f"`{flags}{steps}`"))
    found_ways = results(SAMPLERS)
    if found_ways:
        lines += ["", row("2,000 images of the default run", "ddpm", "ddim", "dpm++"), row(*["---"] * 4)]
        for steps in [10, 20, 50, 1000]:
            cells = [found_ways.get(f"--sampler {sampler} --steps {steps} --n 2000") for sampler in ["ddpm", "ddim", "dpm++"]]
            lines.append(row(f"{steps} steps: rate, FID", *(f"{r['rate']:.3f}, {r['fid']:.2f}" if r else "" for r in cells)))
    lines.append("")
    for name, runs in SEEDS.items():
        if all(flags in found for flags in runs):
            lines.append(f"* {name}, half of U odd, seeds {', '.join(map(str, range(len(runs))))}: " + "; ".join(
                f"{title} {', '.join(f'{found[flags][key]:.{digits}f}' for flags in runs)}"
                + f" (standard deviation {statistics.stdev(found[flags][key] for flags in runs):.{digits}f})" * (len(runs) > 2)
                for title, key, digits in [("rate", "rate", 3), ("FID", "fid", 2)]))
    return "\n".join(lines).strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, choices=range(1, 65), metavar="N", help="runs at a time, which share the cores (default: 1)")
    parser.add_argument("--print", action="store_true", help="train nothing")
    args = parser.parse_args()
    if not args.print:
        runs = dict.fromkeys([flags for rows in TABLES.values() for _, flags in rows] + sum(SEEDS.values(), []))
        missing = [flags for flags in runs if flags not in results()]
        env = {**os.environ, "OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.jobs))}
        try:
            for later in [False, True]:    # what starts from another run, or shares a classifier, comes later, one at a time
                with ThreadPoolExecutor(1 if later else args.jobs) as pool:
                    list(pool.map(lambda flags: train_and_evaluate(flags, env), [f for f in missing if ("--init_from" in f or WEAK in f) == later]))
            ways = [how for how in WAYS if how not in results(SAMPLERS)]
            if ways:
                train(DEFAULT, env)
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(lambda how: evaluate(f"--ckpt {folder(DEFAULT)}/ckpt.pt {how}", env, how, SAMPLERS), ways))
        except subprocess.CalledProcessError as e:
            sys.exit(f"results/table.py: error: {' '.join(map(str, e.cmd))} failed with status {e.returncode}: see above")
    print(tables())
