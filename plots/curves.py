"""Training accuracy, accuracy, response length and entropy of runs, or any four metrics: runs that differ in their seed are one line.

python plots/curves.py runs/A 'runs/lite_ppo__*' --metrics train/kl,train/clip_high,train/grad_norm,adv/std --csv kl.csv
"""

import argparse
import glob
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from table import aligned, read_metrics, write_table

PANELS = {  # metric: title
    "rollout/accuracy": "accuracy of the training batch",
    "eval/mean/accuracy": "accuracy, mean of the evaluation sets",
    "rollout/response_len": "response length (tokens)",
    "train/entropy": "entropy of the next token (nats)",
}


def flags_of_run(folder):
    """-> the flags of a run, as text; a folder without a readable args.json stands for itself"""
    try:
        return {name: str(value) for name, value in json.loads((folder / "args.json").read_text()).items()}
    except (OSError, ValueError):
        return {"script": str(folder)}


def lines(folders):
    """-> {label: the rows of each of its runs}; a run that cannot be read is left out. A label is the script, where there are
    several, and the flags that differ among its runs; runs with the same flags and seed are no seeds: each has its folder."""
    found = {folder: rows for folder in map(Path, folders) if (rows := read_metrics(folder))}
    flags, scripts, named = {folder: flags_of_run(folder) for folder in found}, {}, {}
    for mine in flags.values():
        scripts.setdefault(mine.get("script", ""), []).append(mine)
    for folder, rows in found.items():
        mine, others = flags[folder], scripts[flags[folder].get("script", "")]
        differ = [name for name in mine if name != "seed" and len({other.get(name) for other in others}) > 1]
        parts = [mine.get("script", "")] * (len(scripts) > 1)
        label = ", ".join([*parts, *(f"{name}={mine[name]}" for name in differ)])
        named.setdefault(label or mine.get("script", "run"), []).append((folder, rows))
    shown = {}
    for label, runs in named.items():
        seeds = {flags[folder].get("seed") for folder, _ in runs}
        if len(seeds) < len(runs):  # the same run twice, such as of changed code
            shown |= {f"{label}: {folder}": [rows] for folder, rows in runs}
        else:
            shown[label + f" ({len(runs)} seeds)" * (len(runs) > 1)] = [rows for _, rows in runs]
    return shown


def curve(runs, metric):
    """-> steps (n,), values (runs, n), of the steps at which all runs that have the metric have it"""
    found = [{row["step"]: row[metric] for row in rows if row.get(metric) is not None} for rows in runs]
    return aligned([one for one in found if one])


def rows_of(named, metrics):
    """-> a row for each line, metric and step that all its seeds have"""
    return [
        {"runs": label, "metric": metric, "step": int(step), "seeds": len(values), "mean": float(x.mean())}
        | {"sd": float(x.std(ddof=1)) if len(x) > 1 else None}
        for label, runs in named.items()
        for metric in metrics
        for steps, values in [curve(runs, metric)]
        for step, x in zip(steps, values.T)
    ]


def draw(folders, out, metrics=tuple(PANELS)):
    """A line for each label, with a band of one standard deviation over its seeds; -> was there anything to draw?"""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    named = lines(folders)
    for ax, metric in zip(axes.flat, metrics):
        for k, (label, runs) in enumerate(named.items()):
            steps, values = curve(runs, metric)
            if not len(steps):
                continue
            last = max(row["step"] for rows in runs for row in rows if row.get(metric) is not None)
            if last > steps[-1]:
                print(
                    f"{label}, {metric}: to step {steps[-1]}, where one of the runs ends, not {last}", file=sys.stderr
                )
            mean, look = values.mean(0), {"color": f"C{k}", "marker": "o" if len(steps) < 20 else None, "markersize": 4}
            ax.plot(steps, mean, label=label, **look)
            if len(values) > 1:
                sd = values.std(0, ddof=1)
                ax.fill_between(steps, mean - sd, mean + sd, color=look["color"], alpha=0.2, lw=0)
        if not ax.has_data():
            ax.set_visible(False)
            if named and metric not in PANELS:  # those a run without training lacks
                print(f"{metric}: no run has it", file=sys.stderr)
        ax.set_title(PANELS.get(metric, metric), fontsize=10)
        ax.grid(alpha=0.3)
        if metric.endswith("accuracy"):
            ax.set_ylim(0, 1)
    for ax in axes[1]:
        ax.set_xlabel("training steps")
    shown = {label: line for ax in axes.flat for line, label in zip(*ax.get_legend_handles_labels())}
    if shown:
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", fontsize=8)
        figure.savefig(out, dpi=120)
    plt.close(figure)
    return bool(shown)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders, or patterns of them")
    parser.add_argument("--out", default="curves.png", help="the picture [%(default)s]")
    parser.add_argument("--metrics", default=",".join(PANELS), help="up to four, separated by commas [%(default)s]")
    parser.add_argument(
        "--csv", type=Path, help="a table of the same: mean and standard deviation over the seeds by step"
    )
    args = parser.parse_args(argv)
    folders = [found for name in args.runs for found in sorted(glob.glob(name)) or [name] if not found.endswith(".log")]
    metrics = args.metrics.split(",")
    if len(metrics) > 4:
        parser.error(f"--metrics: {len(metrics)} metrics; give up to four")
    if not draw(folders, args.out, metrics):
        sys.exit("nothing to draw")
    print(args.out)
    if args.csv:
        write_table(args.csv, rows_of(lines(folders), metrics))
        print(args.csv)


if __name__ == "__main__":
    main()
