"""Figure 14: do truncated responses go round in circles?

Question: of the truncated responses with a right and with a wrong answer, what share ends in a loop? With a short and a long limit,
with and without the overlong filter?
Paper: more at the longer limit and among the wrong ones; without the filter the share rises, with it it falls (appendix B.1).
(What a loop is: rewards.repeats; it takes 24 tokens, for which 56 leave little room. The limits are those of figure 13, 56 and 192
tokens for 8 and 20 thousand. The paper's filter is shown on an aligned model, which does not loop within 56 tokens, so that a base
model at the long limit stands beside it. Shares: of all truncated responses of a run where intervals are given, else of all seeds, in
a curve of the 11 steps before, smoothed.)

Here: more loops of wrong answers at the long limit, base model: seen, +0.794 [+0.781, +0.807];
the filter lowers them, base model, long limit: excluded (less than -0.010), -0.019 [-0.029, -0.010];
the filter lowers them, aligned model, short limit: excluded (less than -0.001), -0.004 [-0.006, -0.001];
base, hard, long limit, all responses: 0.15% truncated with a right answer, of which 98% loop; 4.84% truncated with a wrong answer, of which 93% loop;
base, hard, long limit, overlong filter: 0.14% truncated with a right answer, of which 98% loop; 8.29% truncated with a wrong answer, of which 95% loop.

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 56 --eval_max_response_len 56 --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 192 --eval_max_response_len 192 --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 192 --eval_max_response_len 192 --overlong filter --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data hard --max_response_len 56 --eval_max_response_len 56 --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data hard --max_response_len 56 --eval_max_response_len 56 --overlong filter --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
"""

import sys

import numpy as np

from claims import Claim
from figure import main
from launch import flags_of, panel
from panels import STYLES, entitle, grid
from table import Table, collect_rows, smooth

SIZES = ("8B",)
KEEP, LONG = {"kind": "base", "overlong": "keep"}, {"kind": "base", "limit": "long"}
ALIGNED = {"kind": "aligned", "limit": "short"}
WRONG = "loops of wrong"  # of a run's truncated responses with a wrong answer, the share that loops
CLAIMS = [
    Claim("more loops of wrong answers at the long limit, base model", "limit", "long", "short", KEEP, WRONG),
    Claim("the filter lowers them, base model, long limit", "overlong", "keep", "filter", LONG, WRONG),
    Claim("the filter lowers them, aligned model, short limit", "overlong", "keep", "filter", ALIGNED, WRONG),
]


def collect(found):
    """-> a row a step: of all responses the share that is truncated, and that is truncated and loops, with a right and with a wrong answer. The
    first of a run has the run's loops of wrong. found: [(command, seed, folder)]
    """
    names = [f"rollout/{name}" for name in ("truncated", "truncated_right", "repeat_ratio_right", "repeat_ratio_wrong")]
    first, rows = {}, []
    for r in collect_rows(found, names):
        truncated, right, *ratios = (r.get(name) for name in names)
        row = {k: r[k] for k in ("command", "seed", "commit", "step")}
        row |= dict.fromkeys(("truncated right", "loops right", "truncated wrong", "loops wrong", WRONG))
        rows.append(row)
        if None in (
            truncated,
            right,
        ):  # a run that is missing, or is of another version; the evaluation after the last step
            continue
        for which, share, ratio in zip(("right", "wrong"), (right, truncated - right), ratios):
            row |= {f"truncated {which}": share, f"loops {which}": share * (ratio or 0)}
        first.setdefault((r["command"], r["seed"]), []).append(row)
    for mine in first.values():
        if truncated := sum(row["truncated wrong"] for row in mine):
            mine[0][WRONG] = sum(row["loops wrong"] for row in mine) / truncated
    return rows


def lines(ax, table, command, name, colour):
    for which, dashes in (("right", "-"), ("wrong", "--")):
        truncated, loops = (table.curves(command, f"{what} {which}") for what in ("truncated", "loops"))
        if len(truncated[0]):
            below, above = (smooth(values.sum(0)) for _, values in (truncated, loops))
            share = np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
            ax.plot(truncated[0], share, color=colour, linestyle=dashes, label=f"{name}, {which} answer")


def found(rows):
    """Of all responses at the long limit, what was truncated, and of that what looped"""
    table, parts = Table(rows), []
    for command in table.commands:
        f = flags_of(command)
        if f["limit"] == "long":
            parts.append(f"{panel(command)}, long limit, {STYLES[f['overlong']][0]}:")
            for which in ("right", "wrong"):
                all_of, loops = (table.curves(command, f"{what} {which}")[1] for what in ("truncated", "loops"))
                share = loops.sum() / all_of.sum() if all_of.sum() else 0
                mean = all_of.mean() if all_of.size else 0
                parts[-1] += f" {mean:.2%} truncated with a {which} answer, of which {share:.0%} loop;"
    return "\n".join(parts).removesuffix(";")


def draw(rows):
    table = Table(rows)
    panels = list(dict.fromkeys(map(panel, table.commands)))
    figure, axes = grid(len(panels), 2, height=2.6)
    filtered = {(panel(c), flags_of(c)["limit"]) for c in table.commands if flags_of(c)["overlong"] == "filter"}
    for command in table.commands:
        f, name = flags_of(command), panel(command)
        row, limit = axes[panels.index(name)], f"limit {f['max_response_len']}"
        if f["overlong"] == "keep":
            lines(row[0], table, command, limit, {"short": "#D55E00", "long": "black"}[f["limit"]])
        if (name, f["limit"]) in filtered:
            lines(row[1], table, command, *STYLES[f["overlong"]][:2])
            row[1].set_title(f"{name}, with and without the filter, {limit}", fontsize=9)
        row[0].set_title(f"{name}, without the filter", fontsize=9)
    for ax in axes.flat:
        ax.set_ylim(-0.03, 1.03)
        ax.set_ylabel("loops, share of the truncated", fontsize=9)
        ax.legend(fontsize=7, ncol=2, loc=(0.02, 0.08))
    for ax in axes[-1]:
        ax.set_xlabel("training steps", fontsize=9)
    entitle(figure, table, "Truncated responses that end in a loop", CLAIMS, legend=False)
    return figure


if __name__ == "__main__":
    main(sys.modules[__name__])
