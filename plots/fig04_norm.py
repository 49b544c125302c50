"""Figure 4: which normalization of the advantages?

Question: does an advantage need a mean and a standard deviation, and those of its group or of the whole batch?
Paper: of its group, which is steadier and ends higher; under rewards 1 and 0 batch-level normalization is unstable (takeaway 1).

Here: group-level beats batch-level: excluded (less than -0.003), -0.004 [-0.006, -0.003];
group-level beats none: opposite, -0.033 [-0.039, -0.027];
batch-level falls deeper from its best than group-level: excluded (less than 0.005), +0.001 [-0.004, +0.005].

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch lite_ppo.py --norm none --loss_agg seq_mean --data easy --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm batch_mean_batch_std --loss_agg seq_mean --data easy --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data easy --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm none --loss_agg seq_mean --data easy,medium,hard --prompts_per_step 32 --group_size 4 --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm batch_mean_batch_std --loss_agg seq_mean --data easy,medium,hard --prompts_per_step 32 --group_size 4 --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data easy,medium,hard --prompts_per_step 32 --group_size 4 --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm none --loss_agg seq_mean --model data/tiny/aligned --data medium --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm batch_mean_batch_std --loss_agg seq_mean --model data/tiny/aligned --data medium --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data medium --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
"""

import sys

from claims import Claim
from figure import main
from panels import comparison, entitle
from table import Table

SIZES = "4B", "8B"
METRICS = ["rollout/accuracy"]
CLAIMS = [
    Claim("group-level beats batch-level", "norm", "group_mean_group_std", "batch_mean_batch_std", takeaway=1),
    Claim("group-level beats none", "norm", "group_mean_group_std", "none", takeaway=1),
    Claim(
        "batch-level falls deeper from its best than group-level",
        "norm",
        "batch_mean_batch_std",
        "group_mean_group_std",
        measure="drop",
        takeaway=1,
    ),
]


def draw(rows):
    table = Table(rows)
    figure = comparison(table, "norm")
    entitle(figure, table, "Group-level, batch-level or no normalization, rewards 1 and 0", CLAIMS)
    return figure


if __name__ == "__main__":
    main(sys.modules[__name__])
