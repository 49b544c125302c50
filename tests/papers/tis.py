"""Truncated importance sampling in plain form, for `python tests/by_hand.py`; see tis.patch."""

import by_hand


def token_losses(response, logp, old_logp, ref_logp, adv, args):
    losses = by_hand.token_losses(response, logp, old_logp, ref_logp, adv, args)
    factors = [min(2.0, float((old - engine).exp())) for old, engine in zip(old_logp, response.engine_logp)]
    return [loss * factor for loss, factor in zip(losses, factors)]
