"""RLOO in plain form, for `python tests/by_hand.py`; see rloo.patch."""

import by_hand
import torch


def reward(response, old_logp, ref_logp, args):
    return by_hand.reward(response, old_logp, ref_logp, args) - args.kl_coef * float(sum(old_logp - ref_logp))


def advantages(rewards, args):  # less the mean of the others of the group
    return [[r - (sum(group) - r) / (len(group) - 1) for r in group] for group in rewards]


def token_losses(response, logp, old_logp, ref_logp, adv, args):  # one ratio, the product of the tokens'
    ratio = torch.exp(sum(logp - old_logp))
    clipped = min(max(ratio, torch.tensor(1 - args.clip_low)), torch.tensor(1 + args.clip_high))
    return [-min(ratio * adv, clipped * adv)] * len(response.ids)
