"""A reward for the format in plain form, for `python tests/by_hand.py`; see format.patch."""

import re

import by_hand


def reward(response, old_logp, ref_logp, args):
    boxed = re.search(r"\\boxed\{[^}]*\}", response.text)
    return by_hand.reward(response, old_logp, ref_logp, args) + (0.1 if boxed else 0)
