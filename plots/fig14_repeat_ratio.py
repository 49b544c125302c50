"""Figure 14: do truncated responses go round in circles?

Question: of the truncated responses with a right and with a wrong answer, what share ends in a loop? With a short and a long limit,
with and without the overlong filter?
Paper: more at the longer limit and among the wrong ones; without the filter the share rises, with it it falls (appendix B.1).
(What a loop is: rewards.repeats. The limits are those of figure 13, 56 and 128 tokens for 8 and 20 thousand. The paper's filter is
shown on an aligned model; ours never loops, so that it is the base model at the long limit here.)

Here: more loops at the long limit: open, +0.589 in 3 seeds;
the filter lowers them: open, +0.061 in 3 seeds;
of the truncated at the long limit 98% of the right and 59% of the wrong answers loop.

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 56 --eval_max_response_len 56 --minibatches 8 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 128 --eval_max_response_len 128 --minibatches 8 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 128 --eval_max_response_len 128 --overlong filter --minibatches 8 --steps 40 --eval_every 10
"""

import sys

import runs

SIZES = ("8B",)
METRICS = ["rollout/repeat_ratio_right", "rollout/repeat_ratio_wrong"]
WRONG = "rollout/repeat_ratio_wrong"
CLAIMS = [
    runs.Claim("more loops at the long limit", "limit", "long", "short", {"overlong": "keep"}, WRONG, 500),
    runs.Claim("the filter lowers them", "overlong", "keep", "filter", {"limit": "long"}, WRONG, 500),
]


def shares(table, command, which):
    """-> steps, share of loops among the truncated: mean over the seeds that had any at this step, smoothed"""
    found = {}
    for one in table.series[command].values():
        for step, value in zip(*one.get(f"rollout/repeat_ratio_{which}", ((), ()))):
            found.setdefault(step, []).append(value)
    steps = sorted(found)
    return steps, runs.smooth([sum(found[s]) / len(found[s]) for s in steps])


def lines(ax, table, command, name, colour):
    for which, dashes in (("right", "-"), ("wrong", "--")):
        ax.plot(*shares(table, command, which), color=colour, linestyle=dashes, label=f"{name}, {which} answer")


def found(rows):
    """The third finding, of right against wrong answers, from all steps and seeds of the long limit without the filter"""
    table, means = runs.Table(rows), {}
    long = [c for c in table.commands if runs.flags(c)["limit"] == "long" and runs.flags(c)["overlong"] == "keep"]
    for which in ("right", "wrong"):
        values = [v for c in long for v in table.last(c, f"rollout/repeat_ratio_{which}", 500).values()]
        means[which] = sum(values) / len(values) if values else float("nan")
    return (
        "of the truncated at the long limit {right:.0%} of the right and {wrong:.0%} of the wrong answers loop".format(
            **means
        )
    )


def draw(rows):
    table = runs.Table(rows)
    models = list(dict.fromkeys(runs.panel(command) for command in table.commands))
    figure, axes = runs.grid(len(models), 2, height=3)
    for command in table.commands:
        f, row = runs.flags(command), axes[models.index(runs.panel(command))]
        limit = f"limit {f['max_response_len']}"
        if f["overlong"] == "keep":
            lines(row[0], table, command, limit, {"short": "#D55E00", "long": "black"}[f["limit"]])
        if f["limit"] == "long":
            lines(row[1], table, command, *runs.STYLES[f["overlong"]][:2])
            row[1].set_title(f"with and without the filter, {limit}", fontsize=9)
        row[0].set_title(f"{runs.panel(command)}, without the filter", fontsize=9)
    for ax in axes.flat:
        ax.set_ylim(-0.02, 1.02)
        ax.set_xlabel("rollouts trained on", fontsize=9)
        ax.set_ylabel("loops, share of the truncated", fontsize=9)
        ax.legend(fontsize=7)
    runs.entitle(figure, table, f"Truncated responses that end in a loop: {found(rows)}", CLAIMS, legend=False)
    return figure


if __name__ == "__main__":
    runs.main(sys.modules[__name__])
