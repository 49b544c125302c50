"""Figure 15: Lite PPO against GRPO and DAPO

Question: do group mean, batch std and token mean, without a KL, beat GRPO and DAPO's five tricks from a base model?
Paper: yes; Lite PPO rises steadily where the others peak and collapse.
(At equal rollouts: for each, DAPO samples until it has enough groups to train on. GRPO has its own paper's KL, as this paper's is not known.)

Here: Lite PPO beats GRPO: not seen, -0.002 [-0.020, +0.020];
Lite PPO beats DAPO: not seen, -0.020 [-0.043, +0.008];
responses that DAPO sampled for a rollout: 470 (base, easy), 243 (base, hard).

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
METRICS = ["rollout/(accuracy|spent)"]  # only dapo.py says what it spent
CLAIMS = [
    runs.Claim("Lite PPO beats GRPO", "script", "lite_ppo", "grpo", takeaway=9),
    runs.Claim("Lite PPO beats DAPO", "script", "lite_ppo", "dapo", takeaway=9),
]


def found(rows):
    table, spent = runs.Table(rows), []
    for command in table.commands:
        if values := list(table.last(command, "rollout/spent", 500).values()):
            spent.append(f"{sum(values) / len(values):.0f} ({runs.panel(command)})")
    return f"responses that DAPO sampled for a rollout: {', '.join(spent) or 'no runs'}"


def draw(rows):
    table = runs.Table(rows)
    figure = runs.compare(table, "script")
    runs.entitle(figure, table, f"GRPO, DAPO, Lite PPO at equal rollouts; {found(rows)}", CLAIMS)
    return figure


if __name__ == "__main__":
    runs.main(sys.modules[__name__])
