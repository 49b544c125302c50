"""Figure 1: do two tricks suffice?

Question: GRPO, DAPO with its five tricks, Lite PPO with two: which ends highest on the mean of the six evaluation sets?
Paper: Lite PPO; complexity is not needed.
(At equal training steps, for which DAPO samples more: figure 15.)

Here: Lite PPO beats GRPO: seen, +0.019 [+0.012, +0.026];
Lite PPO beats DAPO: opposite, -0.014 [-0.017, -0.010].

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
from launch import flags_of, panel
from panels import NAMES, entitle, grid, line
from table import SCORE, Table

SIZES = "4B", "8B"
METRICS = []
CLAIMS = [
    Claim("Lite PPO beats GRPO", "script", "lite_ppo", "grpo"),
    Claim("Lite PPO beats DAPO", "script", "lite_ppo", "dapo"),
]


def draw(rows):
    table = Table(rows)
    panels = list(dict.fromkeys(map(panel, table.commands)))
    figure, axes = grid(1, len(panels), height=2.8)
    for ax, name in zip(axes[0], panels):
        for command in table.commands:
            if panel(command) == name:
                line(ax, table, command, flags_of(command)["script"], SCORE, smoothed=False)
        ax.set_title(f"{name} (bands: ± s.d. over seeds)", fontsize=9)
        ax.set_xlabel("training steps", fontsize=9)
    axes[0, 0].set_ylabel(NAMES[SCORE], fontsize=9)
    entitle(figure, table, "Two tricks against five, and against GRPO", CLAIMS)
    return figure


if __name__ == "__main__":
    main(sys.modules[__name__])
