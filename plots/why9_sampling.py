"""Why 9: what of DAPO's does dynamic sampling do?

Question: DAPO replaces groups that are all right or all wrong, for which it samples several times as many responses. Does it stand
where it does, against Lite PPO, without that?
Paper: Lite PPO beats DAPO, whose dynamic sampling is one of five tricks (figure 15).
(Then both sample 128 responses a step. Dynamic sampling is the explanation of a lead that is less than a third of figure 15's without
it; where it is two thirds and more, it is not.)

Here: without dynamic sampling DAPO beats Lite PPO: excluded (less than 0.006), -0.001 [-0.008, +0.006].

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch dapo.py --data easy --dynamic_sampling off --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --data easy --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch dapo.py --data hard --dynamic_sampling off --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
    accelerate launch lite_ppo.py --data hard --minibatches 8 --lr 3e-5 --steps 120 --eval_every 20
"""

import sys

from claims import Claim
from figure import main
from panels import comparison, entitle
from table import Table

SIZES = "4B", "8B"
METRICS = ["rollout/accuracy"]
CLAIMS = [Claim("without dynamic sampling DAPO beats Lite PPO", "script", "dapo", "lite_ppo")]


def draw(rows):
    table = Table(rows)
    figure = comparison(table, "script")
    entitle(figure, table, "DAPO without dynamic sampling and Lite PPO, 128 responses a step", CLAIMS)
    return figure


if __name__ == "__main__":
    main(sys.modules[__name__])
