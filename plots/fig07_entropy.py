"""Figure 7: does Clip-Higher keep the entropy?

Question: how does the entropy of the policy fall under an upper clip of 0.20 and of 0.28?
Paper: the higher bound slows the fall in aligned models, and changes little in base models (takeaway 4).
(The clip figures take 16 updates a step at 2e-4, where the bounds clip enough to matter, and training is unstable: LOG.md.
The paper does not name its data: medium here, as in figure 8. The entropy is that of the tokens as they were sampled: on a node of what
top_p and top_k leave, where the paper's is of all tokens.)

Here: 0.28 keeps the entropy of the aligned model (nats): opposite, -0.020 [-0.027, -0.011];
the base model's is the same (nats): not seen, -0.001 [-0.015, +0.020].

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data medium --clip_high 0.2 --minibatches 16 --lr 2e-4 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data medium --clip_high 0.28 --minibatches 16 --lr 2e-4 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data medium --clip_high 0.2 --minibatches 16 --lr 2e-4 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data medium --clip_high 0.28 --minibatches 16 --lr 2e-4 --steps 40 --eval_every 10
"""

import sys

from claims import Claim
from figure import main
from panels import comparison, entitle
from table import Table

SIZES = "4B", "8B"
METRICS = ["rollout/entropy"]
CLAIMS = [
    Claim(
        "0.28 keeps the entropy of the aligned model (nats)",
        "clip_high",
        "0.28",
        "0.2",
        {"kind": "aligned"},
        "rollout/entropy",
        10,
        takeaway=4,
    ),
    Claim(
        "the base model's is the same (nats)",
        "clip_high",
        "0.28",
        "0.2",
        {"kind": "base"},
        "rollout/entropy",
        10,
        takeaway=4,
        expect="the same",
        small=0.01,  # nats, a tenth of what is left of the entropy
    ),
]


def draw(rows):
    table = Table(rows)
    figure = comparison(table, "clip_high", METRICS)
    entitle(figure, table, "Entropy of the sampled tokens under two upper clips", CLAIMS)
    return figure


if __name__ == "__main__":
    main(sys.modules[__name__])
