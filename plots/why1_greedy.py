"""Why 1: is a policy without normalization better, or only surer of itself?

Question: without normalization every right response is made more probable, also in groups that are all right; no response less. That
sharpens the policy, and evaluations sample at temperature 1, where a sharper policy slips less. Is it ahead of group-level
normalization when the evaluations are greedy?
Paper: group-level normalization is ahead of none (takeaway 1).
(Training is that of figure 4 to the bit, as evaluations have samples of their own. Sharpness is the explanation where the lead under
greedy evaluations is less than a third of figure 4's; where it is two thirds and more, it is not.)

Here: none beats group-level where evaluations are greedy: excluded (less than 0.007), +0.002 [-0.002, +0.007];
none leaves less entropy (nats): seen, +0.019 [+0.014, +0.024].

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch lite_ppo.py --norm none --loss_agg seq_mean --data easy --eval_top_k 1 --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data easy --eval_top_k 1 --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm none --loss_agg seq_mean --data easy,medium,hard --eval_top_k 1 --prompts_per_step 32 --group_size 4 --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data easy,medium,hard --eval_top_k 1 --prompts_per_step 32 --group_size 4 --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm none --loss_agg seq_mean --model data/tiny/aligned --data medium --eval_top_k 1 --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data medium --eval_top_k 1 --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
"""

import sys

from claims import Claim
from figure import main
from panels import comparison, entitle
from table import Table

SIZES = "4B", "8B"
METRICS = ["rollout/entropy"]
CLAIMS = [
    Claim("none beats group-level where evaluations are greedy", "norm", "none", "group_mean_group_std"),
    Claim(
        "none leaves less entropy (nats)",
        "norm",
        "group_mean_group_std",
        "none",
        metric="rollout/entropy",
        measure="end",
    ),
]


def draw(rows):
    table = Table(rows)
    figure = comparison(table, "norm", METRICS)
    entitle(figure, table, "Group-level or no normalization, greedy evaluations", CLAIMS)
    return figure


if __name__ == "__main__":
    main(sys.modules[__name__])
