"""Figure 14: do truncated responses go round in circles?

Question: of the truncated responses with a right and with a wrong answer, what share ends in a loop? With a short and a long limit,
with and without the overlong filter?
Paper: more at the longer limit and among the wrong ones; without the filter the share rises, with it it falls (appendix B.1).
(What a loop is: rewards.repeats. The limits are those of figure 13: 56 and 128 tokens for 8 and 20 thousand.)

Here: not run yet.

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 56 --eval_max_response_len 56 --minibatches 8 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 128 --eval_max_response_len 128 --minibatches 8 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data hard --max_response_len 56 --eval_max_response_len 56 --minibatches 8 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data hard --max_response_len 56 --eval_max_response_len 56 --overlong filter --minibatches 8 --steps 40 --eval_every 10
"""

import sys

import runs

SIZES = ("8B",)
METRICS = ["rollout/repeat_ratio_right", "rollout/repeat_ratio_wrong", "rollout/truncated"]
WRONG = "rollout/repeat_ratio_wrong"
CLAIMS = [
    runs.Claim("more loops at the long limit", "limit", "long", "short", {"kind": "base"}, WRONG, 500),
    runs.Claim("the filter lowers them, aligned", "overlong", "keep", "filter", {"kind": "aligned"}, WRONG, 500),
]


def shares(table, command, which):
    """-> steps, share of loops among the truncated: mean over the seeds that had any at this step, smoothed"""
    found = {}
    for one in table.series[command].values():
        for step, value in zip(*one.get(f"rollout/repeat_ratio_{which}", ((), ()))):
            found.setdefault(step, []).append(value)
    steps = sorted(found)
    return steps, runs.smooth([sum(found[s]) / len(found[s]) for s in steps])


def draw(rows):
    table = runs.Table(rows)
    figure, axes = runs.grid(1, 2, height=2.8)
    for command in table.commands:
        f = runs.flags(command)
        left = f["kind"] == "base"
        value = {"short": "0.28", "long": "0.2"}[f["limit"]] if left else f["overlong"]
        name = f"limit {f['max_response_len']}" if left else runs.STYLES[value][0]
        for which, dashes in (("right", "-"), ("wrong", "--")):
            steps, share = shares(table, command, which)
            colour = runs.STYLES[value][1]
            axes[0, int(not left)].plot(steps, share, color=colour, linestyle=dashes, label=f"{name}, {which} answer")
    for ax, title in zip(axes[0], ("base, no filter", "aligned, limit 56")):
        ax.set_title(title, fontsize=9)
        ax.set_ylim(-0.02, 1.02)
        ax.set_xlabel("rollouts trained on", fontsize=9)
        ax.set_ylabel("loops, share of the truncated", fontsize=9)
    runs.entitle(figure, table, "Truncated responses that end in a loop", CLAIMS)
    return figure


if __name__ == "__main__":
    runs.main(sys.modules[__name__])
