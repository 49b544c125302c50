"""What a command needs of a node, in memory and time, worked out before anything is loaded: `lite_ppo.py --plan 8x80`.

Memory follows from the model's configuration and the flags. Times are those of the RATES below, which are stated, not
measured here. GiB are 2^30 bytes, for one GPU; L layers, h hidden size, V words, T = --tokens_per_gpu.
"""

import argparse
import re
from dataclasses import dataclass

import torch

GIB = 2**30
GPUS = {  # part of the device's name: FLOP/s in bf16, bytes/s of its memory; makers' data sheets, without sparsity
    "B200": (2250e12, 8.0e12),
    "H200": (989e12, 4.8e12),
    "H100": (989e12, 3.35e12),
    "A100": (312e12, 2.0e12),
    "L40S": (362e12, 0.86e12),
}
MFU = 0.3  # share of the FLOP/s that training reaches
BANDWIDTH = 0.65  # share of the memory's bytes/s that sampling reaches
SYNC = 3.0  # seconds a step to wake vLLM, send the weights and put it to sleep
MEAN_LENGTH = 0.5  # of a response, as a share of --max_response_len
CONTEXT = 1.5 * GIB  # of CUDA and NCCL
RESIDUE = 3.0 * GIB  # vLLM's CUDA graphs and buffers, which stay while it sleeps
USABLE = 0.95  # of a GPU's memory; the rest is lost between blocks
HEAD_CHUNK = 2048  # tokens whose logits exist at a time: 1.2 GiB in fp32 at Qwen3's 152k words
MAX_SEQS = 128  # responses that vLLM samples at a time


def machine(text):
    """An argparse type: "8x80" -> (8, 80.0), GPUs and GiB of each; "here" stays"""
    found = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)", text)
    if text != "here" and (not found or not float(found[2]) or not int(found[1])):
        raise argparse.ArgumentTypeError(f"{text}: give GPUs x GiB of each, like 8x80")
    return text if text == "here" else (int(found[1]), float(found[2]))


@dataclass
class Shape:
    """The numbers of a model that decide what it needs."""

    params: int
    layer: int  # parameters of one decoder layer
    layers: int
    head: int  # parameters of the output layer
    tied: bool  # that layer is the embedding
    lora: int  # parameters that an adapter of rank 1 adds
    hidden: int
    inner: int  # of the feed-forward part
    q: int  # heads x their size
    kv: int

    @property
    def computed(self):
        """Parameters each token is multiplied with"""
        return self.params - (0 if self.tied else self.head)

    def forward_flops(self, lengths):
        """Over sequences of these lengths, causal attention counted as half of the square"""
        return 2 * self.computed * sum(lengths) + 2 * self.layers * self.q * sum(n * n for n in lengths)

    def flops(self, lengths, lora=False):
        """Forward and backward; what is computed twice counts once, and frozen weights have no gradient"""
        return 3 * self.forward_flops(lengths) - 2 * self.computed * sum(lengths) * lora


def shape(config):
    """-> Shape. `config`: of transformers; the model is built without memory for its weights."""
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    blocks = [m for m in lm.modules() if type(m).__name__ in lm._no_split_modules]
    linear = [m for block in blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    head = lm.get_output_embeddings().weight
    return Shape(
        params=sum(p.numel() for p in lm.parameters()),
        layer=sum(p.numel() for p in blocks[0].parameters()),
        layers=len(blocks),
        head=head.numel(),
        tied=head is lm.get_input_embeddings().weight,
        lora=sum(m.in_features + m.out_features for m in linear),
        hidden=text.hidden_size,
        inner=text.intermediate_size,
        q=text.num_attention_heads * size,
        kv=text.num_key_value_heads * size,
    )


def memory(args, s, gpus, alone=False):
    """-> {what: (bytes while sampling, bytes while training)} of one GPU, without vLLM's cache. alone: nobody trains"""
    vllm = 2 * s.params / args.vllm_tensor_parallel
    rows = {
        "vLLM's weights": (vllm, vllm * (args.sleep == "off")),
        "vLLM's graphs, CUDA": (CONTEXT + RESIDUE,) * 2,
    }
    return rows if alone else trainer(args, s, gpus) | rows


def trainer(args, s, gpus):
    share = gpus if args.sharding == "fsdp" else 1
    trained, frozen = args.lora_rank * s.lora or s.params, s.params if args.lora_rank else 0
    outer = s.params - s.layers * s.layer  # embedding, output layer, last norm
    layer = max(args.tokens_per_gpu * in_a_layer(s), in_the_head(s, args.lora_rank > 0))
    whole = 2 * (outer + 3 * s.layer)  # one computes, the next is there twice while it is put together
    reference = 2 * s.params / share if args.reference and not args.lora_rank else 0
    rows = {
        "weights, fp32": (4 * (trained + frozen) / share,) * 2,
        "Adam's two averages": (8 * trained / share,) * 2,
        "gradients, fp32": (0, 4 * trained / share),
        "reference, bf16": (reference,) * 2,
        "whole layers, bf16": (0, whole),
        "their gradients": (0, 0 if frozen else 2 * outer + 6 * s.layer),
        "kept between layers": (0, args.tokens_per_gpu * kept(s)),
        "in the dearest layer": (0, layer),
    }
    return {what: row for what, row in rows.items() if any(row)}


def totals(args, s, gpus, alone=False):
    return [sum(column) for column in zip(*memory(args, s, gpus, alone).values())]


def kept(s):
    """-> bytes of a token from the forward to the backward pass: what goes into each layer"""
    return 2 * s.hidden * s.layers


def in_a_layer(s):
    """-> bytes of a token while a layer is computed again and its gradients are. Counted on Qwen3's, of transformers 5.19"""
    return 16 * s.hidden + 10 * (s.q + s.kv) + 12 * s.inner


def in_the_head(s, frozen):
    """-> bytes while the output layer computes gradients: its weights, their gradient twice, one chunk's words twice, fp32"""
    return 4 * s.head * (1 if frozen else 3) + 8 * HEAD_CHUNK * (s.head // s.hidden)


def kv_cache(args, s, gpus, gib, alone=False):
    """-> bytes that vLLM's keys and values may take on each GPU, and those of one token there. May be negative"""
    sampling, training = totals(args, s, gpus, alone)
    token = 4 * s.layers * s.kv / args.vllm_tensor_parallel
    most = USABLE * gib * GIB - (sampling if args.sleep == "on" else max(sampling, training))
    wanted = MAX_SEQS * longest(args) * token  # more is never used
    return (args.kv_cache_gib * GIB or min(most, wanted)), token


def longest(args):
    return args.max_prompt_len + max(args.max_response_len, args.eval_max_response_len)


def refusal(args, s, gpus, gib, alone=False):
    """-> one line that says what does not fit and which flag to change, or None"""
    sampling, training = totals(args, s, gpus, alone)
    cache, token = kv_cache(args, s, gpus, gib, alone)
    room = USABLE * gib * GIB
    training += cache * (args.sleep == "off") * (args.kv_cache_gib > 0)
    sampling += cache * (args.kv_cache_gib > 0)
    asked = f"of the {room / GIB:.1f} usable on each of {gpus} GPUs"
    if training > room:
        fits = fitting_tokens(args, s, gpus, room - (training - totals(args, s, gpus)[1]))
        change = [
            (args.sharding == "ddp" and gpus > 1, "give --sharding fsdp"),
            (fits >= args.max_prompt_len + args.max_response_len, f"lower --tokens_per_gpu to {fits}"),
            (args.sleep == "off", "give --sleep on"),
            (not args.lora_rank, "give --lora_rank 32, a smaller --model, or more GPUs"),
            (True, "give a smaller --model or --max_response_len, or more GPUs"),
        ]
        advice = next(text for fitting, text in change if fitting)
        return f"--tokens_per_gpu {args.tokens_per_gpu}: training needs {training / GIB:.1f} GiB {asked}; {advice}"
    if sampling > room:
        advice = "lower it" if args.kv_cache_gib else "give a higher --vllm_tensor_parallel, or --sharding fsdp"
        return f"--kv_cache_gib {args.kv_cache_gib:g}: sampling needs {sampling / GIB:.1f} GiB {asked}; {advice}"
    if cache < longest(args) * token:
        need = f"the longest response needs {longest(args) * token / GIB:.1f} GiB of keys and values"
        if args.kv_cache_gib:
            return f"--kv_cache_gib {args.kv_cache_gib:g}: {need}; raise it"
        return f"--max_response_len {args.max_response_len}: {need}, {cache / GIB:.1f} are free {asked}; lower it"


def fitting_tokens(args, s, gpus, room):
    """-> the largest multiple of 1,024 for --tokens_per_gpu with which training fits; 0 where none does"""
    smaller = range(args.tokens_per_gpu // 1024 * 1024, 0, -1024)
    tried = ((n, argparse.Namespace(**vars(args) | {"tokens_per_gpu": n})) for n in smaller)
    return next((n for n, less in tried if totals(less, s, gpus)[1] <= room), 0)


def seconds(args, s, gpus, cache, token, rates):
    """-> {phase: seconds a step}, at the rates of this device"""
    flops, bandwidth = rates
    responses, engines = args.prompts_per_step * args.group_size, gpus / args.vllm_tensor_parallel
    mean = MEAN_LENGTH * args.max_response_len
    at_once = max(1, min(MAX_SEQS, responses / engines, cache / token / mean))
    read = 2 * s.params / args.vllm_tensor_parallel  # each token in turn reads all weights, and its keys and values
    one = (read + at_once * token * mean / 2) / bandwidth / BANDWIDTH
    tail = (args.max_response_len - mean) * read / bandwidth / BANDWIDTH  # the longest one, alone at the end
    lengths, reached = [mean] * responses, gpus * flops * MFU
    passes = (args.old_logp == "recompute") + args.reference
    return {
        "sync": SYNC,
        "generate": responses / engines / at_once * mean * one + tail,
        "old_logp": passes * s.forward_flops(lengths) / reached,
        "update": s.flops(lengths, lora=args.lora_rank > 0) / reached,
    }


def here():
    """-> GPUs, GiB of each and their name; eight H100 where there is none"""
    if not torch.cuda.is_available():
        return 8, 80.0, "H100"
    name = torch.cuda.get_device_name()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return torch.cuda.device_count(), total / GIB, name


def rates(name):
    """-> FLOP/s and bytes/s of a device, or None where its name is in no row of GPUS"""
    return next((rate for part, rate in GPUS.items() if part in name), None)


def report(args, s, gpus, gib, name="H100"):
    """-> the plan as text; of the time nothing is said where the memory does not suffice"""
    rows, (cache, token) = memory(args, s, gpus), kv_cache(args, s, gpus, gib)
    rows |= {"vLLM's keys and values": (max(cache, 0), max(cache, 0) * (args.sleep == "off"))}
    rows |= {"in all": tuple(map(sum, zip(*rows.values())))}
    host = f"the machine's memory holds {4 * s.params * gpus / GIB:.0f} GiB of weights while they are loaded"
    lines = [
        f"{args.model}: {s.params / 1e9:.3g} billion parameters; {gpus} x {gib:.0f} GiB, --sharding {args.sharding}; {host}",
        f"{'GiB a GPU':28s}{'sampling':>10s}{'training':>10s}",
        *(f"{what:28s}" + "".join(f"{x / GIB:10.2f}" for x in row) for what, row in rows.items()),
    ]
    if not refusal(args, s, gpus, gib):
        phases = seconds(args, s, gpus, cache, token, rates(name) or GPUS["H100"])
        step, parts = sum(phases.values()), ", ".join(f"{phase} {value:.0f}" for phase, value in phases.items())
        lines += [
            f"{cache / token:,.0f} tokens in flight on a GPU: {cache / token / longest(args):.0f} of the longest responses",
            f"a step in about {step:.0f} s ({parts}), {args.steps} steps in {args.steps * step / 3600:.1f} hours, if training",
            f"reaches {MFU:.0%} of the FLOP/s of {name}, sampling {BANDWIDTH:.0%} of its memory's speed, and responses are as long as",
            f"{MEAN_LENGTH:.0%} of their limit (stated, not measured; without evaluations and resampling)",
        ]
    return "\n".join(lines)
