"""
Draws the results, or a run's log.csv (pip install matplotlib).

    python results/plot.py                              # assets/methods.png and curves.png
    python results/plot.py out/mnist-pu-0.5/log.csv     # log.png beside it
"""
import argparse
import csv
import sys
from fractions import Fraction
from pathlib import Path

try:
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit("results/plot.py: error: it needs another library: pip install matplotlib")

from table import (
    CASES,
    CURVES,
    METHODS,
    ROOT,
    SAMPLED,
    SAMPLERS,
    best_results,
    evaluated,
    real,
)

COLORS = {"unsupervised": "0.6", "supervised": "tab:brown", "PU": "tab:blue",
          "filter alone": "tab:orange", "filter, then PU": "tab:green", "oracle": "0.3"}


def draw_methods(path: Path):
    """The means of the methods over their seeds, which are dots: bars for the rate, lines for the
    FID, whose axis is logarithmic and has no zero. Dashed: real normal images."""
    figure, rows = plt.subplots(2, len(CASES), figsize=(4 * len(CASES), 5.5), squeeze=False,
                                sharex=True, sharey="row", layout="constrained")
    for title, (above, below) in zip(CASES, rows.T):
        above.set_title(title, fontsize=13)
        found = evaluated(title)
        for axes, key, digits in [(above, "rate", 2), (below, "fid", 1)]:
            for place, name in enumerate(METHODS):
                values = [result[key] for result in found.get(name, [])]
                if not values:
                    continue
                mean, color = sum(values) / len(values), COLORS.get(name, "tab:red")
                if key == "rate":
                    axes.bar(place, mean, color=color)
                else:
                    axes.hlines(mean, place - 0.4, place + 0.4, color=color, linewidth=4)
                axes.plot([place] * len(values), values, "o", color="black", markersize=4)
                top = 1 if key == "rate" else max(values)
                axes.annotate(f"{mean:.{digits}f}", (place, top), (0, 5), ha="center", fontsize=12,
                              textcoords="offset points")
            if found:
                axes.axhline(real(found)[key], color="0.5", linestyle="--", linewidth=1, zorder=0)
        below.set_xticks(range(len(METHODS)), METHODS, rotation=35, ha="right", fontsize=12)
    rows[0, 0].set(ylim=(0, 1.19), yticks=[0, 0.5, 1])
    rows[1, 0].set(yscale="log", ylim=(0.1, 130))
    rows[1, 0].set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    rows[0, 0].set_ylabel("non-sensitive rate", fontsize=13)
    rows[1, 0].set_ylabel("FID, lower is better", fontsize=13)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_curves(path: Path):
    """Rate and FID by what is varied. All rates share an axis, as do all FIDs."""
    curves = {}    # what is varied: {a line: [(value, result)]}
    for title, runs in CURVES.items():
        label, _, line = title.partition(", ")
        known = best_results((run, "") for run in runs.values())
        points = [(float(Fraction(x)), known[run, ""]) for x, run in runs.items()
                  if (run, "") in known]
        if len(points) > 1 and label != "seed":
            curves.setdefault(label, {})[line or "PU"] = points
    known = best_results((SAMPLED, flags) for flags in SAMPLERS)
    for flags in SAMPLERS:
        if (SAMPLED, flags) in known:
            _, name, _, steps = flags.split()
            lines = curves.setdefault("steps of the sampler", {})
            lines.setdefault(name, []).append((int(steps), known[SAMPLED, flags]))
    if not curves:
        return
    figure, rows = plt.subplots(2, len(curves), figsize=(3 * len(curves), 5.5), squeeze=False,
                                sharex="col", sharey="row", layout="constrained")
    for (label, lines), (above, below) in zip(curves.items(), rows.T):
        for number, (line, points) in enumerate(lines.items()):
            points = sorted(points, key=lambda point: point[0])
            for axes, key in [(above, "rate"), (below, "fid")]:
                axes.plot(*zip(*[(x, result[key]) for x, result in points]), label=line,
                          color=COLORS.get(line, COLORS["PU"]), marker="os^"[number],
                          linestyle=["-", "--", ":"][number])
                axes.grid(alpha=0.4)
        below.set_xlabel(label, fontsize=13)
        if "begins" not in label:
            below.set_xscale("log")
            values = sorted({x for points in lines.values() for x, _ in points})
            below.set_xticks(values, [f"{x:.2g}" if x < 1 else f"{x:.0f}" for x in values],
                             rotation=60)
            below.minorticks_off()
        if len(lines) > 1:
            above.legend(fontsize=11)
    rows[0, 0].set_ylabel("non-sensitive rate", fontsize=13)
    rows[1, 0].set_ylabel("FID", fontsize=13)
    rows[1, 0].set_ylim(0)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_log(log: Path, path: Path):
    """l on U and on S and the risk over the steps. The PU risk begins where S appears.
    Raises OSError where the log cannot be read, or has no rows."""
    with log.open(newline="", errors="replace") as file:
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
            print(path)
        else:
            for path, draw in [("methods.png", draw_methods), ("curves.png", draw_curves)]:
                draw(ROOT / "assets" / path)
                print(ROOT / "assets" / path)
    except OSError as error:
        sys.exit(f"results/plot.py: error: {error}")
