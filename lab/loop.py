"""Draws loop.png, who holds the GPU in a training step, from the loop in the first README: `python lab/loop.py`"""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
HOLDS = {  # letter in the README: what it is, colour; from below
    "S": ("the trainer's shard of weights, Adam's moments", "#0072B2"),
    "W": ("vLLM's weights", "#E69F00"),
    "K": ("vLLM's KV cache", "#D55E00"),
    "A": ("activations", "#56B4E9"),
    "G": ("gradients", "#009E73"),
}


def phases():
    """-> [(what is called, the letters of what is on the GPU), ...], line by line"""
    text = (ROOT / "README.md").read_text().split("## The loop")[1].split("vLLM: W weights")[0]
    lines = re.findall(r"^    ( *\S.*?)  +([WKSAG ]{1,9})(?:  |$)", text, re.M)
    return [(what.strip(), set(held.split())) for what, held in lines if held.strip()]


def main():
    found = phases()
    figure, ax = plt.subplots(figsize=(11, 4.2), layout="constrained")
    for y, letter in enumerate(HOLDS):
        for x, (_, held) in enumerate(found):
            if letter in held:
                ax.barh(y, 1, left=x, color=HOLDS[letter][1], height=0.8)
    asleep = [x for x, (_, held) in enumerate(found) if not held & {"W", "K"}]
    ax.axvspan(asleep[0], len(found), color="#EEEEEE", zorder=0)
    ax.text(asleep[0] / 2, len(HOLDS) - 0.4, "vLLM is awake", ha="center")
    ax.text((asleep[0] + len(found)) / 2, len(HOLDS) - 0.4, "vLLM sleeps: the trainer has the GPU", ha="center")
    look = {"rotation": 40, "ha": "right", "rotation_mode": "anchor", "fontsize": 9}
    ax.set_xticks([x + 0.5 for x in range(len(found))], [what for what, _ in found], **look)
    ax.set_yticks(range(len(HOLDS)), [text for text, _ in HOLDS.values()], fontsize=9)
    ax.set(xlim=(0, len(found)), ylim=(-0.6, len(HOLDS)))
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "lab" / "loop.png", dpi=110)


if __name__ == "__main__":
    main()
