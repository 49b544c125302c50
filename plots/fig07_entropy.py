"""Figure 7: does Clip-Higher keep the entropy?

Question: how does the entropy of the policy fall under an upper clip of 0.20 and of 0.28? And under lower ones of 0.10 and 0.30?
Paper: the higher bound slows the fall in aligned models, and changes little in base models (takeaway 4). That the lower clip acts on the entropy too is said by arXiv 2509.26114.
(The clip figures take 128 updates of 8 responses on a rollout of 1,024, where the bounds clip most with training still stable: LOG.md.
The paper does not name its data: medium here, as in figure 8. The entropy is that of the tokens as they were sampled: on a node of what
top_p and top_k leave, where the paper's is of all tokens.)

Here: 0.28 keeps the entropy of the aligned model (nats): not seen (less than 0.043), +0.009 [-0.026, +0.043] of 10 seeds;
the base model's is the same (nats): not seen (less than 0.012), +0.005 [-0.002, +0.012] of 10 seeds;
a lower clip of 0.10 keeps more of it than 0.30 (nats): seen, +0.141 [+0.104, +0.178].

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data medium --clip_high 0.2 --prompts_per_step 128 --minibatches 128 --lr 1e-4 --steps 30 --eval_every 5
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data medium --clip_high 0.28 --prompts_per_step 128 --minibatches 128 --lr 1e-4 --steps 30 --eval_every 5
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data medium --clip_high 0.2 --prompts_per_step 128 --minibatches 128 --lr 1e-4 --steps 30 --eval_every 5
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data medium --clip_high 0.28 --prompts_per_step 128 --minibatches 128 --lr 1e-4 --steps 30 --eval_every 5
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data medium --clip_low 0.1 --prompts_per_step 128 --minibatches 128 --lr 1e-4 --steps 30 --eval_every 5
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data medium --clip_low 0.3 --prompts_per_step 128 --minibatches 128 --lr 1e-4 --steps 30 --eval_every 5
"""

import sys

from claims import Claim
from figure import main
from launch import flags_of
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
        "end",
        takeaway=4,
        small=0.01,
    ),
    Claim(
        "the base model's is the same (nats)",
        "clip_high",
        "0.28",
        "0.2",
        {"kind": "base"},
        "rollout/entropy",
        "end",
        takeaway=4,
        expect="the same",
        small=0.01,  # nats; the curves of the paper's aligned models are 0.03 or more apart
    ),
    Claim(
        "a lower clip of 0.10 keeps more of it than 0.30 (nats)",
        "clip_low",
        "0.1",
        "0.3",
        {"clip_high": "0.2"},
        "rollout/entropy",
        "end",
        between=("0.2",),
    ),
]


def which(command):
    """The clip that a command changes"""
    f = flags_of(command)
    return f["clip_high"] if f["clip_low"] == "0.2" else f"low {f['clip_low']}"


def draw(rows):
    table = Table(rows)
    figure = comparison(table, which, METRICS)
    entitle(figure, table, "Entropy of the sampled tokens under two upper clips", CLAIMS)
    return figure


if __name__ == "__main__":
    main(sys.modules[__name__])
