"""The lab's runs: the commands of its page, each with seeds 1 and 2, two runs at a time; then its pictures, and a table of all.

python lab/runs.py      twelve to eighteen minutes on two cores; one that was stopped goes on where it was
"""

import argparse
import contextlib
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

LAB = Path(__file__).parent
sys.path.append(str(LAB.parent / "plots"))
import curves  # noqa: E402
import figure  # noqa: E402
from table import Table, read_table  # noqa: E402

PAGE = (LAB / "README.md").read_text()
EXPECTED = LAB / "expected"
TABLE = {  # of the page: metric, its column
    "eval/mean/accuracy": "accuracy, evaluations",
    "rollout/accuracy": "accuracy, training",
    "rollout/truncated": "truncated",
    "rollout/response_len": "length",
    "rollout/entropy": "entropy",
    "reward/std": "rewards' std",
    "adv/zero": "advantages of 0",
    "train/clip_high": "clipped above",
}


def pictures():
    """-> [arguments of plots/curves.py], by question"""
    return [shlex.split(text) for text in re.findall(r"^ +python plots/curves.py (.+)$", PAGE, re.M)]


def as_figure():
    """-> a module as the file of a figure is one, whose commands are the page's"""
    module = ModuleType("lab", PAGE)
    shown = {metric for words in pictures() for metric in words[words.index("--metrics") + 1].split(",")}
    module.__file__, module.METRICS = "lab.csv", ["|".join(sorted(shown | TABLE.keys()))]
    return module


def markdown(out=EXPECTED):
    """-> the page's table: of each run the mean of its last ten steps, seed 1 / seed 2"""
    module = as_figure()
    table = Table(read_table(figure.table_path(module, out)))
    lines = ["| | " + " | ".join(TABLE.values()) + " |", "|---" * (len(TABLE) + 1) + "|"]
    for command in figure.commands(module):
        ends = [table.value(command, metric, "end") for metric in TABLE]
        cells = [" / ".join(f"{end[seed]:.3g}" for seed in sorted(end)) for end in ends]
        lines.append(" | ".join([f"| `{command}`", *cells]) + " |")
    return lines


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=figure.positive, default=2, help="1, 2, ... of each command [%(default)s]")
    p.add_argument("--out", type=Path, default=LAB.parent / "runs" / "lab", help="of pictures and table [runs/lab]")
    args = p.parse_args()
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    how = {"scale": "laptop", "steps": None, "run": True, "jobs": 2, "runs": LAB.parent / "runs"}
    failed = figure.run([as_figure()], SimpleNamespace(seeds=args.seeds, out=args.out, **how))
    with contextlib.chdir(LAB.parent):
        for number, words in enumerate(pictures(), start=1):
            curves.main([*words, "--out", str(args.out / f"{number}.png")])
    sys.exit(failed > 0)
