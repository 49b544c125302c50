"""Figure 7: does Clip-Higher keep the entropy?

Question: how does the entropy of the policy fall under an upper clip of 0.20 and of 0.28?
Paper: the higher bound slows the fall in aligned models, and changes little in base models (takeaway 4).
(The clip figures take 16 updates a rollout at twice the learning rate: the upper bound of 0.20 then cuts 14 of 10,000 tokens, both
bounds 60, where the paper has 30. With 8 updates at 1e-4 it cuts 1, and all bounds give nearly one run.
The entropy is that of the tokens as they were sampled: on a node of what top_p and top_k leave, where the paper's entropy is of all words.)

Here: 0.28 keeps the entropy of the aligned model (nats): open, -0.017 in 3 seeds;
the base model's is the same (nats): open, -0.012 in 3 seeds.

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data medium --clip_high 0.2 --minibatches 16 --lr 2e-4 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data medium --clip_high 0.28 --minibatches 16 --lr 2e-4 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data medium --clip_high 0.2 --minibatches 16 --lr 2e-4 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data medium --clip_high 0.28 --minibatches 16 --lr 2e-4 --steps 40 --eval_every 10
"""

import sys

import runs

SIZES = "4B", "8B"
METRICS = ["rollout/entropy"]
CLAIMS = [
    runs.Claim(
        "0.28 keeps the entropy of the aligned model (nats)",
        "clip_high",
        "0.28",
        "0.2",
        {"kind": "aligned"},
        "rollout/entropy",
        10,
        takeaway=4,
    ),
    runs.Claim(
        "the base model's is the same (nats)",
        "clip_high",
        "0.28",
        "0.2",
        {"kind": "base"},
        "rollout/entropy",
        10,
        takeaway=4,
        expect="the same",
    ),
]


def draw(rows):
    table = runs.Table(rows)
    figure = runs.compare(table, "clip_high", METRICS)
    runs.entitle(figure, table, "Entropy of the sampled tokens under two upper clips", CLAIMS)
    return figure


if __name__ == "__main__":
    runs.main(sys.modules[__name__])
