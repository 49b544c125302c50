"""CISPO in plain form, for `python tests/by_hand.py`; see cispo.patch."""


def token_losses(response, logp, old_logp, ref_logp, adv, args):
    ratio = (logp - old_logp).exp().clamp(1 - args.clip_low, 1 + args.clip_high)
    return list(-ratio.detach() * adv * logp)
