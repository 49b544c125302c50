"""Figure 15: Lite PPO against GRPO and DAPO

Question: do group mean, batch std and token mean, without a KL, beat GRPO and DAPO's five tricks from a base model?
Paper: yes; Lite PPO rises steadily where the others peak and collapse.

Here: Lite PPO beats GRPO: open, -0.005 in 3 seeds;
Lite PPO beats DAPO: open, -0.022 in 3 seeds.

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch grpo.py --data easy --minibatches 8 --steps 40 --eval_every 10
    accelerate launch dapo.py --data easy --minibatches 8 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --data easy --minibatches 8 --steps 40 --eval_every 10
    accelerate launch grpo.py --data hard --minibatches 8 --steps 40 --eval_every 10
    accelerate launch dapo.py --data hard --minibatches 8 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --data hard --minibatches 8 --steps 40 --eval_every 10
"""

import sys

import runs

SIZES = "4B", "8B"
METRICS = ["rollout/accuracy"]
CLAIMS = [
    runs.Claim("Lite PPO beats GRPO", "script", "lite_ppo", "grpo", takeaway=9),
    runs.Claim("Lite PPO beats DAPO", "script", "lite_ppo", "dapo", takeaway=9),
]


def draw(rows):
    table = runs.Table(rows)
    figure = runs.compare(table, "script")
    runs.entitle(figure, table, "GRPO, DAPO, Lite PPO", CLAIMS)
    return figure


if __name__ == "__main__":
    runs.main(sys.modules[__name__])
