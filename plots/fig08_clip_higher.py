"""Figure 8: does Clip-Higher help?

Question: an upper clip of 0.28 against 0.20, base and aligned models: which ends higher?
Paper: aligned models gain; base models do not, or are harmed (takeaway 4).
(The clip figures take 128 updates of 8 responses on a rollout of 1,024, where the bounds clip most with training still stable: LOG.md.)

Here: 0.28 helps the aligned model: excluded (less than 0.002), -0.005 [-0.013, +0.002] of 10 seeds;
0.28 does not help the base model: seen, +0.001 [-0.005, +0.007] of 10 seeds.

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data medium --clip_high 0.2 --prompts_per_step 128 --minibatches 128 --lr 1e-4 --steps 30 --eval_every 5
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data medium --clip_high 0.28 --prompts_per_step 128 --minibatches 128 --lr 1e-4 --steps 30 --eval_every 5
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data medium --clip_high 0.2 --prompts_per_step 128 --minibatches 128 --lr 1e-4 --steps 30 --eval_every 5
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data medium --clip_high 0.28 --prompts_per_step 128 --minibatches 128 --lr 1e-4 --steps 30 --eval_every 5
"""

import sys

from claims import Claim
from figure import main
from panels import comparison, entitle
from table import Table

SIZES = "4B", "8B"
METRICS = ["rollout/accuracy", "train/clip_high"]
CLAIMS = [
    Claim("0.28 helps the aligned model", "clip_high", "0.28", "0.2", {"kind": "aligned"}, takeaway=4, small=0.01),
    Claim(
        "0.28 does not help the base model", "clip_high", "0.28", "0.2", {"kind": "base"}, takeaway=4, expect="no more"
    ),
]


def draw(rows):
    table = Table(rows)
    figure = comparison(table, "clip_high", METRICS)
    entitle(figure, table, "Upper clip 0.28 against 0.20", CLAIMS)
    return figure


if __name__ == "__main__":
    main(sys.modules[__name__])
