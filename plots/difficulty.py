"""How many of its responses to a problem are right: the shares of 0, 1, ... 8 of 8 in each data set, one bar a set.

Figure 2 of arXiv 2508.08221. From what data/difficulty.py counted:

    python plots/difficulty.py data/easy.difficulty.jsonl data/medium.difficulty.jsonl data/hard.difficulty.jsonl
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def draw(files, out):
    figure, ax = plt.subplots(figsize=(9, 1.6 + 0.6 * len(files)), layout="constrained")
    for y, file in enumerate(map(Path, files)):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        n = max(row["samples"] for row in rows)
        shares = np.bincount([row["correct"] for row in rows], minlength=n + 1) / len(rows) * 100
        lefts = np.concatenate([[0], shares.cumsum()[:-1]])
        for k, (left, share) in enumerate(zip(lefts, shares)):
            colour = plt.cm.RdYlBu(k / n)
            ax.barh(y, share, left=left, color=colour, label=str(k) if y == 0 else None)
            if share >= 4:
                ax.text(left + share / 2, y, f"{share:.0f}", ha="center", va="center", fontsize=8)
    ax.set_yticks(range(len(files)), [Path(file).name.split(".")[0] for file in files])
    ax.invert_yaxis()
    ax.set_xlim(0, 100)
    ax.set_xlabel("problems (%)")
    figure.legend(title=f"right of {n}", ncol=n + 1, loc="outside upper center", fontsize=8, columnspacing=1)
    figure.savefig(out, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="<name>.difficulty.jsonl")
    parser.add_argument("--out", default="difficulty.png", help="the picture [%(default)s]")
    args = parser.parse_args()
    draw(args.files, args.out)
    print(args.out)
