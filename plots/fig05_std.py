"""Figure 5: does dividing by the standard deviation help?

Question: how large is the standard deviation of a batch's rewards, and what happens without the division by it?
Paper: on easy data it is small and the division harms; on hard data it stays large and makes no difference (takeaway 2).

Here: the rewards vary less on easy data at the end (std): seen, +0.219 [+0.201, +0.237];
on easy data it is better without std: excluded (less than -0.007), -0.012 [-0.018, -0.007];
on hard data it is the same without std: seen, -0.000 [-0.006, +0.006].

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch lite_ppo.py --norm batch_mean_batch_std --loss_agg seq_mean --data easy --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm batch_mean --loss_agg seq_mean --data easy --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm batch_mean_batch_std --loss_agg seq_mean --data hard --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm batch_mean --loss_agg seq_mean --data hard --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
"""

import sys

from claims import Claim
from figure import main
from panels import comparison, entitle
from table import Table

SIZES = "4B", "8B"
METRICS = ["reward/std"]
CLAIMS = [
    Claim(
        "the rewards vary less on easy data at the end (std)",
        "data",
        "hard",
        "easy",
        {},
        "reward/std",
        "end",
        takeaway=2,
    ),
    Claim(
        "on easy data it is better without std",
        "norm",
        "batch_mean",
        "batch_mean_batch_std",
        {"data": "easy"},
        takeaway=2,
    ),
    Claim(
        "on hard data it is the same without std",
        "norm",
        "batch_mean",
        "batch_mean_batch_std",
        {"data": "hard"},
        takeaway=2,
        expect="the same",
    ),
]


def draw(rows):
    table = Table(rows)
    figure = comparison(table, "norm", METRICS)
    left = figure.axes[::3]  # easy and hard on one scale
    low, high = zip(*(ax.get_ylim() for ax in left))
    for ax in left:
        ax.set_ylim(min(low), max(high))
    entitle(figure, table, "With and without the standard deviation (batch mean)", CLAIMS)
    return figure


if __name__ == "__main__":
    main(sys.modules[__name__])
