"""Figure 3: what does the difficulty of the data change?

Question: how do accuracy and response length develop on easy, medium and hard data, from a base and from an aligned model?
Paper: harder data make longer responses and other paths of accuracy; aligned models start high and gain little.

Here: responses of the base model grow more on hard data than on easy (tokens): opposite, -17.244 [-18.228, -16.260];
the base model gains more than the aligned one: seen, +0.131 [+0.108, +0.154].

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data easy --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data medium --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data easy --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data medium --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data hard --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
"""

import sys

from claims import Claim
from figure import main
from launch import panel
from panels import comparison, entitle
from table import Table

SIZES = "4B", "8B"
METRICS = ["rollout/accuracy", "rollout/response_len"]
CLAIMS = [
    Claim(
        "responses of the base model grow more on hard data than on easy (tokens)",
        "data",
        "hard",
        "easy",
        {"kind": "base"},
        "rollout/response_len",
        "gain",
    ),
    Claim("the base model gains more than the aligned one", "kind", "base", "aligned", measure="gain"),
]


def draw(rows):
    table = Table(rows)
    figure = comparison(table, "data", METRICS, key=lambda command: panel(command).split(",")[0])
    entitle(figure, table, "Training on easy, medium and hard data", CLAIMS)
    return figure


if __name__ == "__main__":
    main(sys.modules[__name__])
