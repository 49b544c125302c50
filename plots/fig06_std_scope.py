"""Figure 6: the standard deviation of the group or of the batch?

Question: the mean being that of the group, whose standard deviation divides?
Paper: that of the batch, which is the most robust (takeaway 3).

Here: batch std beats group std: excluded (less than 0.001), -0.001 [-0.003, +0.001].

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data easy,medium,hard --prompts_per_step 32 --group_size 4 --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_batch_std --loss_agg seq_mean --data easy,medium,hard --prompts_per_step 32 --group_size 4 --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_batch_std --loss_agg seq_mean --data hard --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
"""

import sys

from claims import Claim
from figure import main
from panels import comparison, entitle
from table import Table

SIZES = "4B", "8B"
METRICS = ["rollout/accuracy"]
CLAIMS = [
    Claim("batch std beats group std", "norm", "group_mean_batch_std", "group_mean_group_std", takeaway=3),
]


def draw(rows):
    table = Table(rows)
    figure = comparison(table, "norm")
    entitle(figure, table, "Group mean, and the std of the group or of the batch", CLAIMS)
    return figure


if __name__ == "__main__":
    main(sys.modules[__name__])
