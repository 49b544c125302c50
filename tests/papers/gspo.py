"""GSPO in plain form, for `python tests/by_hand.py`; see gspo.patch."""

import torch


def token_losses(response, logp, old_logp, ref_logp, adv, args):  # one ratio for all tokens, their geometric mean
    ratio = torch.exp(sum(logp - old_logp) / len(response.ids))
    clipped = min(max(ratio, torch.tensor(1 - args.clip_low)), torch.tensor(1 + args.clip_high))
    return [-min(ratio * adv, clipped * adv)] * len(response.ids)
