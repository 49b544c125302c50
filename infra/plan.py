"""What a command needs of a node, in memory and time, worked out before anything is loaded: `lite_ppo.py --plan 8x80`.

Memory follows from the model's configuration and the flags; times from the rates below, which are stated, not measured.
GiB are 2^30 bytes, for one GPU."""

import argparse
import json
import re
from pathlib import Path

import torch

from infra.engines import MAX_SEQS, longest_sequence, uses_vllm
from infra.policy import HEAD_CHUNK, base_of
from infra.processes import fail, refused

GIB = 2**30
GPUS = {  # part of the device's name: FLOP/s in bf16, bytes/s of its memory; makers' data sheets, without sparsity
    "B200": (2250e12, 8.0e12),
    "H200": (989e12, 4.8e12),
    "H100": (989e12, 3.35e12),
    "A100": (312e12, 2.0e12),
    "L40S": (362e12, 0.86e12),
}
MFU, BANDWIDTH = 0.3, 0.65  # share of the FLOP/s that training reaches, of the memory's bytes/s that sampling reaches
SYNC = 3.0  # seconds a step to wake vLLM, send the weights and put it to sleep
MEAN_LENGTH = 0.5  # of a response, as a share of --max_response_len
OVERHEAD = 4.5 * GIB  # 1.5 of CUDA and NCCL; 3 of vLLM's CUDA graphs and buffers, which stay while it sleeps
USABLE = 0.95  # of a GPU's memory; the rest is lost between blocks


def machine(text):
    """An argparse type: "8x80" -> (8, 80.0), GPUs and GiB of each; "here" stays"""
    found = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)", text)
    if text != "here" and (not found or not float(found[2]) or not int(found[1])):
        raise argparse.ArgumentTypeError(f"{text}: give GPUs x GiB of each, like 8x80")
    return text if text == "here" else (int(found[1]), float(found[2]))


class Shape:
    """The numbers of a model that decide what it needs. config: of transformers; no memory is taken for the weights."""

    def __init__(self, config):
        from transformers import AutoModelForCausalLM

        text = config.get_text_config()
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config)
        blocks = [m for m in lm.modules() if type(m).__name__ in lm._no_split_modules]
        linear = [m for block in blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
        heads, top_k = text.num_attention_heads, getattr(text, "num_experts_per_tok", None) or 1
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        head = lm.get_output_embeddings().weight
        experts = [p for block in blocks for p in block.parameters() if p.dim() == 3]  # (experts, ...) each
        self.experts = sum(p.numel() for p in experts)
        self.params = sum(p.numel() for p in lm.parameters())
        self.layer, self.layers = sum(p.numel() for p in blocks[0].parameters()), len(blocks)
        self.head, self.tied = head.numel(), head is lm.get_input_embeddings().weight
        self.lora = sum(m.in_features + m.out_features for m in linear)  # parameters that an adapter of rank 1 adds
        self.hidden = text.hidden_size
        self.inner = getattr(text, "moe_intermediate_size", 0) * top_k or getattr(text, "intermediate_size", None)
        self.inner = self.inner or 4 * self.hidden
        self.q, self.kv = heads * size, (getattr(text, "num_key_value_heads", None) or heads) * size
        self.words = len(lm.get_input_embeddings().weight)  # rows of the embedding
        self.positions = text.max_position_embeddings  # tokens of the longest sequence
        self.computed = self.params - (0 if self.tied else self.head)  # parameters each token is multiplied with
        self.computed -= sum(p.numel() * (len(p) - top_k) // len(p) for p in experts)  # not with other experts'
        self.checkpointed = 2 * self.hidden * self.layers  # bytes of a token: what goes into each layer
        # bytes of a token while a layer is recomputed and its gradients are computed; of Qwen3 in transformers 5.19
        self.in_a_layer = 16 * self.hidden + 10 * (self.q + self.kv) + 12 * self.inner

    def in_the_head(self, frozen):
        """Bytes while the output layer computes gradients, fp32: its weights, twice their gradient, a chunk's logits"""
        return 4 * self.head * (1 if frozen else 3) + 8 * HEAD_CHUNK * (self.head // self.hidden)

    def flops(self, lengths, passes=3, lora=False, tokens=None):
        """Of sequences of these lengths, causal attention counted as half of the square. passes: 1 forward, 3 with
        backward; what is computed twice counts once, and weights that LoRA freezes have no gradient. tokens: fewer than
        the lengths' sum where sequences share a prompt"""
        tokens = sum(lengths) if tokens is None else tokens
        one = 2 * self.computed * tokens + 2 * self.layers * self.q * sum(n * n for n in lengths)
        return passes * one - 2 * self.computed * tokens * lora


def read_shape(args):
    """-> Shape of --model, from its config.json"""
    from transformers import AutoConfig

    with refused(f"--model {args.model}: its configuration cannot be read; give a folder, or a name on a hub in reach"):
        config = AutoConfig.from_pretrained(base_of(args.model))
        if (ends := Path(base_of(args.model)) / "generation_config.json").is_file():
            json.loads(ends.read_text())  # transformers takes no notice of a damaged one
    if quantised := getattr(config, "quantization_config", None):
        kind = getattr(quantised, "quant_method", None) or dict(quantised).get("quant_method", "unknown")
        fail(f"--model {args.model}: its weights are quantised ({kind}) and cannot be trained; give those before that")
    with refused(f"--model {args.model}: {config.model_type} cannot be trained here"):
        s = Shape(config)
    if s.experts and uses_vllm(args) and not torch.cuda.is_available():
        fail(f"--engine vllm: on a CPU it loads no mixture of experts, as {args.model} is, again; give --engine hf")
    if s.experts and args.lora_rank:
        fail(f"--lora_rank {args.lora_rank}: adapters are for linear layers, not the experts of {args.model}; give 0")
    if (longest := longest_sequence(args)) > s.positions:
        why = f"with the longest response {longest} tokens, {args.model} has {s.positions}"
        fail(f"--max_prompt_len {args.max_prompt_len}: {why}")
    return s


def memory(args, s, gpus, alone=False):
    """-> {what: (bytes while sampling, bytes while training)} of one GPU, without vLLM's cache. alone: nobody trains"""
    vllm = 2 * s.params / args.vllm_tensor_parallel
    rows = {"vLLM's weights": (vllm, vllm * (args.sleep == "off")), "vLLM's graphs, CUDA": (OVERHEAD,) * 2}
    return rows if alone else trainer(args, s, gpus) | rows


def trainer(args, s, gpus):
    share, lora = gpus if args.sharding == "fsdp" else 1, args.lora_rank > 0
    trained, frozen = args.lora_rank * s.lora or s.params, s.params * lora
    outer = s.params - s.layers * s.layer  # embedding, output layer, last norm
    rows = {
        "weights, fp32": (4 * (trained + frozen) / share,) * 2,
        "Adam's moments": (8 * trained / share,) * 2,
        "gradients, fp32": (0, 4 * trained / share),
        "reference, bf16": (2 * s.params / share * (args.reference and not lora),) * 2,
        "unsharded parameters, bf16": (0, 2 * (outer + 3 * s.layer)),  # one layer computes, the next is gathered, twice
        "their gradients": (0, 0 if lora else 2 * outer + 6 * s.layer),
        "checkpointed activations": (0, args.tokens_per_gpu * s.checkpointed),
        "most expensive layer": (0, max(args.tokens_per_gpu * s.in_a_layer, s.in_the_head(lora))),
    }
    return {what: row for what, row in rows.items() if any(row)}


def totals(args, s, gpus, alone=False):
    return [sum(column) for column in zip(*memory(args, s, gpus, alone).values())]


def kv_cache(args, s, gpus, gib, alone=False):
    """-> bytes that vLLM's KV cache may take on each GPU (may be negative), and those of a token in it"""
    sampling, training = totals(args, s, gpus, alone)
    token = 4 * s.layers * s.kv / args.vllm_tensor_parallel
    most = USABLE * gib * GIB - (sampling if args.sleep == "on" else max(sampling, training))
    wanted = MAX_SEQS * longest_sequence(args) * token  # more is never used
    return (args.kv_cache_gib * GIB or min(most, wanted)), token


def refusal(args, s, gpus, gib, alone=False):
    """-> one line that says what does not fit and which flag to change, or None"""
    sampling, training = totals(args, s, gpus, alone)
    cache, token = kv_cache(args, s, gpus, gib, alone)
    room, given = USABLE * gib * GIB, cache * (args.kv_cache_gib > 0)
    asked = f"of the {room / GIB:.1f} usable on each of {gpus} GPUs"
    if training + given * (args.sleep == "off") > room:
        training += given * (args.sleep == "off")
        left = room - (training - totals(args, s, gpus)[1])
        fewer = lambda n: argparse.Namespace(**vars(args) | {"tokens_per_gpu": n})
        tried = range(args.tokens_per_gpu // 1024 * 1024, 0, -1024)
        fits = next((n for n in tried if totals(fewer(n), s, gpus)[1] <= left), 0)
        change = [
            (args.sharding == "ddp" and gpus > 1, "give --sharding fsdp"),
            (fits >= args.max_prompt_len + args.max_response_len, f"lower --tokens_per_gpu to {fits}"),
            (args.sleep == "off", "give --sleep on"),
            (not args.lora_rank, "give --lora_rank 32, a smaller --model, or more GPUs"),
            (True, "give a smaller --model or --max_response_len, or more GPUs"),
        ]
        advice = next(text for fitting, text in change if fitting)
        return f"--tokens_per_gpu {args.tokens_per_gpu}: training needs {training / GIB:.1f} GiB {asked}; {advice}"
    if sampling + given > room:
        need = f"sampling needs {(sampling + given) / GIB:.1f} GiB {asked}"
        advice = "lower it" if given else "give a higher --vllm_tensor_parallel, or --sharding fsdp"
        return f"--kv_cache_gib {args.kv_cache_gib:g}: {need}; {advice}"
    if cache < longest_sequence(args) * token:
        need = f"the longest response needs {longest_sequence(args) * token / GIB:.1f} GiB of KV cache"
        if given:
            return f"--kv_cache_gib {args.kv_cache_gib:g}: {need}; raise it"
        return f"--max_response_len {args.max_response_len}: {need}, {cache / GIB:.1f} are free {asked}; lower it"


def local_gpus():
    """-> GPUs, GiB of each and their name; eight H100 where there is none"""
    if not torch.cuda.is_available():
        return 8, 80.0, "H100"
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return torch.cuda.device_count(), device.total_memory / GIB, device.name


def rates(name):
    """-> FLOP/s and bytes/s of a device, or None where its name is in no row of GPUS"""
    return next((rate for part, rate in GPUS.items() if part in name), None)


def seconds(args, s, gpus, cache, token, rates):
    """-> {phase: seconds a step}, at the rates of this device"""
    flops, bandwidth = rates[0] * MFU, rates[1] * BANDWIDTH
    responses, engines = args.prompts_per_step * args.group_size, gpus / args.vllm_tensor_parallel
    mean = MEAN_LENGTH * args.max_response_len
    at_once = max(1, min(MAX_SEQS, responses / engines, cache / token / mean))
    read = 2 * s.params / args.vllm_tensor_parallel / bandwidth  # each token in turn reads all weights, and its cache
    one = read + at_once * token * mean / 2 / bandwidth
    tail = (args.max_response_len - mean) * read  # the longest response, alone at the end
    lengths, passes = [mean] * responses, (args.old_logp == "recompute") + args.reference
    return {
        "sync": SYNC,
        "generate": responses / engines / at_once * mean * one + tail,
        "old_logp": s.flops(lengths, passes) / gpus / flops,
        "update": s.flops(lengths, lora=args.lora_rank > 0) / gpus / flops,
    }


def report(args, s, gpus, gib, name="H100"):
    """-> the plan as text; of the time nothing is said where the memory does not suffice"""
    rows, (cache, token) = memory(args, s, gpus), kv_cache(args, s, gpus, gib)
    rows |= {"vLLM's KV cache": (max(cache, 0), max(cache, 0) * (args.sleep == "off"))}
    rows |= {"total": tuple(map(sum, zip(*rows.values())))}
    lines = [
        f"{args.model}: {s.params / 1e9:.3g} billion parameters; {gpus} x {gib:.0f} GiB, --sharding {args.sharding};",
        f"the machine's memory holds {4 * s.params * gpus / GIB:.0f} GiB of weights while they are loaded",
        f"{'GiB a GPU':28s}{'sampling':>10s}{'training':>10s}",
        *(f"{what:28s}" + "".join(f"{x / GIB:10.2f}" for x in row) for what, row in rows.items()),
    ]
    if not refusal(args, s, gpus, gib):
        phases = seconds(args, s, gpus, cache, token, rates(name) or GPUS["H100"])
        step, parts = sum(phases.values()), ", ".join(f"{phase} {value:.0f}" for phase, value in phases.items())
        longest = cache / token / longest_sequence(args)
        lines += [
            f"{cache / token:,.0f} tokens in flight on a GPU: {longest:.0f} of the longest responses, or",
            f"{MAX_SEQS} of {cache / token / MAX_SEQS:,.0f} with their prompts; of more vLLM puts some off and computes them again",
            f"a step in about {step:.0f} s ({parts}), {args.steps} steps in {args.steps * step / 3600:.1f} hours, if",
            f"training reaches {MFU:.0%} of the FLOP/s of {name}, sampling {BANDWIDTH:.0%} of its memory's speed, and",
            f"responses are {MEAN_LENGTH:.0%} of their limit (stated, not measured; without evaluations and resampling)",
        ]
    return "\n".join(lines)
