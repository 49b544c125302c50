"""Why 8: does the overlong filter teach worse answers, or longer ones?

Question: under a short limit, leaving truncated responses out of the loss takes away the pressure to be short. Evaluations have the
same limit, where a longer answer is a wrong one. How do the two policies compare where evaluations have the long limit?
Paper: under a short limit the filter helps (takeaway 8).
(Training is that of figure 13 to the bit. Longer answers are the explanation where, evaluated with the long limit, the filter is not
behind: an interval of the difference that ends above 0. Where it is behind by two thirds of figure 13's difference and more, it
teaches worse ones.)

Here: evaluated with the long limit, the filter helps the base model: excluded (less than -0.014), -0.024 [-0.034, -0.014];
evaluated with the long limit, it helps the aligned model: excluded (less than -0.001), -0.008 [-0.016, -0.001].

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 56 --eval_max_response_len 192 --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --data hard --max_response_len 56 --eval_max_response_len 192 --overlong filter --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data hard --max_response_len 56 --eval_max_response_len 192 --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data hard --max_response_len 56 --eval_max_response_len 192 --overlong filter --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
"""

import sys

from claims import Claim
from figure import main
from panels import comparison, entitle
from table import Table

SIZES = ("8B",)
METRICS = ["rollout/response_len"]
BASE, ALIGNED = {"kind": "base"}, {"kind": "aligned"}
CLAIMS = [
    Claim("evaluated with the long limit, the filter helps the base model", "overlong", "filter", "keep", BASE),
    Claim(
        "evaluated with the long limit, it helps the aligned model", "overlong", "filter", "keep", ALIGNED, small=0.01
    ),
]


def draw(rows):
    table = Table(rows)
    figure = comparison(table, "overlong", METRICS)
    entitle(figure, table, "The overlong filter, trained with the short limit and evaluated with the long one", CLAIMS)
    return figure


if __name__ == "__main__":
    main(sys.modules[__name__])
