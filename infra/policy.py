"""The model that is trained: its forward pass over a pack, its optimizer, its weights sharded over the processes."""

import inspect
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from infra.processes import ROOT, compute_dtype, device, join_group, use_tf32, world

ADAPTER = "adapter_config.json"  # what makes a folder one of peft's
HEAD_CHUNK = 2048  # tokens whose logits exist at a time: 1.2 GiB in fp32 at Qwen3's vocabulary of 152k


def find(path):
    """As given, or as seen from the repository where it is there, so that the defaults work from every folder."""
    return ROOT / path if (ROOT / path).exists() and not Path(path).exists() else Path(path)


def base_of(model):
    """-> where a model's weights are: of an adapter in a LoRA checkpoint, its base model; a name on the hub as it is"""
    adapter = find(model) / ADAPTER
    return json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else str(find(model))


def load_lm(args, dtype=torch.float32):
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", lambda *_, **__: None)  # a pack needs no mask
    lm = AutoModelForCausalLM.from_pretrained(base_of(args.model), dtype=dtype, attn_implementation="packed")
    if (find(args.model) / ADAPTER).is_file():
        import peft

        lm = peft.PeftModel.from_pretrained(lm, str(find(args.model))).merge_and_unload().requires_grad_(True)
    return lm


def load_policy(args):
    """-> the policy that is trained, with its LoRA adapter where --lora_rank asks for one, sharded"""
    lm = load_lm(args)
    if args.lora_rank:
        import peft

        adapter = peft.LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear")
        lm = peft.get_peft_model(lm, adapter)
    if torch.cuda.is_available():  # a tiny model on a CPU has no activations to speak of
        lm.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return shard(Policy(lm, args.head_dtype), args)


def load_reference(args, model):
    """-> the policy before the first step, called in the same way: a frozen copy; with LoRA the model, adapter off"""
    if not args.lora_rank:
        return shard(Policy(load_lm(args, compute_dtype()), args.head_dtype).requires_grad_(False), args)

    def forward(pack, temperature):
        with model.lm.disable_adapter():
            return model(pack, temperature)

    return forward


def make_optimizer(args, model):
    """AdamW with its moments from the start: what a GPU holds is there at once, and a checkpoint never lacks them."""
    trained, fused = [p for p in model.parameters() if p.requires_grad], torch.cuda.is_available()
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=fused)
    for p in trained:
        step = torch.zeros((), device=device())
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


class Policy(torch.nn.Module):
    """A language model that makes log-probabilities of packs: `logp, entropy = model(pack, temperature)`."""

    replicas = False  # every process has all weights, and adds its gradient to the others' at the last pack alone

    def __init__(self, lm, head_dtype="float32"):
        super().__init__()
        self.lm, self.head_dtype = lm, torch.float32 if head_dtype == "float32" else None  # None: that of the weights

    def forward(self, pack, temperature):
        """-> log-probabilities and entropies (nats) of a pack's trained tokens at this temperature, (T,) in fp32"""
        if self.replicas:
            self.set_requires_gradient_sync(pack.last)
        packing = dict(cu_seq_lens_q=pack.starts, cu_seq_lens_k=pack.starts, position_ids=pack.positions[None])
        packing |= dict(max_length_q=pack.longest, max_length_k=pack.longest)
        h = self.lm.get_decoder()(input_ids=pack.ids[None], use_cache=False, **packing).last_hidden_state
        head = self.lm.get_output_embeddings().weight
        return LogprobEntropy.apply(h[0, pack.select], head, pack.labels, temperature, self.head_dtype or head.dtype)


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
    """Log-probabilities of the labels and entropies, HEAD_CHUNK tokens at a time: no logits outlive their chunk.

    h (T, hidden), weight (V, hidden), labels (T,) -> (T,), (T,) in fp32; products in `dtype`, the softmax in fp32."""

    @staticmethod
    def forward(ctx, h, weight, labels, temperature, dtype):
        ctx.save_for_backward(h, weight, labels)
        ctx.temperature, ctx.dtype = temperature, dtype
        ctx.set_materialize_grads(False)
        w, logp, entropy = weight.to(dtype), *(torch.empty(len(h), device=h.device) for _ in range(2))
        for i in range(0, len(h), HEAD_CHUNK):
            part = slice(i, i + HEAD_CHUNK)
            log_p = log_softmax(h[part].to(dtype), w, temperature)  # (chunk, V)
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
        for i in range(0, len(h), HEAD_CHUNK):
            part = slice(i, i + HEAD_CHUNK)
            x = h[part].to(ctx.dtype)
            log_p = log_softmax(x, w, ctx.temperature)
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


def log_softmax(x, weight, temperature):  # (chunk, hidden), (V, hidden) -> (chunk, V)
    z = F.linear(x, weight).float().div_(temperature)
    return z.sub_(z.logsumexp(-1, keepdim=True))


def shard(model, args):
    """Prepares a Policy for several processes or a GPU, by FSDP2: it computes in bf16 there, keeps and adds up in fp32.

    fsdp: each process keeps its shard of every tensor, a layer is unsharded only while it computes. ddp: the same with
    shards that are the whole. A gradient is the mean over processes. It is torch's own call and works on a CPU too."""
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


@torch.no_grad()
def weights(model):
    """Yields every parameter by its Hugging Face name, unsharded, as the engine computes, with what an adapter adds.

    All processes must go through all of them."""
    lm = model.lm
    for name, p in lm.named_parameters():
        if ".lora_" in name:
            continue
        if name.endswith(".base_layer.weight"):
            p = p + lm.get_submodule(name.removesuffix(".base_layer.weight")).get_delta_weight("default")
        p = p.to(compute_dtype())  # the shard, before it is gathered: half the bytes
        yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), unsharded(p)


def unsharded(p):
    return p.full_tensor() if hasattr(p, "full_tensor") else p
