"""Figure 13: are truncated responses better left out of the loss?

Question: with limits of 8, 16 and 20 thousand tokens, is it better to leave truncated responses out?
Paper: at 8 thousand yes, and responses get shorter; at 20 thousand hardly, and they get longer (takeaway 8).
(Here 56, 72 and 128 tokens: the first cuts a quarter of the right solutions of hard problems, the last only what never ends.)

Here: not run yet.

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 56 --eval_max_response_len 56 --minibatches 8 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 56 --eval_max_response_len 56 --overlong filter --minibatches 8 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 72 --eval_max_response_len 72 --minibatches 8 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 72 --eval_max_response_len 72 --overlong filter --minibatches 8 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 128 --eval_max_response_len 128 --minibatches 8 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 128 --eval_max_response_len 128 --overlong filter --minibatches 8 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data hard --max_response_len 56 --eval_max_response_len 56 --minibatches 8 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data hard --max_response_len 56 --eval_max_response_len 56 --overlong filter --minibatches 8 --steps 40 --eval_every 10
"""

import sys

import runs

SIZES = ("8B",)
METRICS = ["rollout/accuracy", "rollout/response_len"]
CLAIMS = [
    runs.Claim(
        "the filter helps at the short limit, base",
        "overlong",
        "filter",
        "keep",
        {"kind": "base", "limit": "short"},
        takeaway=8,
    ),
    runs.Claim(
        "and the aligned model", "overlong", "filter", "keep", {"kind": "aligned", "limit": "short"}, takeaway=8
    ),
    runs.Claim(
        "but not at the long limit, base",
        "overlong",
        "filter",
        "keep",
        {"kind": "base", "limit": "long"},
        takeaway=8,
        gain=False,
    ),
]


def limit(command):
    f = runs.flags(command)
    return f"{runs.panel(command).split(',')[0]}, limit {f['max_response_len']}"


def draw(rows):
    table = runs.Table(rows)
    figure = runs.compare(table, "overlong", METRICS, key=limit)
    runs.entitle(figure, table, "Truncated responses in the loss or left out, hard data", CLAIMS)
    return figure


if __name__ == "__main__":
    runs.main(sys.modules[__name__])
