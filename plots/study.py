"""The whole study: the runs of all figures, each once, then every table and picture, and the takeaways at a glance.

    python plots/study.py                                             draws all pictures again, from their tables
    python plots/study.py --run --jobs 2 --out plots/figures          5 seeds, on a laptop; --scale node prints the paper's runs

A study that was stopped goes on where it was; the bar says how much time is left. All runs of a seed come before those of the next, so
that every figure can be drawn early, with fewer seeds. The table of takeaways in the README is made from the same tables
(`python tests/test_readme.py --write`).
"""

import importlib
from pathlib import Path

import runs

TAKEAWAYS = {  # the paper's number: what it says, why a small world may differ. 9 is its claim for Lite PPO
    1: (
        "With rewards 1 and 0 the norm of the group is better than that of the batch or none; 1 and -1 repair that of the batch",
        "Not known: without a norm accuracy rises faster and entropy falls further, on easy data with rewards 1 and 0 as with 1 and -1. Batch norm has its outliers here too (-11 for "
        "the one wrong answer of an easy batch), but they do no harm that shows. The last part cannot be seen in any world: mean and std of the "
        "batch undo the scale, and the two curves of figure 18 are one but for rounding",
    ),
    2: (
        "On easy data, leave the standard deviation out; on hard data it makes no difference",
        "The std of a batch is one factor for all its gradients, which Adam takes out again; easy rewards still vary by 0.2 at the end",
    ),
    3: (
        "The mean of the group with the std of the batch is the most robust",
        "In a group of 8 that has both, rewards have a std of 0.35 to 0.53: that of the group changes weights by a factor of 1.5 at most",
    ),
    4: (
        "Clip-Higher helps aligned models, whose entropy it keeps, and not base models",
        "Where the bound cuts enough to matter, training is unstable here, and the two runs of a seed differ by up to 0.17. With 16 updates at 1e-4, which is "
        "stable but whose upper bound cuts a sixth, nothing is seen either: +0.008 [-0.015, +0.038] for the aligned model, +0.007 [-0.011, +0.029] for the base model (LOG.md). Why 0.28 leaves less entropy is not known",
    ),
    5: (
        "Under 0.20 the clip cuts connectives; under 0.28 less, and function words",
        "What is undecided in a sum are its digits",
    ),
    6: ("The small aligned model gains with every step of the upper bound up to 0.32", "As for Clip-Higher above"),
    7: (
        "Token mean for base models, sequence mean for aligned ones",
        "Lengths differ little here: at first the base model's wrong answers are even shorter than its right ones (38 tokens against 51), where the paper's go on and on",
    ),
    8: (
        "Leaving truncated responses out helps under a short limit, hardly under a long one",
        "The short limit cuts 69 % of the aligned model's responses at first; left out, they do not teach it to be brief, which the same limit of "
        "the evaluation rewards. At the long limit few are cut, but in three of five seeds the filter lets responses run on to it (+6, +8, +17 tokens), as in the paper",
    ),
    9: (
        "Lite PPO beats GRPO and DAPO",
        "DAPO samples 2 to 4 times as many responses for a rollout (figure 15); no run collapses within 40 rollouts, which is what sets them apart in the paper",
    ),
}


def figures():
    """-> the modules of all figures, in order"""
    found = sorted(Path(__file__).parent.glob("fig[0-9][0-9]_*.py"))
    return [importlib.import_module(path.stem) for path in found]


def table_of(module, folder):
    path = folder / f"{module.__name__}.csv"
    return runs.Table(runs.read_table(path)) if path.is_file() and module.CLAIMS else None


def claims(folder=runs.FIGURES):
    """-> [(takeaway or 0, module, claim, table)] of the figures that have a table"""
    tables = [(module, table_of(module, folder)) for module in figures()]
    return [(claim.takeaway, module, claim, table) for module, table in tables if table for claim in module.CLAIMS]


def markdown():
    """-> the lines of the README's table of takeaways"""
    lines = ["| | the paper | here, with 95 % interval | why it may differ |", "|---|---|---|---|"]
    every = claims()
    for number, (text, why) in TAKEAWAYS.items():
        mine = [(module, claim.sentence(table)) for n, module, claim, table in every if n == number]
        found = "<br>".join(f"{sentence} (figure {int(module.__name__[3:5])})" for module, sentence in mine)
        lines.append(f"| {number if number < 9 else ''} | {text} | {found} | {why} |")
    return lines


def told(module, folder=runs.FIGURES):
    """-> the source of a figure's file with what was found, from its table, in the place of what stands behind `Here:`"""
    source = Path(module.__file__).read_text()
    before, rest = source.split("\nHere: ", 1)
    after = rest[rest.index("\n\n") :]
    path = folder / f"{module.__name__}.csv"
    if not path.is_file():
        return source
    rows = runs.read_table(path)
    sentences = [claim.sentence(runs.Table(rows)) for claim in module.CLAIMS]
    sentences += [module.found(rows)] if hasattr(module, "found") else []
    found = ";\n".join(sentences) + "."
    return f"{before}\nHere: {found}{after}"


def overview(folder, scale):
    """The effects on accuracy of all claims, by takeaway: mean, interval, seeds as small ticks; shaded where no gain was claimed"""
    found = sorted((x for x in claims(folder) if x[0] and x[2].metric == runs.SCORE), key=lambda x: x[0])
    figure, axes = runs.grid(1, 1, height=0.27 * len(found))
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
        if n >= runs.ENOUGH:
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
    args = runs.parse(__doc__)
    failed = runs.work(figures(), args)
    if args.run or args.scale == "laptop":
        print(overview(args.out, args.scale))
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
