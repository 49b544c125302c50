"""Packs: sequences one after the other in one row, without padding; what one forward and backward pass sees.

N responses in a batch, prompt by prompt; S tokens in a pack, T of them trained: those of the responses."""

import torch
import torch.nn.functional as F

from infra.processes import all_gather, device, rank, world

COST_OFFSET = 24576  # tokens; a token's work grows with its context n as this + n, in a model of 4B to 8B parameters


@torch.compiler.disable
def spread(x, pack, dim=0):
    """The tokens of a pack in its layout, along this dimension. By slices: their gradients are added in one order, those
    of an index with repeats in any."""
    parts = x.split(pack.pieces, dim)
    return torch.cat([parts[i] for i in pack.layout], dim)


@torch.compiler.disable
def gather(x, pack, dim=0):
    """What stands in the layout, as in a pack: of a prompt that stands there several times the first"""
    parts = x.split([pack.pieces[i] for i in pack.layout], dim)
    first = dict(reversed([*zip(pack.layout, parts)]))
    return torch.cat([first[i] for i in range(len(pack.pieces))], dim)


class Pack:
    """The responses batch[i] of `indices`, after their prompts, a prompt of several responses once.
    Of [7 8] and [9] to [1 2 3], indices 5 and 6:

    ids         (S,)     [1 2 3 7 8 9]      prompts and responses
    positions   (S,)     [0 1 2 3 4 3]
    pieces               [3 2 1]            tokens of each prompt and each response
    layout      (2 B,)   [0 1 0 2]          the pieces of B whole sequences: `spread` makes [1 2 3 7 8 1 2 3 9] of ids, (L,)
    starts      (B + 1,) [0 5 9]            where in the layout each sequence begins, and the end
    select      (T,)     [2 3 7]            where in the layout the hidden state stands that predicts a trained token
    labels      (T,)     [7 8 9]            the trained tokens, EOS among them
    rows        (T,)     [5 5 6]            whose token it is, an index into the batch
    local_rows  (T,)     [0 0 1]            the same, counted from 0 in this pack
    engine_logp (T,)     log-probabilities when they were sampled
    old_logp    (T,)     the same, or the trainer's own from before the first update"""

    def __init__(self, batch, indices):
        prompts, pieces, positions, self.layout = {}, [], [], []
        for prompt, ids in [(tuple(batch[i].problem["prompt_ids"]), batch[i].ids) for i in indices]:
            if prompt not in prompts:
                prompts[prompt] = len(pieces)
                pieces.append(torch.tensor(prompt))
                positions.append(torch.arange(len(prompt)))
            self.layout += [prompts[prompt], len(pieces)]
            pieces.append(ids)
            positions.append(torch.arange(len(ids)) + len(prompt))
        if not pieces:  # an empty pack trains nothing, but takes part
            pieces, positions, self.layout = [torch.arange(1)], [torch.arange(1)], [0]
        self.pieces = [len(piece) for piece in pieces]
        lengths = torch.tensor([self.pieces[i] for i in self.layout]).view(max(1, len(indices)), -1).sum(1)
        self.longest, ends = int(lengths.max()), lengths.cumsum(0)
        self.starts = F.pad(ends, (1, 0)).int().to(device())
        self.ids, self.positions = torch.cat(pieces).to(device()), torch.cat(positions).to(device())
        counts = torch.tensor([len(batch[i].ids) for i in indices], dtype=torch.long)  # trained tokens of each response
        trained = [torch.arange(end - count, end) for end, count in zip(ends, counts)]
        trained = torch.cat([torch.arange(0), *trained]).to(device())
        self.select, self.labels = trained - 1, spread(self.ids, self)[trained]
        self.rows = torch.tensor(indices, dtype=torch.long).repeat_interleave(counts).to(device())
        self.local_rows = torch.arange(len(indices)).repeat_interleave(counts).to(device())
        self.lengths, self.last = lengths.tolist() if indices else [], False  # of a mini-batch's packs on this process
        self.engine_logp = torch.cat([torch.zeros(0), *(batch[i].engine_logp for i in indices)]).to(device())
        self.old_logp = self.engine_logp


def minibatches(batch, in_loss, has_gradient, count, tokens_per_gpu):
    """-> for each of `count` optimizer steps the packs of this process, equally many on every process

    in_loss, has_gradient (N,) bool: is a response in the loss; has it a gradient, so that it needs a pass? A mini-batch
    with nothing in the loss has no packs; one without a gradient has an empty one: a step with a gradient of 0. By cost,
    the most expensive first, a response goes to the least loaded process, there into the first pack with room, which so
    has its longest first."""
    in_loss, has_gradient = in_loss.tolist(), has_gradient.tolist()
    lengths = [len(r.problem["prompt_ids"]) + len(r.ids) for r in batch]
    minis = []
    for part in torch.arange(len(batch)).tensor_split(count):
        load, packs = [0] * world(), [[] for _ in range(world())]
        indices = [i for i in part.tolist() if in_loss[i] and has_gradient[i]]
        for i in sorted(indices, key=lambda i: -lengths[i]):
            r = load.index(min(load))
            load[r] += lengths[i] * (COST_OFFSET + lengths[i])
            for pack in packs[r]:
                if sum(lengths[j] for j in pack) + lengths[i] <= tokens_per_gpu:
                    pack.append(i)
                    break
            else:
                packs[r].append([i])
        most = max([len(p) for p in packs] + [any(in_loss[i] for i in part.tolist())])
        mine = [Pack(batch, pack) for pack in packs[rank()] + [[]] * (most - len(packs[rank()]))]
        for pack in mine[-1:]:
            pack.last = True
        minis.append(mine)
    return minis


def per_response(packs, values, count):
    """-> (count,): `values` summed over the tokens of each response of a batch of `count`, whichever process has it

    packs: those of this process; values: one (T,) for each. All processes must call it; it passes no gradient on."""
    total = torch.zeros(count, device=device())
    for pack, value in zip(packs, values, strict=True):
        total.index_add_(0, pack.rows, value.detach().to(total.dtype))
    return torch.stack(all_gather(total.cpu())).sum(0).to(device())
