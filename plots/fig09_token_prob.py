"""Figure 9 (and 20): how probable are the sampled tokens?

Question: what share of the sampled tokens had a probability of 0.99 or more, 0.95 to 0.99, ...; base and aligned, upper clip 0.20 and 0.28?
Paper: in aligned models far fewer tokens are near certain, and fewer under 0.28, so that there is more for Clip-Higher to act on.
(Over all steps of a run; the paper says "initial stage".)
(The clip figures take 128 updates of 8 responses on a rollout of 1,024, where the bounds clip most with training still stable: LOG.md.
The probabilities are those of sampling: on a node of what top_p and top_k leave.)

Here: base has more near-certain tokens: seen, +0.293 [+0.285, +0.301];
0.28 leaves fewer of them: excluded (less than 0.004), -0.000 [-0.005, +0.004].

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data medium --clip_high 0.2 --prompts_per_step 128 --minibatches 128 --lr 1e-4 --steps 30 --eval_every 5
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data medium --clip_high 0.28 --prompts_per_step 128 --minibatches 128 --lr 1e-4 --steps 30 --eval_every 5
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data medium --clip_high 0.2 --prompts_per_step 128 --minibatches 128 --lr 1e-4 --steps 30 --eval_every 5
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data medium --clip_high 0.28 --prompts_per_step 128 --minibatches 128 --lr 1e-4 --steps 30 --eval_every 5
"""

import sys

from claims import Claim
from figure import main
from launch import flags_of, panel
from panels import STYLES, entitle, grid
from table import Table

SIZES = "4B", "8B"
METRICS = [r"rollout/prob_\d+"]
CLAIMS = [
    Claim("base has more near-certain tokens", "kind", "base", "aligned", {}, "rollout/prob_99"),
    Claim("0.28 leaves fewer of them", "clip_high", "0.2", "0.28", {}, "rollout/prob_99"),
]
BINS = {"0": "<.3", "30": ".3-.6", "60": ".6-.85", "85": ".85-.95", "95": ".95-.99", "99": ">=.99"}


def draw(rows):
    table = Table(rows)
    panels = list(dict.fromkeys(map(panel, table.commands)))
    figure, axes = grid(1, len(panels), height=2.8)
    for ax, name in zip(axes[0], panels):
        mine = [c for c in table.commands if panel(c) == name]
        for k, command in enumerate(mine):
            scores = [list(table.value(command, f"rollout/prob_{low}", "area").values()) for low in BINS]
            if not all(scores):
                continue
            means = [100 * sum(s) / len(s) for s in scores]
            label, colour, *_ = STYLES[flags_of(command)["clip_high"]]
            at = [i + (k - (len(mine) - 1) / 2) * 0.4 for i in range(len(BINS))]
            bars = ax.bar(at, means, 0.38, color=colour, label=label, hatch="//" * k, edgecolor="white")
            ax.bar_label(bars, fmt="%.1f", fontsize=7)
        ax.set_xticks(range(len(BINS)), BINS.values(), fontsize=8)
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("probability of a sampled token", fontsize=9)
    axes[0, 0].set_ylabel("sampled tokens (%)", fontsize=9)
    entitle(figure, table, "How probable the sampled tokens were", CLAIMS)
    return figure


if __name__ == "__main__":
    main(sys.modules[__name__])
