"""The model that is trained: its packs, its forward pass, its weights over several processes and GPUs.

A script computes on small tensors of the whole batch, which every process holds. What is heavy is shared out here:
`minibatches` gives each process its packs, `shard` its part of the weights, and `spread` its part of any list.

N responses in a batch, prompt by prompt; S tokens in a pack, T of them trained (those of the responses).
"""

import contextlib
import datetime
import functools
import inspect
import json
import os
import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import plan

# accelerate, transformers, peft, vllm and torch's tools for several processes are imported where they are used: the laptop
# scale first switches their hub off, a wrong flag is answered in a second or two, and a machine without vLLM needs none.

ROOT = Path(__file__).parent
ADAPTER = "adapter_config.json"  # what makes a folder one of peft's
PATIENCE = datetime.timedelta(hours=2)  # of one process with another, which may sample for long
CPU_THREADS = 8  # at most, for all processes together; a tiny model has no work for more

# --------------------------------------------------------------------------------------------------- processes, devices


def rank():
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world():
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


@functools.cache
def host_group():
    """The processes again, over the machine's memory: on a GPU what they tell each other would need room there."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def all_gather(thing):
    """-> the list of every process's `thing`, in rank order"""
    things = [thing] * world()
    if world() > 1:
        dist.all_gather_object(things, thing, group=host_group() if torch.cuda.is_available() else None)
    return things


def in_turn(shares):
    """Lists that were shared out as [i :: len(shares)] -> the whole list"""
    return [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]


def spread(function, items):
    """function(items), which gives a list as long, each process doing its part; the same list on all"""
    return in_turn(all_gather(function(items[rank() :: world()])))


def barrier():
    if world() > 1:
        dist.barrier()


def join_group():
    """A process group of this process alone where nothing launched several: vLLM and FSDP2 want one."""
    if not dist.is_initialized():
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
        os.environ.update({name: str(value) for name, value in alone.items()})  # vLLM reads them
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def use_cores():
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # Linux; elsewhere
        torch.set_num_threads(max(1, min(CPU_THREADS, cores) // world()))  # accelerate launch says 1


def use_tf32():
    """Products of fp32 on a GPU: exact where both sides were rounded to bf16, as in the output layer."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")


def device():
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype():
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


@contextlib.contextmanager
def own_rng():
    """Puts the random generators of this process back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


# ------------------------------------------------------------------------------------------------------------ the model


def find(path):
    """As given, or as seen from the repository where it is there, so that the defaults work from every folder."""
    return ROOT / path if (ROOT / path).exists() and not Path(path).exists() else Path(path)


def base_of(model):
    """Where a model stands or, of an adapter in a checkpoint of LoRA, the model it belongs to; a name on the hub as it is"""
    adapter = find(model) / ADAPTER
    return json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else str(find(model))


def load_lm(args, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(base_of(args.model), dtype=dtype, attn_implementation="packed")
    if (find(args.model) / ADAPTER).is_file():
        import peft

        lm = peft.PeftModel.from_pretrained(lm, str(find(args.model))).merge_and_unload().requires_grad_(True)
    return lm


def add_adapter(lm, args):
    import peft

    adapter = peft.LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear")
    return peft.get_peft_model(lm, adapter)


def register_attention():
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", lambda *_, **__: None)  # a pack needs no mask


def packed_attention(module, q, k, v, mask, scaling=None, dropout=0.0, *, cu_seq_lens_q, max_length_q, **_):
    """Causal attention within each sequence of a pack. q (1, H, S, D), k and v with H or fewer heads -> (1, S, H, D)"""
    if q.is_cuda:
        return varlen_attention(q, k, v, cu_seq_lens_q, max_length_q, scaling), None
    lengths = cu_seq_lens_q.diff()  # (B,); on a CPU: padded to (B, longest) for the attention alone, which is exact
    rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    slots = torch.arange(q.shape[2]) + rows * max_length_q - cu_seq_lens_q[rows]  # (S,)

    def pad(x):  # (1, H, S, D) -> (B, H, longest, D)
        padded = x.new_zeros(x.shape[1], len(lengths) * max_length_q, x.shape[3]).index_copy(1, slots, x[0])
        return padded.view(x.shape[1], len(lengths), max_length_q, x.shape[3]).transpose(0, 1)

    out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)[slots][None], None


def varlen_attention(q, k, v, starts, longest, scaling):
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (S, H, D)
    shared = {"enable_gqa": True}
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:  # torch 2.11
        shared, k, v = {}, *(x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.contiguous() for x in (q, k, v))
    causal = (-1, 0)  # every token before, none after
    return varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=causal, **shared)[None]


class LogprobEntropy(torch.autograd.Function):
    """Log-probabilities of the labels and entropies, plan.HEAD_CHUNK tokens at a time: no logits outlive their chunk.

    h (T, hidden), weight (V, hidden), labels (T,) -> (T,), (T,) in fp32; the products are in `dtype`, the softmax is in fp32.
    """

    @staticmethod
    def forward(ctx, h, weight, labels, temperature, dtype):
        ctx.save_for_backward(h, weight, labels)
        ctx.temperature, ctx.dtype = temperature, dtype
        ctx.set_materialize_grads(False)
        w, logp, entropy = weight.to(dtype), *(torch.empty(len(h), device=h.device) for _ in range(2))
        for part in chunks(h):
            log_p = words_logp(h[part].to(dtype), w, temperature)  # (chunk, V)
            logp[part] = log_p.gather(1, labels[part, None])[:, 0]
            entropy[part] = -log_p.exp().mul_(log_p).sum(-1)
            del log_p  # before the next ones are made
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        h, weight, labels = ctx.saved_tensors
        w = weight.to(ctx.dtype)
        grad_logp = torch.zeros(len(h), device=h.device) if grad_logp is None else grad_logp
        grad_h = torch.empty_like(h)
        grad_w = torch.zeros_like(w, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for part in chunks(h):
            x = h[part].to(ctx.dtype)
            log_p = words_logp(x, w, ctx.temperature)
            grad = log_p.exp()  # p (chunk, V), then the gradient of the loss by the logits
            if grad_entropy is not None:  # of H = - sum p log p: - p (log p + H)
                slope = (grad * log_p).sum(-1, keepdim=True) - log_p
                grad *= slope.mul_(grad_entropy[part, None]).sub_(grad_logp[part, None])
            else:
                grad *= -grad_logp[part, None]
            grad.scatter_add_(1, labels[part, None], grad_logp[part, None])  # of log p_y: onehot - p
            grad = grad.div_(ctx.temperature).to(ctx.dtype)
            grad_h[part] = grad @ w
            if grad_w is not None:
                grad_w += grad.T @ x
            del log_p, grad
        return grad_h, None if grad_w is None else grad_w.to(weight.dtype), None, None, None


def chunks(h):
    return [slice(i, i + plan.HEAD_CHUNK) for i in range(0, len(h), plan.HEAD_CHUNK)]


def words_logp(x, weight, temperature):  # (chunk, hidden), (V, hidden) -> (chunk, V)
    z = F.linear(x, weight).float().div_(temperature)
    return z.sub_(z.logsumexp(-1, keepdim=True))


class LogprobHead(torch.nn.Linear):
    """A language model's output layer that, given labels, returns log-probabilities and entropies instead of logits."""

    dtype = torch.float32  # of the product; None: that of the weights

    def forward(self, h, labels=None, temperature=1.0):  # (T, hidden), (T,) -> (T,), (T,)
        if labels is None:
            return super().forward(h)
        return LogprobEntropy.apply(h, self.weight, labels, temperature, self.dtype or self.weight.dtype)


class Policy(torch.nn.Module):
    """The language model that is trained. Its forward takes what a pack holds and returns log-probabilities."""

    replicas = False  # every process has all weights, and adds its gradient to the others' at the last pack alone

    def __init__(self, lm, head_dtype="float32"):
        super().__init__()
        self.lm = lm
        head = lm.get_output_embeddings()
        head.__class__ = LogprobHead  # the same weights, still tied, still a Linear
        head.dtype = torch.float32 if head_dtype == "float32" else None

    def forward(self, ids, positions, starts, longest, select, labels, temperature):  # -> (T,), (T,)
        packing = dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=longest, max_length_k=longest)
        body, head = self.lm.get_decoder(), self.lm.get_output_embeddings()
        h = body(input_ids=ids[None], position_ids=positions[None], use_cache=False, **packing).last_hidden_state
        return head(h[0, select], labels, temperature)


def reference(args, model):
    """-> the policy as it is before the first step, for `logprobs`: a frozen copy, or with LoRA the same model, adapter off"""
    if not args.lora_rank:
        frozen = Policy(load_lm(args, compute_dtype()), args.head_dtype).requires_grad_(False)
        return shard(frozen, args)

    def forward(*pack):
        with model.lm.disable_adapter():
            return model(*pack)

    return forward


def shard(model, args):
    """Prepares a Policy for several processes or a GPU, by FSDP2: it computes in bf16 there, keeps and adds up in fp32.

    fsdp: each process keeps its part of every tensor, and has a layer whole only while it computes with it. ddp: the same
    with parts that are the whole. A gradient is the mean over processes. It is torch's own call, which works on a CPU too.
    """
    blocks = [m for m in model.modules() if type(m).__name__ in model.lm._no_split_modules]
    for block in blocks if args.compile == "on" else []:
        block.compile(dynamic=True)
    if world() == 1 and not torch.cuda.is_available():
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    join_group()
    use_tf32()
    model.replicas = args.sharding == "ddp"
    sizes, names = ((world(), 1), ("replicate", "shard")) if model.replicas else ((world(),), ("shard",))
    mesh = init_device_mesh(device().type, sizes, mesh_dim_names=names)
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype(), reduce_dtype=torch.float32)
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    return model


def adam(args, trained):
    """AdamW with its two averages from the start: what a GPU holds is there at once, and a checkpoint never lacks them."""
    fused = torch.cuda.is_available()
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=fused)
    for p in trained:
        step = torch.zeros((), device=device())
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


@torch.no_grad()
def weights(model):
    """Every parameter by its Hugging Face name, one at a time, whole, as the engine computes. All processes must go through all.

    With LoRA what the adapter adds is in it; the weights themselves stay as they are.
    """
    lm = model.lm
    for name, p in lm.named_parameters():
        if ".lora_" in name:
            continue
        if name.endswith(".base_layer.weight"):
            p = p + lm.get_submodule(name.removesuffix(".base_layer.weight")).get_delta_weight("default")
        p = p.to(compute_dtype())  # the shard, before it is gathered: half the bytes
        yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), gathered(p)


def gathered(p):
    """A tensor that may be shared out over processes, whole"""
    return p.full_tensor() if hasattr(p, "full_tensor") else p


# ---------------------------------------------------------------------------------------------------------------- packs


class Pack:
    """Sequences one after the other in one row, without padding: what one forward pass sees. `rows`: which responses.

    ids, positions (S,): prompts and responses. select (T,): where in S the hidden state stands that predicts a trained
    token; labels (T,): the token; rows (T,): its response, an index into the batch; engine_logp (T,): its
    log-probability when it was sampled; old_logp (T,): the same, or what the trainer sets before the first update.
    """

    def __init__(self, batch, rows):
        sequences = [torch.cat([torch.tensor(batch[i].problem["prompt_ids"]), batch[i].ids]) for i in rows]
        sequences = sequences or [torch.zeros(1, dtype=torch.long)]  # an empty pack trains nothing, but takes part
        lengths = torch.tensor([len(s) for s in sequences])
        self.longest, ends = int(lengths.max()), lengths.cumsum(0)
        self.starts = F.pad(ends, (1, 0)).int().to(device())  # (B + 1,), each sequence's first token, and the end
        self.ids = torch.cat(sequences).to(device())
        self.positions = torch.cat([torch.arange(n) for n in lengths]).to(device())
        counts = torch.tensor([len(batch[i].ids) for i in rows], dtype=torch.long)  # trained tokens of each response
        trained = [torch.arange(end - count, end) for end, count in zip(ends, counts)]
        trained = torch.cat([torch.arange(0), *trained]).to(device())
        self.select, self.labels = trained - 1, self.ids[trained]
        self.rows = torch.tensor(rows, dtype=torch.long).repeat_interleave(counts).to(device())
        self.lengths, self.last = lengths.tolist() if rows else [], False  # of a mini-batch's packs on this process
        self.engine_logp = torch.cat([torch.zeros(0), *(batch[i].engine_logp for i in rows)]).to(device())
        self.old_logp = self.engine_logp


def minibatches(batch, counted, learned, count, tokens_per_gpu):
    """-> for each of `count` optimizer steps the packs of this process, equally many on every process.

    counted, learned (N,) bool: what is in the loss; what of it has a gradient, so that it needs a pass. Mini-batches are
    stretches of the batch like torch's tensor_split. Within one, responses go to processes by cost, the dearest first to the
    least loaded, and into the first pack with room. Every process works out the whole plan, from the lengths. A mini-batch in
    which nothing is counted has no packs; one in which nothing is learned has an empty one: a step with a gradient of 0.
    """
    counted, learned = counted.tolist(), learned.tolist()
    lengths = [len(r.problem["prompt_ids"]) + len(r.ids) for r in batch]
    minis = []
    for part in torch.arange(len(batch)).tensor_split(count):
        load, packs = [0] * world(), [[] for _ in range(world())]
        rows = [i for i in part.tolist() if counted[i] and learned[i]]
        for i in sorted(rows, key=lambda i: -lengths[i]):
            r = load.index(min(load))
            load[r] += lengths[i] * (24576 + lengths[i])  # a token's work grows with its context; 24576: a 4B-8B model
            for pack in packs[r]:
                if sum(lengths[j] for j in pack) + lengths[i] <= tokens_per_gpu:
                    pack.append(i)
                    break
            else:
                packs[r].append([i])
        most = max([len(p) for p in packs] + [any(counted[i] for i in part.tolist())])
        mine = [Pack(batch, sorted(pack)) for pack in packs[rank()] + [[]] * (most - len(packs[rank()]))]
        for pack in mine[-1:]:
            pack.last = True
        minis.append(mine)
    return minis


def logprobs(model, pack, temperature):
    """-> log-probabilities and entropies (nats) of a pack's trained tokens at this temperature, both (T,) in fp32"""
    if getattr(model, "replicas", False):
        model.set_requires_gradient_sync(pack.last)
    return model(pack.ids, pack.positions, pack.starts, pack.longest, pack.select, pack.labels, temperature)
