"""Figure 12: does every token count the same, or every response?

Question: the loss as a mean over tokens or over responses, base and aligned models, medium and hard data.
Paper: tokens for base models, most of all on hard data; responses for aligned ones, in most sets (takeaway 7).
(Figure 17 of the appendix is the same for another base model, which it does not name.)

Here: token mean is better for the base model: seen, +0.011 [+0.008, +0.014];
sequence mean is better for the aligned model: excluded (less than 0.004), +0.000 [-0.003, +0.004];
token mean truncates fewer responses of the base model (share): seen, +0.023 [+0.022, +0.024].

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data medium --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg token_mean --data medium --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg token_mean --data hard --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data medium --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg token_mean --model data/tiny/aligned --data medium --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data hard --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg token_mean --model data/tiny/aligned --data hard --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
"""

import sys

from claims import Claim
from figure import main
from panels import comparison, entitle
from table import Table

SIZES = ("8B",)
METRICS = ["rollout/accuracy", "rollout/truncated"]
CLAIMS = [
    Claim(
        "token mean is better for the base model", "loss_agg", "token_mean", "seq_mean", {"kind": "base"}, takeaway=7
    ),
    Claim(
        "sequence mean is better for the aligned model",
        "loss_agg",
        "seq_mean",
        "token_mean",
        {"kind": "aligned"},
        takeaway=7,
        small=0.01,
    ),
    Claim(
        "token mean truncates fewer responses of the base model (share)",
        "loss_agg",
        "seq_mean",
        "token_mean",
        {"kind": "base"},
        "rollout/truncated",
        takeaway=7,
        small=0.01,
    ),
]


def draw(rows):
    table = Table(rows)
    figure = comparison(table, "loss_agg", METRICS)
    entitle(figure, table, "Loss as a mean over tokens or over responses", CLAIMS)
    return figure


if __name__ == "__main__":
    main(sys.modules[__name__])
