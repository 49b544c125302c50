"""Why 2: does the standard deviation help on easy data, or only take larger steps?

Question: as easy data are learned the rewards' std falls, and without the division by it advantages and gradients shrink, while Adam
divides them by the larger ones it remembers: steps become smaller. Is the std still ahead at twice the learning rate, where the size
of a step matters less?
Paper: on easy data it is better to leave the std out (takeaway 2).
(Smaller steps are the explanation where the lead of the std is less than a third of figure 5's on easy data; where it is two thirds
and more, they are not.)

Here: at twice the learning rate the std is ahead on easy data: excluded (less than 0.018), +0.013 [+0.007, +0.018].

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch lite_ppo.py --norm batch_mean_batch_std --loss_agg seq_mean --data easy --minibatches 8 --lr 6e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm batch_mean --loss_agg seq_mean --data easy --minibatches 8 --lr 6e-5 --steps 120 --eval_every 20
"""

import sys

from claims import Claim
from figure import main
from panels import comparison, entitle
from table import Table

SIZES = "4B", "8B"
METRICS = ["reward/std"]
CLAIMS = [
    Claim("at twice the learning rate the std is ahead on easy data", "norm", "batch_mean_batch_std", "batch_mean"),
]


def draw(rows):
    table = Table(rows)
    figure = comparison(table, "norm", METRICS)
    entitle(figure, table, "With and without the standard deviation, at twice the learning rate", CLAIMS)
    return figure


if __name__ == "__main__":
    main(sys.modules[__name__])
