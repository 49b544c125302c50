"""Figure 14: do truncated responses go round in circles?

Question: of the truncated responses with a right and with a wrong answer, what share ends in a loop? With a short and a long limit,
with and without the overlong filter?
Paper: more at the longer limit and among the wrong ones; without the filter the share rises, with it it falls (appendix B.1).
(What a loop is: rewards.repeats. The limits are those of figure 13, 56 and 128 tokens for 8 and 20 thousand. The paper's filter is
shown on an aligned model; ours never loops, so that it is the base model at the long limit here.)

Here: not run yet.

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 56 --eval_max_response_len 56 --minibatches 8 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 128 --eval_max_response_len 128 --minibatches 8 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 128 --eval_max_response_len 128 --overlong filter --minibatches 8 --steps 40 --eval_every 10
"""

import sys

import runs

SIZES = ("8B",)
METRICS = ["rollout/repeat_ratio_right", "rollout/repeat_ratio_wrong", "rollout/truncated"]
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


def draw(rows):
    table = runs.Table(rows)
    figure, axes = runs.grid(1, 2, height=2.8)
    for command in table.commands:
        f = runs.flags(command)
        limit = {"short": "0.28", "long": "0.2"}[f["limit"]]  # black is the long one
        if f["overlong"] == "keep":
            lines(axes[0, 0], table, command, f"limit {f['max_response_len']}", runs.STYLES[limit][1])
        if f["limit"] == "long":
            lines(axes[0, 1], table, command, *runs.STYLES[f["overlong"]][:2])
    for ax, title in zip(axes[0], ("base, all responses", "base, limit 128")):
        ax.set_title(title, fontsize=9)
        ax.set_ylim(-0.02, 1.02)
        ax.set_xlabel("rollouts trained on", fontsize=9)
        ax.set_ylabel("loops, share of the truncated", fontsize=9)
    runs.entitle(figure, table, "Truncated responses that end in a loop", CLAIMS)
    return figure


if __name__ == "__main__":
    runs.main(sys.modules[__name__])
