"""The whole study: the runs of all figures, each once, then every table and picture, and the takeaways at a glance.

    python plots/study.py                                             draws all pictures again, from their tables
    python plots/study.py --run --jobs 2 --out plots/figures          5 seeds, on a laptop; --scale node prints the paper's runs
    python plots/study.py --run --jobs 2 --claims 4,7                 the figures of two takeaways
    python plots/study.py --quick                                     the three largest effects with three seeds, for a class

A study that was stopped goes on where it was; the bar says how much time is left. All runs of a seed come before those of the next, so
that every figure can be drawn early, with fewer seeds. The table of takeaways in plots/README.md is made from the same
tables (`python tests/test_readme.py --write`).
"""

import importlib
from pathlib import Path

import numpy as np

import quick
from claims import ENOUGH, FAMILY
from figure import FIGURES, parse, work
from panels import grid
from table import Table, read_table

TAKEAWAYS = {  # the paper's number: what it says, by what it is measured here and why. 9 is its claim for Lite PPO
    1: (
        "With rewards 1 and 0 group-level normalization beats batch-level and none; 1 and -1 repair the batch's",
        "The area under the evaluations' curve, as a norm changes how fast one learns, and a collapse costs area; the deepest "
        "fall, as the paper calls one steadier. The std undoes any scale of the rewards, so that 1 and -1 can change nothing",
    ),
    2: (
        "On easy data leave the std out; on hard data it makes no difference",
        "The rewards' std at the end, which is the paper's reason; the area, as above",
    ),
    3: (
        "The mean of the group with the std of the batch is the most robust",
        "The area; with groups of 4 from all tiers, where groups' stds differ most, and of 8 from hard data, as the paper has",
    ),
    4: (
        "Clip-Higher helps aligned models, whose entropy it keeps, and not base models",
        "The entropy of the last ten steps, on which a clip acts itself; the area for what it helps",
    ),
    5: (
        "Under 0.20 connectives are clipped; under 0.28 fewer tokens, and function words",
        "Counts over a whole run, as the paper's",
    ),
    6: (
        "The small aligned model gains with every step of the upper bound up to 0.32",
        "The area, by one line through four bounds, not by the best of four",
    ),
    7: (
        "Token mean for base models, sequence mean for aligned ones",
        "The area, as the paper speaks of convergence, peak and steadiness; the truncated share over the run: under the sequence "
        "mean a long wrong response has little weight a token, so that rambling should survive",
    ),
    8: (
        "Leaving truncated responses out helps under a short limit, hardly under a long one",
        "The area, and the responses' length at the end",
    ),
    9: (
        "Lite PPO beats GRPO and DAPO",
        "The area, and the deepest fall: the paper's others peak and collapse. At equal training steps, for which DAPO samples more",
    ),
}


def figures():
    """-> the modules of all figures of the paper, in order, then of what explains a difference from it, by takeaway"""
    here = Path(__file__).parent
    found = sorted(here.glob("fig[0-9][0-9]_*.py")) + sorted(here.glob("why[0-9]_*.py"))
    return [importlib.import_module(path.stem) for path in found]


def load_table(module, folder):
    path = folder / f"{module.__name__}.csv"
    return Table(read_table(path)) if path.is_file() and module.CLAIMS else None


def all_claims(folder=FIGURES):
    """-> [(takeaway or 0, module, claim, table)] of the figures that have a table; 0 too of what explains one"""
    tables = [(module, load_table(module, folder)) for module in figures()]
    return [(claim.takeaway, module, claim, table) for module, table in tables if table for claim in module.CLAIMS]


def markdown():
    """-> the lines of the table of takeaways in plots/README.md"""
    lines = ["| | the paper | here: 95 % interval, figure | measured by |", "|---|---|---|---|"]
    every = [(n or takeaway_explained(m), m.__name__, claim.sentence(table)) for n, m, claim, table in all_claims()]
    for number, (text, why) in TAKEAWAYS.items():
        mine = [(name, sentence) for n, name, sentence in every if n == number]
        found = "<br>".join(f"{sentence}, [{label(name)}]({name}.py)" for name, sentence in mine)
        lines.append(f"| {number if number < 9 else ''} | {text} | {found} | {why} |")
    return [*lines, "", f"All runs are of the code of {', '.join(commits())}."]


def label(name):
    """`fig04_norm` -> "4", `why1_greedy` -> "why 1" """
    return name[3:5].lstrip("0") if name.startswith("fig") else f"why {name[3]}"


def takeaway_explained(module):
    return int(module.__name__[3]) if module.__name__.startswith("why") else 0


def commits(folder=FIGURES):
    """-> the commits of the code that the runs of all tables are of"""
    rows = [row for path in sorted(folder.glob("*.csv")) for row in read_table(path)]
    return sorted({row["commit"] for row in rows if row.get("commit")})


def figures_markdown():
    """-> the lines of the table of figures in plots/README.md"""
    lines = ["| figure | question | picture |", "|---|---|---|"]
    for module in figures():
        name, title = module.__name__, module.__doc__.split("\n")[0].split(": ", 1)[1]
        lines.append(f"| [{label(name)}]({name}.py) | {title} | [png](figures/{name}.png) |")
    return lines


def told(module, folder=FIGURES):
    """-> the source of a figure's file with what was found, from its table, in the place of what stands behind `Here:`"""
    source = Path(module.__file__).read_text()
    before, rest = source.split("\nHere: ", 1)
    after = rest[rest.index("\n\n") :]
    path = folder / f"{module.__name__}.csv"
    if not path.is_file():
        return source
    rows = read_table(path)
    sentences = [claim.sentence(Table(rows)) for claim in module.CLAIMS]
    sentences += [module.found(rows)] if hasattr(module, "found") else []
    found = ";\n".join(sentences) + "."
    return f"{before}\nHere: {found}{after}"


def overview(folder, scale):
    """All claims by takeaway, in standard deviations over the seeds, which makes points of accuracy, tokens and nats comparable:
    mean, the 95 % interval, the interval that holds for all claims at once (thin), the seeds as small ticks
    """
    found = sorted((x for x in all_claims(folder) if x[0]), key=lambda x: x[0])
    figure, axes = grid(1, 1, width=11, height=0.27 * len(found))
    ax, names = axes[0, 0], []
    looks = {"seen": ("#0072B2", "o"), "opposite": ("#D55E00", "X"), "excluded": ("#009E73", "D")}
    looks |= {"not seen": ("#999999", "s"), "open": ("#CCCCCC", ".")}
    for y, (number, _, claim, table) in enumerate(found):
        values, (colour, mark) = np.array(claim.differences(table)), looks[claim.verdict(table)]
        names.append(f"{number}: " * (number < 9) + f"{claim.text} [{claim.measure}]")
        if len(values) < 2 or not values.std(ddof=1):
            continue
        sd = values.std(ddof=1)
        ax.plot(values / sd, [y] * len(values), "|", color=colour, markersize=5)
        for level, width in ((0.95, 2.5), (1 - 0.05 / FAMILY, 0.8)) if len(values) >= ENOUGH else ():
            ax.plot(np.array(claim.effect(table, level)[1:3]) / sd, [y, y], color=colour, lw=width)
        ax.plot(values.mean() / sd, y, mark, color=colour, label=claim.verdict(table))
    ax.axvline(0, color="black", lw=0.8)
    ax.set_xscale("symlog", linthresh=3)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel(
        "difference, in standard deviations over the seeds\n(ticks: the seeds; thin: holds for all claims at once)",
        fontsize=9,
    )
    shown = dict(zip(*reversed(ax.get_legend_handles_labels())))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncol=5, fontsize=9, frameon=False)
    verdicts = [claim.verdict(table) for _, _, claim, table in found]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    figure.suptitle(f"What the paper claims, on a {scale}: {counts}", fontsize=10, x=0.01, ha="left")
    figure.savefig(folder / "study.png", dpi=100)
    return folder / "study.png"


def main():
    args = parse(__doc__, takeaways=list(TAKEAWAYS))
    if args.quick:
        raise SystemExit(work([quick.as_figure(quick.largest(all_claims()))], args) > 0)
    takeaways = lambda m: {takeaway_explained(m), *(claim.takeaway for claim in m.CLAIMS)}
    chosen = [m for m in figures() if args.claims is None or args.claims & takeaways(m)]
    failed = work(chosen, args)
    if args.run or args.scale == "laptop":
        print(overview(args.out, args.scale))
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
