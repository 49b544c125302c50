"""The whole study: the runs of all figures, each once, then every table and picture, and the takeaways at a glance.

    python plots/study.py                                             draws all pictures again, from their tables
    python plots/study.py --run --jobs 2 --out plots/figures          5 seeds, on a laptop; --scale node prints the paper's runs

A study that was stopped goes on where it was; the bar says how much time is left. All runs of a seed come before those of the next, so
that every figure can be drawn early, with fewer seeds. The table of takeaways in plots/README.md is made from the same
tables (`python tests/test_readme.py --write`).
"""

import importlib
from pathlib import Path

from claims import ENOUGH
from figure import FIGURES, parse, work
from panels import grid
from table import SCORE, Table, read_table

TAKEAWAYS = {  # the paper's number: what it says, why a small world may differ. 9 is its claim for Lite PPO
    1: (
        "With rewards 1 and 0 group-level normalization beats batch-level and none; 1 and -1 repair the batch's",
        "Not known: without one accuracy rises faster and entropy falls further, with rewards 1 and -1 too. Outliers are "
        "here as well (-11), but do no harm that shows. That a scale repairs a std cannot be seen: the std undoes it",
    ),
    2: (
        "On easy data leave the std out; on hard data it makes no difference",
        "A batch's std is one factor of all gradients, which Adam takes out; easy rewards still vary by 0.2 at the end",
    ),
    3: (
        "The mean of the group with the std of the batch is the most robust",
        "A mixed group of 8 has a std of 0.35 to 0.53: that of the group changes weights by a factor of 1.5 at most",
    ),
    4: (
        "Clip-Higher helps aligned models, whose entropy it keeps, and not base models",
        "Where the bound clips enough, training is unstable: two runs of a seed differ by up to 0.17. At 1e-4, stable but "
        "with a sixth of the clipping, +0.008 [-0.015, +0.038] aligned, +0.007 [-0.011, +0.029] base. Why 0.28 leaves "
        "less entropy is not known",
    ),
    5: (
        "Under 0.20 connectives are clipped; under 0.28 fewer tokens, and function words",
        "What is undecided in a sum are its digits",
    ),
    6: ("The small aligned model gains with every step of the upper bound up to 0.32", "As for Clip-Higher"),
    7: (
        "Token mean for base models, sequence mean for aligned ones",
        "Lengths differ little: the base model's wrong answers are even shorter at first (38 tokens against 51), where "
        "the paper's go on and on",
    ),
    8: (
        "Leaving truncated responses out helps under a short limit, hardly under a long one",
        "The short limit truncates 69 % of the aligned model's responses at first; left out, they do not teach it to be "
        "brief. At the long one few are, but in three of five seeds the filter lets responses grow (+6, +8, +17 tokens)",
    ),
    9: (
        "Lite PPO beats GRPO and DAPO",
        "DAPO samples 2 to 4 times as many responses; no run collapses within 40 steps, which sets them apart in the paper",
    ),
}


def figures():
    """-> the modules of all figures, in order"""
    found = sorted(Path(__file__).parent.glob("fig[0-9][0-9]_*.py"))
    return [importlib.import_module(path.stem) for path in found]


def load_table(module, folder):
    path = folder / f"{module.__name__}.csv"
    return Table(read_table(path)) if path.is_file() and module.CLAIMS else None


def all_claims(folder=FIGURES):
    """-> [(takeaway or 0, module, claim, table)] of the figures that have a table"""
    tables = [(module, load_table(module, folder)) for module in figures()]
    return [(claim.takeaway, module, claim, table) for module, table in tables if table for claim in module.CLAIMS]


def markdown():
    """-> the lines of the table of takeaways in plots/README.md"""
    lines = ["| | the paper | here: 95 % interval, figure | why it may differ |", "|---|---|---|---|"]
    every = all_claims()
    for number, (text, why) in TAKEAWAYS.items():
        mine = [(module, claim.sentence(table)) for n, module, claim, table in every if n == number]
        found = "<br>".join(f"{sentence}, {int(module.__name__[3:5])}" for module, sentence in mine)
        lines.append(f"| {number if number < 9 else ''} | {text} | {found} | {why} |")
    return lines


def figures_markdown():
    """-> the lines of the table of figures in plots/README.md"""
    lines = ["| figure | question | picture |", "|---|---|---|"]
    for module in figures():
        name, title = module.__name__, module.__doc__.split("\n")[0].split(": ", 1)[1]
        lines.append(f"| [{name[3:5]}]({name}.py) | {title} | [png](figures/{name}.png) |")
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
    """The effects on accuracy of all claims, by takeaway: mean, interval, seeds as small ticks; shaded where no gain was claimed"""
    found = sorted((x for x in all_claims(folder) if x[0] and x[2].metric == SCORE), key=lambda x: x[0])
    figure, axes = grid(1, 1, height=0.27 * len(found))
    ax, names, bands = axes[0, 0], [], []
    for y, (number, _, claim, table) in enumerate(found):
        mean, low, high, n = claim.effect(table)
        colour = {"seen": "#0072B2", "opposite": "#D55E00", "not seen": "#999999", "open": "#CCCCCC"}[
            claim.verdict(table)
        ]
        mark = {"seen": "o", "opposite": "X", "not seen": "s", "open": "."}[claim.verdict(table)]
        if claim.expect != "more":
            bands.append((y, -claim.small if claim.expect == "the same" else -1, claim.small))
        ax.plot(claim.differences(table), [y] * n, "|", color=colour, markersize=5)
        if n >= ENOUGH:
            ax.plot([low, high], [y, y], color=colour, lw=2)
        ax.plot(mean, y, mark, color=colour, label=claim.verdict(table))
        names.append(f"{number}: {claim.text}" if number < 9 else claim.text)
    ends = ax.get_xlim()
    for y, least, most in bands:
        ax.barh(y, most - least, left=least, color="#EEEEEE", zorder=0)
    ax.set_xlim(ends)
    ax.axvline(0, color="black", lw=0.8)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlabel("difference in final accuracy, mean of six sets (ticks: the seeds; shaded: counts as none)")
    shown = dict(zip(*reversed(ax.get_legend_handles_labels())))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncol=3, fontsize=9, frameon=False)
    verdicts = [claim.verdict(table) for _, _, claim, table in found]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    figure.suptitle(f"What the paper claims, on a {scale}: {counts}", fontsize=10, x=0.01, ha="left")
    figure.savefig(folder / "study.png", dpi=100)
    return folder / "study.png"


def main():
    args = parse(__doc__)
    failed = work(figures(), args)
    if args.run or args.scale == "laptop":
        print(overview(args.out, args.scale))
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
