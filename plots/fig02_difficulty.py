"""Figure 2: how hard are the three tiers of problems?

Question: of 8 responses to each problem, how many are right?
Paper: the tiers differ as their names say; the counts cannot be read off its picture.
(The paper rates its tiers with GPT-4o and does not name the model of this figure; these are the models that training starts from.)

Here: Right responses: base: easy 70%, medium 52%, hard 25%;
aligned: easy 84%, medium 73%, hard 53%.

Runs; --run starts them, on 16 problems of each tier for each of --steps [40], --scale node shows those on the paper's data:

    accelerate launch data/difficulty.py --data easy,medium,hard
    accelerate launch data/difficulty.py --data easy,medium,hard --model data/tiny/aligned
"""

import subprocess
import sys
from pathlib import Path

import difficulty
from figure import commands_at, main
from launch import ROOT, flags_of
from table import read_rows

SIZES = ("4B", "8B")
CLAIMS = []
TIERS = "easy", "medium", "hard"


def run(args):
    """-> rows of the table: model, tier, how many of 8 responses are right, how many problems that is"""
    rows = []
    for command in commands_at(sys.modules[__name__], args.scale):
        model = flags_of(command)["model"]
        laptop = args.scale == "laptop"
        size, source = (16 * (args.steps or 40), "data/tiny") if laptop else (None, "data")  # None: all of them
        files = subset(args.runs.absolute() / f"difficulty__{Path(model).name}__{size or 'all'}", ROOT / source, size)
        counted = [file.with_suffix(".difficulty.jsonl") for file in files]
        if not all(map(Path.is_file, counted)):
            launcher = ["accelerate", "launch"] if args.scale == "node" else [sys.executable]
            script = [str(ROOT / "data" / "difficulty.py"), "--scale", args.scale, "--model", model]
            subprocess.run([*launcher, *script, "--data", ",".join(map(str, files))], cwd=ROOT, check=True)
        for tier, file in zip(TIERS, counted):
            counts = enumerate(difficulty.by_right(read_rows(file)))
            rows += [{"model": Path(model).name, "tier": tier, "right": k, "problems": n} for k, n in counts]
    return rows


def subset(folder, source, size):
    """-> files with the first problems of each tier, in a folder of their own: the counts are written beside them"""
    folder.mkdir(parents=True, exist_ok=True)
    for tier in TIERS:
        lines = (source / f"{tier}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{tier}.jsonl").write_text("".join(lines[:size]))
    return [folder / f"{tier}.jsonl" for tier in TIERS]


def counts_of(rows):
    counts = {}
    for row in rows:
        counts.setdefault(f"{row['model']}, {row['tier']}", []).append(int(row["problems"]))
    return counts


def found(rows):
    share = {name: sum(k * n for k, n in enumerate(c)) / sum(c) / (len(c) - 1) for name, c in counts_of(rows).items()}
    models = dict.fromkeys(name.split(", ")[0] for name in share)
    parts = [", ".join(f"{tier} {share[f'{m}, {tier}']:.0%}" for tier in TIERS) for m in models]
    return "Right responses: " + ";\n".join(f"{m}: {part}" for m, part in zip(models, parts))


def draw(rows):
    figure = difficulty.bars(counts_of(rows))
    figure.suptitle(found(rows), fontsize=10, x=0.01, ha="left")
    return figure


if __name__ == "__main__":
    main(sys.modules[__name__])
