"""Is this model trained right? Tried on the model itself, before a run samples or writes anything."""

import torch

from infra.engines import Response
from infra.packs import Pack
from infra.policy import plain_attention
from infra.processes import compute_dtype, fail, refused

NATS = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # mean difference; healthy: 1e-6 and about 0.01, a wrong model 0.2
PAST = 64  # tokens of the longest sequence past a model's longest window
SHORT = 8  # tokens of the shortest, before any
BOS_NATS = 1.0  # a token; what BOS in front of it gives to a prompt of a model that was trained with it


def self_test(args, model, prompts):
    """Ends the run, with status 2, where a pack does not give what the model's own code gives of a sequence alone, two
    passes of the same weights differ, or a weight that is trained has no gradient. prompts: lists of ids, as text"""
    kind = f"--model {args.model}: {model.lm.config.model_type} cannot be trained here"
    longest = longest_window(model.lm.config, args.max_prompt_len + args.max_response_len)
    pack = make_pack(prompts, [longest, SHORT, max(SHORT, longest - 7)])
    short = make_pack(prompts, [3 * SHORT, SHORT])
    with refused(kind):
        with torch.no_grad():
            packed, _ = model(pack, args.temperature)
            first, _ = model(short, args.temperature)
        second, entropy = model(short, args.temperature)
        (second.sum() + entropy.sum()).backward()
        untrained = [name for name, p in model.lm.named_parameters() if p.requires_grad and p.grad is None]
        model.zero_grad(set_to_none=True)
        ours = model.lm.config._attn_implementation
        with torch.no_grad():
            model.lm.set_attn_implementation(plain_attention(model.lm))
            alone, _ = model(pack, args.temperature, alone=True)
            model.lm.set_attn_implementation(ours)
    gaps = {
        "two passes of the same weights differ": first - second.detach(),
        "log-probabilities of packed sequences differ from the model's own of one alone": packed - alone,
    }
    for what, gap in gaps.items():
        gap = float(gap.abs().mean())
        if not gap <= NATS[compute_dtype()]:  # nor are they equal when they are no numbers
            fail(f"{kind}: {what}, by {gap:.2g} nats in the mean; give another model")
    if untrained:
        fail(f"{kind}: {len(untrained)} of its weights have no gradient, {untrained[0]} first; give another model")


def longest_window(config, limit):
    """-> tokens of a sequence that passes every length at which the model changes, as far as a run's sequences go"""
    text, rope = config.get_text_config(), getattr(config.get_text_config(), "rope_parameters", None) or {}
    found = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    for values in [rope, *(values for values in rope.values() if isinstance(values, dict))]:
        found += [values.get("original_max_position_embeddings")]
    lengths = [n for n in (*found, getattr(text, "original_max_position_embeddings", None)) if isinstance(n, int)]
    return max(SHORT, min(limit, max([n for n in lengths if n < limit], default=0) + PAST))


@torch.no_grad()
def check_bos(args, model, tokenizer, prompts):
    """Ends the run, with status 2, where prompts lack the BOS that their model was trained with: its responses would be
    nonsense, as Gemma's are. Evidence is how probable prompts are with and without: many a configuration names a token
    that its model has never seen."""
    known = {tokenizer.bos_token_id, model.lm.config.get_text_config().bos_token_id} - {None}
    for bos in sorted(i for i in known if i < model.lm.get_input_embeddings().num_embeddings):
        some = [p[: PAST + SHORT] for p in prompts if len(p) > SHORT and p[0] != bos][:SHORT]
        packs = pack_of(some, SHORT), pack_of([[bos, *p] for p in some], SHORT + 1)
        without, after = (float(model(pack, 1.0)[0].mean()) for pack in packs)
        if after - without > BOS_NATS:
            what = f"{tokenizer.decode([bos])} is not in front of its prompts. Each token is {after - without:.1f} nats"
            fail(f"--model {args.model}: {what} more probable after it; give a tokenizer that adds it")


def make_pack(prompts, lengths):
    """-> a Pack of sequences of these lengths, that begin alike; all tokens after the beginning are trained"""
    text = [token for prompt in prompts for token in prompt]
    text = text * (1 + max(lengths) * len(lengths) // len(text))
    return pack_of([text[:2] + text[sum(lengths[:i]) :][: n - 2] for i, n in enumerate(lengths)], 2)


def pack_of(sequences, first):
    """-> a Pack of these lists of ids, of which the tokens from `first` on are trained"""
    parts = [({"prompt_ids": ids[:first]}, torch.tensor(ids[first:])) for ids in sequences]
    batch = [Response(problem, ids, torch.zeros(len(ids)), False, "") for problem, ids in parts]
    pack = Pack(batch, range(len(batch)))
    pack.last = True
    return pack
