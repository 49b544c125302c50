"""Figure 1: do two tricks suffice?

Question: GRPO, DAPO with its five tricks, Lite PPO with two: which ends highest on the mean of the six evaluation sets?
Paper: Lite PPO; complexity is not needed.
(At equal rollouts, for which DAPO samples more: figure 15.)

Here: Lite PPO beats GRPO: not seen, -0.002 [-0.020, +0.020];
Lite PPO beats DAPO: not seen, -0.020 [-0.043, +0.008].

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
METRICS = []
CLAIMS = [
    runs.Claim("Lite PPO beats GRPO", "script", "lite_ppo", "grpo"),
    runs.Claim("Lite PPO beats DAPO", "script", "lite_ppo", "dapo"),
]


def draw(rows):
    table = runs.Table(rows)
    panels = list(dict.fromkeys(map(runs.panel, table.commands)))
    figure, axes = runs.grid(1, len(panels), height=2.8)
    for ax, name in zip(axes[0], panels):
        for command in table.commands:
            if runs.panel(command) == name:
                runs.line(ax, table, command, runs.flags(command)["script"], runs.SCORE, smoothed=False)
        ax.set_title(f"{name} (bands: ± s.d. over seeds)", fontsize=9)
        ax.set_xlabel("rollouts trained on", fontsize=9)
    axes[0, 0].set_ylabel(runs.NAMES[runs.SCORE], fontsize=9)
    runs.entitle(figure, table, "Two tricks against five, and against GRPO", CLAIMS)
    return figure


if __name__ == "__main__":
    runs.main(sys.modules[__name__])
