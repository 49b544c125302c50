"""Reward, accuracy, response length and entropy of one or more runs, or any four metrics.

python plots/curves.py runs/A runs/B ... --out curves.png --metrics train/kl,train/clip_high,train/grad_norm,adv/std
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.append(str(Path(__file__).parent))  # a training script imports this file too
import runs  # noqa: E402

PANELS = {  # metric: title
    "reward/mean": "reward of the training batch",
    "eval/mean/accuracy": "accuracy, mean of the evaluation sets",
    "rollout/response_len": "response length (tokens)",
    "train/entropy": "entropy of the next token (nats)",
}


def draw(folders, out, metrics=tuple(PANELS)):
    """One line a run in each of four panels; a run without a metric has no line there, one that cannot be read is left out."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    found = {folder: runs.read_metrics(folder) for folder in map(Path, folders)}
    for folder, rows in found.items():
        for ax, metric in zip(axes.flat, metrics):
            points = [(row["step"], row[metric]) for row in rows if metric in row]
            if points:
                ax.plot(
                    *zip(*points),
                    marker="o" if len(points) < 20 else None,
                    markersize=4,
                    label=folder.name,
                )
    for ax, metric in zip(axes.flat, metrics):
        ax.set_title(PANELS.get(metric, metric), fontsize=10)
        ax.grid(alpha=0.3)
        if metric.endswith("accuracy"):
            ax.set_ylim(0, 1)
    for ax in axes[1]:
        ax.set_xlabel("rollouts trained on")
    lines = {label: line for ax in axes.flat for line, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", fontsize=8)
    figure.savefig(out, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--out", default="curves.png", help="the picture [%(default)s]")
    parser.add_argument("--metrics", default=",".join(PANELS), help="up to four, separated by commas [%(default)s]")
    args = parser.parse_args()
    draw(args.runs, args.out, args.metrics.split(","))
    print(args.out)
