"""How many of its responses to a problem are right: the shares of 0, 1, ... 8 of 8 in each data set, one bar a set.

From what data/difficulty.py counted (figure 2 of arXiv 2508.08221 is plots/fig02_difficulty.py):

    python plots/difficulty.py data/easy.difficulty.jsonl data/medium.difficulty.jsonl data/hard.difficulty.jsonl
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from table import read_rows


def bars(counts):
    """-> the picture. counts: {name of a set: how many of its problems were solved 0, 1, ... n times}"""
    figure, ax = plt.subplots(figsize=(9, 1.6 + 0.5 * len(counts)), layout="constrained")
    for y, problems in enumerate(counts.values()):
        shares, n = np.array(problems) / sum(problems) * 100, len(problems) - 1
        lefts = np.concatenate([[0], shares.cumsum()[:-1]])
        for k, (left, share) in enumerate(zip(lefts, shares)):
            ax.barh(y, share, left=left, color=plt.cm.cividis(k / n), label=str(k) if y == 0 else None)
            if share >= 4:
                ink = "white" if k / n < 0.5 else "black"
                ax.text(left + share / 2, y, f"{share:.0f}", ha="center", va="center", fontsize=8, color=ink)
    ax.set_yticks(range(len(counts)), counts)
    ax.invert_yaxis()
    ax.set_xlim(0, 100)
    ax.set_xlabel("problems (%)")
    ax.spines[["top", "right"]].set_visible(False)
    title = f"how many of {n} responses are right"
    figure.legend(title=title, ncol=n + 1, loc="outside lower center", fontsize=8, columnspacing=1, frameon=False)
    return figure


def by_right(rows):
    """The rows of a .difficulty.jsonl file -> how many problems were solved 0, 1, ... n times"""
    return np.bincount([row["correct"] for row in rows], minlength=rows[0]["samples"] + 1).tolist()


def draw(files, out):
    figure = bars({Path(file).name.split(".")[0]: by_right(read_rows(Path(file))) for file in files})
    figure.savefig(out, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="<name>.difficulty.jsonl")
    parser.add_argument("--out", default="difficulty.png", help="the picture [%(default)s]")
    args = parser.parse_args()
    draw(args.files, args.out)
    print(args.out)
