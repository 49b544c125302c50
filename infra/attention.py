"""Attention within each sequence of a pack, with what a model asks of it: a sliding window, soft-capping, sinks.

q (1, H, S, D), k and v with H or fewer heads; S tokens of B sequences one after the other, see packs.py."""

import inspect

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from infra.packs import gather, spread

SCORE_ROWS = 256  # tokens whose attention is written out at a time: 1.3 GiB with its gradients, 32 heads, 10k tokens
CPU_ROWS = 4  # sequences that are padded to the longest of them, on a CPU


def packed_attention(
    module, q, k, v, _=None, scaling=None, sliding_window=None, softcap=None, s_aux=None, pack=None, **starts
):
    """Causal, as transformers calls it -> (1, S, H, D), None

    sliding_window: tokens that one sees, itself among them; softcap: scores are softcap tanh(score / softcap);
    s_aux (H,): the score of a sink, which takes a share of the softmax and gives nothing; pack: one with prompts of several
    responses, which stand before each of them for attention alone"""
    if "cu_seq_lens_q" not in starts:
        raise TypeError("the model does not tell its attention where a sequence begins")
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    how = starts["cu_seq_lens_q"], starts["max_length_q"], scaling, sliding_window, softcap, s_aux
    if pack is None:
        return attend(q, k, v, *how), None
    return gather(attend(*(spread(x, pack, 2) for x in (q, k, v)), *how), pack, 1), None


def attend(q, k, v, starts, longest, scaling, window, softcap, sinks):
    window = window if window and window < longest else 0
    if softcap or sinks is not None:
        return by_sequence(q, k, v, starts.tolist(), scaling, window, softcap, sinks)
    if q.is_cuda:
        return varlen_attention(q, k, v, starts, longest, scaling, window)
    parts = starts.diff().split(CPU_ROWS)  # of a pack, which has sequences of like length side by side
    ends = [0, *torch.stack([part.sum() for part in parts]).cumsum(0).tolist()]
    xs = [[x[0, :, a:b] for x in (q, k, v)] for a, b in zip(ends, ends[1:])]  # (H, s, D)
    return torch.cat([padded_attention(*x, part, scaling, window) for x, part in zip(xs, parts)])[None]


def padded_attention(q, k, v, lengths, scaling, window):
    """Sequences padded to the longest for the attention alone, which is exact. q (H, s, D), lengths (B,) -> (s, H, D)"""
    longest = int(lengths.max())
    rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    slots = torch.arange(q.shape[1]) + rows * longest - (lengths.cumsum(0) - lengths)[rows]  # (s,)

    def pad(x):  # (H, s, D) -> (B, H, longest, D)
        padded = x.new_zeros(len(x), len(lengths) * longest, x.shape[2]).index_copy(1, slots, x)
        return padded.view(len(x), len(lengths), longest, x.shape[2]).transpose(0, 1)

    how = {"attn_mask": visible(longest, window)} if window and window < longest else {"is_causal": True}
    out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), scale=scaling, enable_gqa=True, **how)
    return out.transpose(1, 2).flatten(0, 1)[slots]


def grouped_attention(module, q, k, v, attention_mask, scaling=None, **how):
    """transformers' sdpa; for one new token a sequence the heads that share keys are rows of one, and no key is copied"""
    if q.shape[2] > 1 or how.get("position_bias") is not None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, q, k, v, attention_mask, scaling=scaling, **how)
    rows = q.view(len(q), k.shape[1], -1, q.shape[3])  # (B, H, 1, D) -> (B, heads of k, H / heads of k, D)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=attention_mask, scale=scaling)
    return out.reshape(len(q), 1, q.shape[1], -1), None


def visible(n, window, rows=None, device=None):
    """-> (rows, n) bool: does each of the last `rows` of n tokens, all unless given, see each of them?"""
    back = torch.arange(n - (rows or n), n, device=device)[:, None] - torch.arange(n, device=device)
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
    """What no kernel of torch does, written out; scores of at most SCORE_ROWS tokens with those before exist at a time."""

    def one(q, k, v):  # (H, m, D), of the last m of n tokens, (H, n, D), (H, n, D) -> (H, m, D)
        scores = (q @ k.transpose(1, 2)).float() * scaling
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        scores = scores.masked_fill(~visible(k.shape[1], window, q.shape[1], q.device), -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.float().view(-1, 1, 1).expand(-1, q.shape[1], 1)], -1)
        return scores.softmax(-1)[..., : k.shape[1]].to(v.dtype) @ v

    k, v = (x[0].repeat_interleave(q.shape[1] // x.shape[1], dim=0) for x in (k, v))
    parts = [(a, i, min(i + SCORE_ROWS, b)) for a, b in zip(starts, starts[1:]) for i in range(a, b, SCORE_ROWS)]
    out = [checkpoint(one, q[0, :, i:j], k[:, a:j], v[:, a:j], use_reentrant=False) for a, i, j in parts]
    return torch.cat(out, 1).transpose(0, 1)[None]
