"""Three effects that are seen with the naked eye, for a class: `python plots/study.py --quick` runs them, with three seeds.

Which three is a rule, not a choice: of what the committed tables decide (seen or opposite) in a metric that has a curve, the pairs of
commands whose difference is the largest in standard deviations over the seeds, each of another takeaway.
"""

from types import ModuleType

import numpy as np

from launch import flags_of, panel
from panels import NAMES, grid, line, style
from table import SCORE, Table


def largest(found, count=3):
    """found: [(takeaway or 0, module, claim, table)] -> [(claim, pair of commands)], the largest first"""
    ranked, best = [], {}
    for number, _, claim, table in found:
        if number and claim.metric in NAMES and not claim.between and claim.verdict(table) in ("seen", "opposite"):
            for pair in claim.sides(table):
                a, b = (table.value(command, claim.metric, claim.measure) for command in pair)
                values = np.array([a[seed] - b[seed] for seed in a.keys() & b.keys()])
                ranked.append((abs(values.mean()) / values.std(ddof=1), number, claim, pair))
    for _, number, claim, pair in sorted(ranked, key=lambda x: -x[0]):
        best.setdefault(number, (claim, pair))
    return list(best.values())[:count]


def as_figure(effects):
    """-> a module as the file of a figure is one, with its commands, metrics and picture"""
    commands = "\n".join(f"    accelerate launch {command}" for _, pair in effects for command in pair)
    module = ModuleType("quick", commands)
    module.__file__, module.METRICS = "quick.py", list({claim.metric for claim, _ in effects})
    module.draw = lambda rows: draw(rows, effects)
    return module


def draw(rows, effects):
    """A panel an effect: thin lines are the seeds"""
    figure, axes = grid(1, len(effects), width=4.5 * len(effects), height=3.2)
    for ax, (claim, pair) in zip(axes[0], effects):
        table = Table([row for row in rows if row["command"] in pair])
        for command in pair:
            value, smoothed = flags_of(command)[claim.flag], claim.metric != SCORE
            for one in (curves := table.curves(command, claim.metric, smoothed))[1]:
                ax.plot(curves[0], one, color=style(value)["color"], lw=0.5)
            line(ax, table, command, value, claim.metric, smoothed)
        found = claim.differences(table)
        where = " and ".join(dict.fromkeys(map(panel, pair)))
        seen = f"{min(found):+.3f} to {max(found):+.3f} in {len(found)} seeds" if found else "no runs"
        told = claim.text + ": the opposite" * bool(found and max(found) < 0)
        ax.set_title(f"{told}\n{where}: {claim.measure} {seen}", fontsize=9, loc="left")
        ax.set(xlabel="training steps", ylabel=NAMES[claim.metric])
        ax.legend(fontsize=8)
    return figure
