"""Figure 13: are truncated responses better left out of the loss?

Question: with limits of 8, 16 and 20 thousand tokens, is it better to leave truncated responses out?
Paper: at 8 thousand yes, and responses get shorter; at 20 thousand hardly, and they get longer (takeaway 8).
(Here 56, 96 and 192 tokens: the first truncates a quarter of the right solutions of hard problems, and more of the aligned model's, which
are longer; the last only what never ends. The evaluation has the limit of the training. The paper does not name its data: hard here.)

Here: under the short limit the filter helps the base model: excluded (less than -0.013), -0.023 [-0.033, -0.013];
under the short limit it helps the aligned model: excluded (less than -0.002), -0.009 [-0.016, -0.002];
under the long limit it does not help the base model: seen, -0.014 [-0.016, -0.012] of 10 seeds;
base, short limit: shorter with it (tokens): excluded (less than -0.263), -0.524 [-0.785, -0.263];
base, long limit: longer with it (tokens): seen, +4.094 [+3.396, +4.792] of 10 seeds.

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 56 --eval_max_response_len 56 --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 56 --eval_max_response_len 56 --overlong filter --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 96 --eval_max_response_len 96 --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 96 --eval_max_response_len 96 --overlong filter --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 192 --eval_max_response_len 192 --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 192 --eval_max_response_len 192 --overlong filter --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data hard --max_response_len 56 --eval_max_response_len 56 --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data hard --max_response_len 56 --eval_max_response_len 56 --overlong filter --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
"""

import sys

from claims import Claim
from figure import main
from launch import flags_of, panel
from panels import comparison, entitle
from table import Table

SIZES = ("8B",)
METRICS = ["rollout/accuracy", "rollout/response_len"]
SHORT, LONG = {"kind": "base", "limit": "short"}, {"kind": "base", "limit": "long"}
LENGTH = "rollout/response_len"
CLAIMS = [
    Claim("under the short limit the filter helps the base model", "overlong", "filter", "keep", SHORT, takeaway=8),
    Claim(
        "under the short limit it helps the aligned model",
        "overlong",
        "filter",
        "keep",
        SHORT | {"kind": "aligned"},
        takeaway=8,
        small=0.01,
    ),
    Claim(
        "under the long limit it does not help the base model",
        "overlong",
        "filter",
        "keep",
        LONG,
        takeaway=8,
        expect="no more",
    ),
    Claim(
        "base, short limit: shorter with it (tokens)",
        "overlong",
        "keep",
        "filter",
        SHORT,
        LENGTH,
        "end",
        takeaway=8,
        small=1,
    ),
    Claim(
        "base, long limit: longer with it (tokens)",
        "overlong",
        "filter",
        "keep",
        LONG,
        LENGTH,
        "end",
        takeaway=8,
        small=1,
    ),
]


def limit(command):
    f = flags_of(command)
    return f"{panel(command).split(',')[0]}, limit {f['max_response_len']}"


def draw(rows):
    table = Table(rows)
    figure = comparison(table, "overlong", METRICS, key=limit)
    entitle(figure, table, "Truncated responses in the loss or left out, hard data", CLAIMS)
    return figure


if __name__ == "__main__":
    main(sys.modules[__name__])
