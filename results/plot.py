"""
Draws curves of results/mnist.jsonl, or of a run's log.csv (pip install matplotlib).

    python results/plot.py                              # assets/labels.png
    python results/plot.py out/mnist-pu-0.5/log.csv     # log.png beside it
"""
import argparse
import csv
import sys
from pathlib import Path

try:
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit("results/plot.py: error: it needs another library: pip install matplotlib")

from table import ROOT, TABLES, read_results


def draw_labels(path: Path):
    """Rate, with its 95 % interval, and FID against the number of labels."""
    results = read_results()
    known = {int(n): results[flags] for n, flags in TABLES["PU by number of labels"].items()
             if flags in results}
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    rates = [result["rate"] for result in known.values()]
    below = [result["rate"] - result["rate_low"] for result in known.values()]
    above = [result["rate_high"] - result["rate"] for result in known.values()]
    left.errorbar(list(known), rates, [below, above], marker="o", capsize=3)
    left.set(xscale="log", xlabel="labeled sensitive images", ylabel="non-sensitive rate")
    right.plot(list(known), [result["fid"] for result in known.values()], marker="o")
    right.set(xscale="log", xlabel="labeled sensitive images", ylabel="FID", ylim=0)
    for axes in (left, right):
        axes.set_xticks(list(known), [f"{n:,}" for n in known])
        axes.minorticks_off()
    figure.savefig(path, dpi=150)


def draw_log(log: Path, path: Path):
    """l on U and on S and the risk over the steps. The PU risk begins where S appears.
    Raises OSError where the log cannot be read, or has no rows."""
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or "loss_u" not in rows[0]:
        raise OSError(f"{log} has no rows of train.py")
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    for name, label in [("loss_u", "l on U"), ("loss_s", "l on S"), ("risk", "risk")]:
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        if points:
            axes.plot(*zip(*points), label=label)
    before = [int(row["step"]) for row in rows if not row["loss_s"]]
    if 0 < len(before) < len(rows):
        axes.axvline(before[-1], color="grey", linestyle=":", label="the PU risk begins")
    axes.set(xlabel="step", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, nargs="?", help="the log.csv of a run")
    args = parser.parse_args()
    try:
        if args.log:
            path = args.log.with_suffix(".png")
            draw_log(args.log, path)
        else:
            path = ROOT / "assets" / "labels.png"
            draw_labels(path)
    except OSError as error:
        sys.exit(f"results/plot.py: error: {error}")
    print(path)
