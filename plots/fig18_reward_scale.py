"""Figure 18: rewards 1 and 0, or 1 and -1?

Question: does batch-level normalization need the larger scale of rewards?
Paper: it does; 1 and -1 repair it (takeaway 1).
(Mean and std of the batch undo any scale: (2 r - 1) has the advantages of r, but for the 1e-6 added to the std. So the two curves of
batch-level normalization differ by rounding alone. Without normalization the scale matters, and is shown beside it.)

Here: 1/-1 helps batch-level normalization: excluded (less than 0.000), +0.000 [-0.000, +0.000];
1/-1 helps without normalization: excluded (less than -0.002), -0.011 [-0.020, -0.002].

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch lite_ppo.py --norm batch_mean_batch_std --loss_agg seq_mean --data easy --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm batch_mean_batch_std --loss_agg seq_mean --data easy --wrong_reward -1 --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm none --loss_agg seq_mean --data easy --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm none --loss_agg seq_mean --data easy --wrong_reward -1 --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
"""

import sys

from claims import Claim
from figure import main
from launch import flags_of, panel
from panels import STYLES, comparison, entitle
from table import Table

SIZES = ("8B",)
METRICS = ["rollout/accuracy"]
CLAIMS = [
    Claim(
        "1/-1 helps batch-level normalization",
        "wrong_reward",
        "-1",
        "0",
        {"norm": "batch_mean_batch_std"},
        takeaway=1,
        small=0.01,
    ),
    Claim("1/-1 helps without normalization", "wrong_reward", "-1", "0", {"norm": "none"}),
]


def norm(command):
    return f"{panel(command)}\n{STYLES[flags_of(command)['norm']][0]}"


def draw(rows):
    table = Table(rows)
    figure = comparison(table, "wrong_reward", METRICS, key=norm)
    entitle(figure, table, "The reward of a wrong answer: 0 or -1", CLAIMS)
    return figure


if __name__ == "__main__":
    main(sys.modules[__name__])
