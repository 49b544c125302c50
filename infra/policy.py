"""The model that is trained: its forward pass over a pack, its optimizer, its weights sharded over the processes."""

import json
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from infra.attention import packed_attention
from infra.packs import spread
from infra.processes import ROOT, compute_dtype, device, fail, join_group, use_tf32, world

ADAPTER = "adapter_config.json"  # what makes a folder one of peft's
HEAD_CHUNK = 2048  # tokens whose logits exist at a time: 1.2 GiB in fp32 at Qwen3's vocabulary of 152k


def find(path):
    """As given, or as seen from the repository where it is there, so that the defaults work from every folder."""
    return ROOT / path if (ROOT / path).exists() and not Path(path).exists() else Path(path)


def base_of(model):
    """-> where a model's weights are: of an adapter in a LoRA checkpoint, its base model; a name on the hub as it is"""
    adapter = find(model) / ADAPTER
    base = find(json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else model)
    return str(base.resolve() if base.is_dir() else base)  # an adapter keeps it, to be found from any folder


def load_lm(args, dtype=torch.float32):
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", lambda *_, **__: None)  # a pack needs no mask
    how = dict(dtype=dtype, attn_implementation="packed", output_loading_info=True)
    lm, report = AutoModelForCausalLM.from_pretrained(base_of(args.model), **how)
    says = {"missing": "of its weights are in no file", "unexpected": "weights in its files are none of its own"}
    for which in says:
        for name in sorted(report[f"{which}_keys"])[:1]:
            fail(f"--model {args.model}: {len(report[f'{which}_keys'])} {says[which]}, {name} first")
    if (find(args.model) / ADAPTER).is_file():
        import peft

        warnings.filterwarnings("error", "Found missing adapter keys")
        lm = peft.PeftModel.from_pretrained(lm, str(find(args.model))).merge_and_unload().requires_grad_(True)
    if name := next((name for name, p in lm.named_parameters() if not p.sum().isfinite()), None):
        fail(f"--model {args.model}: NaN or infinite weights, in {name} first")
    return lm


def plain_attention(lm):
    """-> transformers' own attention that does all that this model asks for; its sdpa forgets soft-capping"""
    capped = getattr(lm.config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if lm._supports_sdpa and not capped else "eager"


def load_policy(args):
    """-> the policy that is trained, with its LoRA adapter where --lora_rank asks for one, sharded"""
    lm = load_lm(args)
    if args.lora_rank:
        import peft

        adapter = peft.LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear")
        lm = peft.get_peft_model(lm, adapter)
    if torch.cuda.is_available():  # a tiny model on a CPU has no activations to speak of
        checkpoint_activations(lm)
    return shard(Policy(lm, args.head_dtype), args)


def checkpoint_activations(lm):
    """A layer's activations are computed again in its backward pass. Layers do so while they train, and alone they do:
    what is in them stays in evaluation mode, without dropout and a router's noise, and the ratio starts at 1."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in lm.eval().modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True
            vars(layer).update({name: 0.0 for name in vars(layer) if "dropout" in name})  # of a layer's own


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
        self.scale, self.cap = after_head(lm)
        lm.get_decoder().do_not_compile = True  # vLLM marks transformers' classes where it has no code of its own

    def forward(self, pack, temperature, alone=False):
        """-> log-probabilities and entropies (nats) of a pack's trained tokens at this temperature, (T,) in fp32

        alone: by the model's own code, its sequences one at a time and without our head; for the self-test"""
        if self.replicas:
            self.set_requires_gradient_sync(pack.last)
        head = self.lm.get_output_embeddings()
        dtype, after = self.head_dtype or head.weight.dtype, (self.scale / temperature, self.cap / temperature)
        if alone:
            exact = lambda _, x, z: F.linear(x[0].to(dtype), *cast(head.weight, head.bias, dtype))  # as ours is
            hook, parts = head.register_forward_hook(exact), zip(pack.starts[:-1], pack.starts[1:])
            ids = spread(pack.ids, pack)[None]
            logits = [self.lm(input_ids=ids[:, a:b], use_cache=False).logits[0] for a, b in parts]
            hook.remove()
            log_p = (torch.cat(logits)[pack.select].float() / temperature).log_softmax(-1)
            return log_p.gather(1, pack.labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        packing = dict(cu_seq_lens_q=pack.starts, cu_seq_lens_k=pack.starts, position_ids=pack.positions[None])
        packing |= dict(max_length_q=pack.longest, max_length_k=pack.longest)
        if shared := len(pack.layout) > len(pack.pieces):
            packing |= dict(pack=pack)
        h = self.lm.get_decoder()(input_ids=pack.ids[None], use_cache=False, **packing).last_hidden_state
        h = spread(h[0], pack) if shared else h[0]
        return LogprobEntropy.apply(h[pack.select], head.weight, head.bias, pack.labels, after, dtype)


def after_head(lm):
    """-> scale, cap: what a model's own code makes of the output z of its last layer, cap tanh(scale z / cap); 0: no cap"""
    config = lm.config.get_text_config()
    scale = getattr(lm, "logit_scale", 1.0)  # Cohere's
    if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite divides by it
        scale = scaling if config.model_type.startswith("hyperclovax") else 1 / scaling
    return scale, getattr(config, "final_logit_softcapping", None) or 0.0  # Gemma's


class LogprobEntropy(torch.autograd.Function):
    """Log-probabilities of the labels and entropies, HEAD_CHUNK tokens at a time: no logits outlive their chunk.

    h (T, hidden), weight (V, hidden), bias (V,) or None, labels (T,), after: scale and cap of the logits, 0 for none
    -> (T,), (T,) in fp32; products in `dtype`, the softmax in fp32."""

    @staticmethod
    def forward(ctx, h, weight, bias, labels, after, dtype):
        ctx.save_for_backward(h, weight, bias, labels)
        ctx.after, ctx.dtype = after, dtype
        ctx.set_materialize_grads(False)
        layer, logp, entropy = cast(weight, bias, dtype), *(torch.empty(len(h), device=h.device) for _ in range(2))
        for i in range(0, len(h), HEAD_CHUNK):
            part = slice(i, i + HEAD_CHUNK)
            log_p, _ = log_softmax(h[part].to(dtype), layer, after)  # (chunk, V)
            logp[part] = log_p.gather(1, labels[part, None])[:, 0]
            entropy[part] = -log_p.exp().mul_(log_p).sum(-1)
            del log_p  # before the next ones are made
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        h, weight, bias, labels = ctx.saved_tensors
        w, b = layer = cast(weight, bias, ctx.dtype)
        grad_logp = torch.zeros(len(h), device=h.device) if grad_logp is None else grad_logp
        grad_h = torch.empty_like(h)
        wanted = zip((w, b), ctx.needs_input_grad[1:3])
        grad_w, grad_b = (torch.zeros_like(p, dtype=torch.float32) if wants else None for p, wants in wanted)
        for i in range(0, len(h), HEAD_CHUNK):
            part = slice(i, i + HEAD_CHUNK)
            x = h[part].to(ctx.dtype)
            log_p, slope = log_softmax(x, layer, ctx.after)
            grad = log_p.exp()  # p (chunk, V), then the gradient of the loss by the logits
            if grad_entropy is not None:  # of H = - sum p log p: - p (log p + H)
                by_entropy = (grad * log_p).sum(-1, keepdim=True) - log_p
                grad *= by_entropy.mul_(grad_entropy[part, None]).sub_(grad_logp[part, None])
            else:
                grad *= -grad_logp[part, None]
            grad.scatter_add_(1, labels[part, None], grad_logp[part, None])  # of log p_y: onehot - p
            grad = grad.mul_(slope).to(ctx.dtype)
            grad_h[part] = grad @ w
            if grad_w is not None:
                grad_w += grad.T @ x
            if grad_b is not None:
                grad_b += grad.sum(0)
            del log_p, grad, slope
        grad_w, grad_b = (g if g is None else g.to(weight.dtype) for g in (grad_w, grad_b))
        return grad_h, grad_w, grad_b, None, None, None


def cast(weight, bias, dtype):
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def log_softmax(x, layer, after):
    """x (chunk, hidden) -> log-probabilities (chunk, V), and the slope of a logit by what the layer put out"""
    scale, cap = after
    z, slope = F.linear(x, *layer).float().mul_(scale), scale
    if cap:
        z = z.div_(cap).tanh_()
        slope, z = (1 - z * z).mul_(scale), z * cap
    return z.log_softmax(-1), slope


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
    """Yields every parameter by its Hugging Face name, unsharded, as the engine computes, with what an adapter adds, and
    every buffer that a checkpoint holds, as it is. All processes must go through all of them."""
    lm, plain = model.lm, lambda name: name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    kept = lm.state_dict().keys()
    for name, buffer in lm.named_buffers():
        if name in kept:
            yield plain(name), buffer
    for name, p in lm.named_parameters():
        if ".lora_" in name:
            continue
        if name.endswith(".base_layer.weight"):
            p = p + lm.get_submodule(name.removesuffix(".base_layer.weight")).get_delta_weight("default")
        p = p.to(compute_dtype())  # the shard, before it is gathered: half the bytes
        yield plain(name), unsharded(p)


def unsharded(p):
    return p.full_tensor() if hasattr(p, "full_tensor") else p
