"""Figure 15: Lite PPO against GRPO and DAPO

Question: do group mean, batch std and token mean, without a KL, beat GRPO and DAPO's five tricks from a base model?
Paper: yes; Lite PPO rises steadily where the others peak and collapse.
(At equal training steps: for each, DAPO samples until it has enough groups to train on. GRPO has its own paper's KL, as this paper's is not known.)

Here: Lite PPO beats GRPO: seen, +0.019 [+0.012, +0.026];
Lite PPO beats DAPO: opposite, -0.014 [-0.017, -0.010];
GRPO falls deeper from its best than Lite PPO: excluded (less than 0.005), -0.001 [-0.006, +0.005];
DAPO falls deeper from its best than Lite PPO: excluded (less than 0.005), -0.001 [-0.006, +0.005];
responses that DAPO sampled for a step: 520 (base, easy), 241 (base, hard).

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch grpo.py --data easy --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch dapo.py --data easy --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --data easy --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch grpo.py --data hard --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch dapo.py --data hard --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --data hard --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
"""

import sys

from claims import Claim
from figure import main
from launch import panel
from panels import comparison, entitle
from table import Table

SIZES = "4B", "8B"
METRICS = ["rollout/(accuracy|sampled_responses)"]  # the latter of dapo.py alone
CLAIMS = [
    Claim("Lite PPO beats GRPO", "script", "lite_ppo", "grpo", takeaway=9),
    Claim("Lite PPO beats DAPO", "script", "lite_ppo", "dapo", takeaway=9),
    Claim("GRPO falls deeper from its best than Lite PPO", "script", "grpo", "lite_ppo", measure="drop", takeaway=9),
    Claim("DAPO falls deeper from its best than Lite PPO", "script", "dapo", "lite_ppo", measure="drop", takeaway=9),
]


def found(rows):
    table, sampled = Table(rows), []
    for command in table.commands:
        if values := list(table.value(command, "rollout/sampled_responses", "area").values()):
            sampled.append(f"{sum(values) / len(values):.0f} ({panel(command)})")
    return f"responses that DAPO sampled for a step: {', '.join(sampled) or 'no runs'}"


def draw(rows):
    table = Table(rows)
    figure = comparison(table, "script")
    entitle(figure, table, f"GRPO, DAPO, Lite PPO at equal training steps; {found(rows)}", CLAIMS)
    return figure


if __name__ == "__main__":
    main(sys.modules[__name__])
