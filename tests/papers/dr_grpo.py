"""Dr. GRPO in plain form, for `python tests/by_hand.py`; see dr_grpo.patch."""

import statistics

import torch


def advantages(rewards, args):
    return [[r - statistics.mean(group) for r in group] for group in rewards]


def weight(response, counted, args):
    return 1 / len(counted) / args.max_response_len


def token_losses(response, logp, old_logp, ref_logp, adv, args):
    ratio = (logp - old_logp).exp()
    return list(-torch.minimum(ratio * adv, ratio.clamp(1 - args.clip_low, 1 + args.clip_high) * adv))
