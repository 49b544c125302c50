"""Attention within each sequence of a pack, with what a model asks of it: a sliding window, soft-capping, sinks.

q (1, H, S, D), k and v with H or fewer heads; S tokens of B sequences one after the other, see packs.py."""

import inspect

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def packed_attention(
    module, q, k, v, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None, s_aux=None, **pack
):
    """Causal, as transformers calls it -> (1, S, H, D), None

    sliding_window: tokens that one sees, itself among them; softcap: scores are softcap tanh(score / softcap);
    s_aux (H,): the score of a sink, which takes a share of the softmax and gives nothing"""
    if "cu_seq_lens_q" not in pack:
        raise TypeError("the model does not tell its attention where a sequence begins")
    starts, longest = pack["cu_seq_lens_q"], pack["max_length_q"]
    window = sliding_window if sliding_window and sliding_window < longest else 0
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap or s_aux is not None:
        return by_sequence(q, k, v, starts.tolist(), scaling, window, softcap, s_aux), None
    if q.is_cuda:
        return varlen_attention(q, k, v, starts, longest, scaling, window), None
    lengths = starts.diff()  # (B,); on a CPU: padded to (B, longest) for the attention alone, which is exact
    rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    slots = torch.arange(q.shape[2]) + rows * longest - starts[rows]  # (S,)

    def pad(x):  # (1, H, S, D) -> (B, H, longest, D)
        padded = x.new_zeros(x.shape[1], len(lengths) * longest, x.shape[3]).index_copy(1, slots, x[0])
        return padded.view(x.shape[1], len(lengths), longest, x.shape[3]).transpose(0, 1)

    how = {"attn_mask": visible(longest, window)} if window else {"is_causal": True}
    out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), scale=scaling, enable_gqa=True, **how)
    return out.transpose(1, 2).flatten(0, 1)[slots][None], None


def visible(n, window, device=None):  # -> (n, n) bool: does the token of this row see that of this column?
    back = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)
    return (back >= 0) & (back < (window or n))


def varlen_attention(q, k, v, starts, longest, scaling, window=0):
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (S, H, D)
    shared = {"enable_gqa": True}
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:  # torch 2.11
        shared, k, v = {}, *(x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.contiguous() for x in (q, k, v))
    seen = (window - 1, 0)  # tokens before, none after; -1: every one before
    return varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=seen, **shared)[None]


def by_sequence(q, k, v, starts, scaling, window, softcap, sinks):
    """What no kernel of torch does, written out; the scores (H, n, n) of one sequence exist at a time."""

    def one(q, k, v):  # (H, n, D) each -> (H, n, D)
        scores = (q @ k.transpose(1, 2)).float() * scaling
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        scores = scores.masked_fill(~visible(q.shape[1], window, q.device), -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.float().view(-1, 1, 1).expand(-1, q.shape[1], 1)], -1)
        return scores.softmax(-1)[..., : q.shape[1]].to(v.dtype) @ v

    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    parts = [slice(a, b) for a, b in zip(starts, starts[1:])]
    out = [checkpoint(one, *(x[0, :, part] for x in (q, k, v)), use_reentrant=False) for part in parts]
    return torch.cat(out, 1).transpose(0, 1)[None]
