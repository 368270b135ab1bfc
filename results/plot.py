"""
Draws the results, or a run's log.csv (pip install matplotlib).

    python results/plot.py                              # methods, curves, mechanism, in assets/
    python results/plot.py out/mnist-pu-0.5/log.csv     # log.png beside it
"""
import csv
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from table import CASES, CURVES, METHODS, REAL, ROOT, evaluated, other_seeds

COLORS = dict(zip(METHODS, ["0.6", "tab:brown", "tab:blue", "tab:orange", "tab:green", "0.3"]))
plt.rcParams.update({"font.size": 12, "axes.labelsize": 13, "axes.titlesize": 13})

def panels(n: int, width: float) -> tuple:
    """-> a figure, and n columns of axes for shares above axes for FIDs; a row has one scale"""
    figure, rows = plt.subplots(2, n, figsize=(width * n, 5.5), sharex="col", sharey="row",
                                squeeze=False, layout="constrained")
    for axes, label in zip(rows[:, 0], ["sensitive, % of samples", "FID"]):
        axes.set(ylabel=label, yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
    return figure, rows.T

def measures(result: dict) -> tuple:
    """-> what the two rows show, lower is better: % of samples that are sensitive, and the FID"""
    return 100 * (1 - result["rate"]), result["fid"]

def draw_methods():
    """A short line for each method that all cases have, and a dot for each other seed. Dashed: real
    normal images."""
    cases = {title: evaluated(title) for title in CASES}
    methods = [method for method in METHODS if all(method in found for found in cases.values())]
    figure, columns = panels(len(cases), 4)
    for (title, found), (above, below) in zip(cases.items(), columns):
        above.set_title(title)
        for place, method in enumerate(methods):
            results = [found[method], *other_seeds(title, method)]
            for axes, value, *dots in zip([above, below], *map(measures, results)):
                axes.plot([place] * len(dots), dots, "o", color="0", markersize=3)
                axes.hlines(value, place - 0.4, place + 0.4, color=COLORS[method], linewidth=4)
                axes.annotate(f"{value:.2g}", (place, max([value, *dots])), (0, 6),
                              textcoords="offset points", ha="center")
        for axes, value in zip([above, below], measures(found[REAL])):
            axes.axhline(value, color="0.5", ls="--", lw=1, zorder=0)
        below.set_xticks(range(len(methods)), methods, rotation=35, ha="right")
    plt.setp(columns, ylim=(0.1, 200))
    return figure

def draw_curves():
    """Share of sensitive samples, and FID, by what is varied."""
    curves = {}    # what is varied: {a line: {value: result}}
    for title in CURVES:
        label, _, line = title.partition(", ")
        curves.setdefault(label, {})[line] = {
            float(x): result for x, result in evaluated(title).items()}
    figure, columns = panels(len(curves), 3)
    for (label, lines), (above, below) in zip(curves.items(), columns):
        for (line, results), style in zip(lines.items(), ["o-", "s--", "^:", "d-."]):
            values = sorted(results)
            for axes, points in zip([above, below], zip(*[measures(results[x]) for x in values])):
                axes.plot(values, points, style, label=line)
                axes.grid(alpha=0.4)
        below.set_xlabel(label)
        below.set_xscale("log")
        ticks = sorted({x for results in lines.values() for x in results})
        below.set_xticks(ticks, [f"{x:g}" for x in ticks], rotation=60)
        below.minorticks_off()
        if len(lines) > 1:
            below.legend(fontsize=11, loc="upper right")
    plt.setp(columns, ylim=(0.2, 200))    # room for the legend
    return figure

def draw_mechanism():
    """l over the steps of the headline command, by mechanism.py."""
    rows = [json.loads(line) for line in (ROOT / "results" / "mechanism.jsonl").open()]
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    steps, switch = [row["step"] for row in rows], rows[0]["pu_start"]
    kinds = list(rows[0])[2:]    # after step and pu_start
    for kind, style in zip(kinds, ["C0o-", "C3s-", "C1^--", "C3v:"]):
        axes.plot(steps, [row[kind] for row in rows], style, label=kind, markersize=4)
    axes.axvline(switch, color="0.5", ls="--", lw=1)
    axes.annotate("the PU risk begins", (switch, 1), (5, -15), xycoords=("data", "axes fraction"),
                  textcoords="offset points")
    axes.set(xlabel="step", ylabel="l", ylim=(0, None))
    axes.legend(loc="lower left", fontsize=11)
    return figure

def draw_log(path: Path):
    """l on U and on S and the risk over the steps. The PU risk begins where S appears."""
    rows = list(csv.DictReader(path.open()))
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for name in ["loss_unlabeled", "loss_sensitive", "risk"]:
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        axes.plot(*zip(*points), label=name)
    axes.set(xlabel="step", yscale="log")
    axes.legend()
    return figure

if __name__ == "__main__":
    if sys.argv[1:]:
        figures = {Path(sys.argv[1]).with_suffix(".png"): draw_log(Path(sys.argv[1]))}
    else:
        figures = {ROOT / "assets" / "methods.png": draw_methods(),
                   ROOT / "assets" / "curves.png": draw_curves(),
                   ROOT / "assets" / "mechanism.png": draw_mechanism()}
    for path, figure in figures.items():
        figure.savefig(path, dpi=120)
        print(path)
