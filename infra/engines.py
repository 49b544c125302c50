"""The inference engine: vLLM or, where it is not installed, transformers. In a step it wakes, loads, generates, sleeps."""

import contextlib
import gc
import hashlib
import importlib.util
import math
import os
import sys
import time
from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from infra import processes
from infra.attention import grouped_attention
from infra.policy import base_of, plain_attention, weights
from infra.processes import all_gather, compute_dtype, device, fail, join_group, rank, world

MAX_SEQS = 128  # responses that vLLM samples at a time
HF_ROWS = 256  # sequences the hf engine samples at a time
BAR_DELAY = 5  # seconds that a sampling may take without a bar
ONE_THREAD = 5e6  # parameters; a token of a smaller model is too little work to share, on a CPU
HF_CROWD = 0.8  # it drops the finished ones whenever fewer than this share is still going
Sampling = namedtuple("Sampling", "temperature top_p top_k max_response_len")  # top_k 0: of all tokens


@dataclass
class Response:
    problem: dict  # the row it answers, prompt_ids included
    ids: torch.Tensor  # (L,) its tokens, EOS included if it came to an end
    engine_logp: torch.Tensor  # (L,) their log-probabilities as the engine sampled them
    truncated: bool  # at the limit
    text: str


def seed_of(seed, step, problem_id, sample):
    """-> the seed of one response: a function of what it is, never of the process. Within a group no two are equal."""
    digest = hashlib.sha256(f"{seed} {step} {problem_id}".encode()).digest()
    return (int.from_bytes(digest[:4], "big") + sample) & 0x7FFFFFFF


def stop_ids(model, tokenizer):
    """-> EOS of the model and of the tokenizer, and what ends a turn of the chat template, which base models leave out"""
    from transformers import AutoConfig, GenerationConfig

    listed = lambda eos: eos if isinstance(eos, list) else [eos]
    ids = {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    with contextlib.suppress(OSError):  # no generation_config.json
        ids.update(listed(GenerationConfig.from_pretrained(model).eos_token_id))
    with contextlib.suppress(OSError, ValueError):
        ids.update(listed(getattr(AutoConfig.from_pretrained(model).get_text_config(), "eos_token_id", None)))
    if ids == {None}:
        fail(f"--model {model}: neither its tokenizer nor its configuration has an EOS; a response would never end")
    return sorted(ids - {None})


def end_of_turn(tokenizer):
    """-> the special token that follows a response in the chat template, or None"""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2345"}]
    rest = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("2345")[2]
    first, known = tokenizer.encode(rest, add_special_tokens=False)[:1], tokenizer.added_tokens_decoder
    return next((i for i in first if i in known and known[i].special), None)


def longest_sequence(args):
    """-> tokens of the longest prompt with the longest response, of training or evaluation"""
    return args.max_prompt_len + max(args.max_response_len, args.eval_max_response_len)


class Engine:
    def __init__(self, args, tokenizer):
        self.args, self.tokenizer, self.stop = args, tokenizer, stop_ids(base_of(args.model), tokenizer)
        self.sampling = Sampling(args.temperature, args.top_p, args.top_k, args.max_response_len)
        self.idle = 0.0

    def generate(self, problems, n, step, sampling=None):
        """-> n responses to each problem, problem by problem, the same list on every process

        `step`, whatever it is, is for the seeds; `sampling` is that of the rollouts unless given."""
        requests = [(p, seed_of(self.args.seed, step, p["id"], i)) for p in problems for i in range(n)]
        share = self.args.vllm_tensor_parallel  # processes that sample together, with the same requests
        mine = requests[rank() // share :: world() // share]  # a group is scattered: its long responses do not meet
        prompts, seeds = [p["prompt_ids"] for p, _ in mine], [seed for _, seed in mine]
        found, since = self.sample(prompts, seeds, sampling or self.sampling), time.perf_counter()
        all_gather(None)  # all have sampled
        self.idle += time.perf_counter() - since
        sampled = processes.interleave(all_gather(found if rank() % share == 0 else [])[::share])
        if not all(logp.isfinite().all() for _, logp in sampled):
            why = "the engine's log-probabilities are no numbers, so that neither are the weights"
            raise SystemExit(f"{why}; go on from a checkpoint, with a lower --lr" if rank() == 0 else 1)
        texts = self.tokenizer.batch_decode([ids for ids, _ in sampled], skip_special_tokens=True)
        found = zip([p for p, _ in requests], sampled, texts)
        return [Response(p, ids, logp, int(ids[-1]) not in self.stop, text) for p, (ids, logp), text in found]

    def waited(self):
        """-> seconds that this process has waited for the others' samples, since the last call"""
        idle, self.idle = self.idle, 0.0
        return idle

    wake = sleep = close = lambda self: None  # for an engine that never sleeps


def progress(items=None, **how):
    """-> a bar of responses done, for samplings that take long; the log's lines are written above it"""
    rarely = 1 if sys.stderr.isatty() else 60  # seconds
    return tqdm(items, **{"unit": "response", "leave": False, "delay": BAR_DELAY, "mininterval": rarely} | how)


class VllmEngine(Engine):
    """vLLM in this process, one engine a GPU. Asleep it holds neither weights nor cache (on a CPU it never sleeps)."""

    def __init__(self, args, tokenizer, kv_cache_bytes=None):
        super().__init__(args, tokenizer)
        cuda = torch.cuda.is_available()
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # else false alarms at each sleep and each load
        threads = os.environ.get("TORCHINDUCTOR_COMPILE_THREADS")
        join_group()
        if not cuda:
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(math.ceil(args.kv_cache_gib or 1))  # GiB
            import vllm._custom_ops

            vllm._custom_ops._supports_onednn = False  # else layers keep packed copies, and `load` misses a tied head
        from vllm import LLM

        longest = longest_sequence(args)
        self.llm = LLM(
            base_of(args.model),
            dtype=str(compute_dtype()).removeprefix("torch."),
            distributed_executor_backend="external_launcher",  # in process, in the process group that is there
            tensor_parallel_size=args.vllm_tensor_parallel,
            load_format="dummy",  # `load` brings the weights before the first sample
            enable_sleep_mode=cuda and args.sleep == "on",
            enforce_eager=not cuda,  # CUDA graphs on a GPU; no half minute of compiling on a CPU
            kv_cache_memory_bytes=kv_cache_bytes if cuda else None,
            gpu_memory_utilization=0.01 if cuda else 0.3,  # so much has to be free at once; the plan knows better
            max_model_len=longest,
            max_num_seqs=MAX_SEQS,
            max_num_batched_tokens=8192 if cuda else max(8192, longest),
            enable_chunked_prefill=cuda,  # on a CPU vLLM cannot put back the seed of a prompt it has read in part
            logprobs_mode="processed_logprobs",  # after temperature, top-k and top-p
            hf_overrides={"head_dtype": "float32"} if args.head_dtype == "float32" else {},  # as in the trainer
            generation_config="vllm",  # sampling as we say, not as the checkpoint says
            disable_log_stats=False,  # for `preemptions`
            seed=args.seed,  # of Python's, numpy's and torch's generators too, from which nothing of ours draws
        )
        processes.use_tf32()
        os.environ.pop("TORCHINDUCTOR_COMPILE_THREADS", None)  # vLLM sets 1, which would be the trainer's too
        os.environ.update({"TORCHINDUCTOR_COMPILE_THREADS": threads} if threads else {})
        self.sleep()

    def wake(self):
        gc.collect()
        torch.cuda.empty_cache()  # what the trainer's allocator keeps for later is not free for vLLM
        self.llm.wake_up(tags=["weights"])

    def load(self, model):
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": as_saved(model)})
        self.llm.reset_prefix_cache()  # its keys and values came from the old weights
        torch.cuda.empty_cache()  # of the weights that passed
        self.llm.wake_up(tags=["kv_cache"])
        self.llm.collective_rpc(zero_cache)

    def sample(self, prompts, seeds, how):
        from vllm import SamplingParams

        settings = dict(temperature=how.temperature, top_p=how.top_p, top_k=how.top_k, max_tokens=how.max_response_len)
        settings |= dict(stop_token_ids=self.stop, logprobs=0, flat_logprobs=True, detokenize=False)
        params = [SamplingParams(seed=seed, **settings) for seed in seeds]
        bar, before = progress if rank() == 0 else False, self.preemptions()
        outs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=bar)
        outs = [out.outputs[0] for out in outs]
        if rank() == 0 and (again := self.preemptions() - before):
            tqdm.write(f"vLLM's cache was full: {again} times a response was put off and computed again", sys.stderr)
        return [(torch.tensor(out.token_ids), torch.tensor(out.logprobs.logprobs)) for out in outs]

    def preemptions(self):
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == "vllm:num_preemptions")

    def sleep(self):
        self.llm.sleep(level=2)  # without vLLM's sleep mode it only stops taking requests

    def close(self):
        self.llm.llm_engine.engine_core.shutdown()  # before Accelerate's end: it takes the process group along


def zero_cache(worker):
    """The cache's memory is whatever it was before it slept; a NaN there would go into attention, be it masked."""
    for cache in worker.model_runner.kv_caches:
        for part in cache if isinstance(cache, list | tuple) else [cache]:
            part.zero_()


def as_saved(model):
    """Yields the weights by the names of a checkpoint on disk, one matrix an expert, which vLLM knows."""
    from transformers.core_model_loading import revert_weight_conversion

    lm = model.lm.get_base_model() if hasattr(model.lm, "get_base_model") else model.lm
    for name, p in weights(model):
        yield from revert_weight_conversion(lm, {name: p}).items()


class HfEngine(Engine):
    """The same methods over a transformers model, for machines without vLLM."""

    def __init__(self, args, tokenizer, kv_cache_bytes=None):
        super().__init__(args, tokenizer)
        from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, masking_utils

        AttentionInterface.register("grouped", grouped_attention)
        AttentionMaskInterface.register("grouped", masking_utils.sdpa_mask)
        how = dict(dtype=compute_dtype(), attn_implementation="eager")  # which every model has
        lm = AutoModelForCausalLM.from_pretrained(base_of(args.model), **how)
        lm.set_attn_implementation("grouped" if plain_attention(lm) == "sdpa" else "eager")
        self.lm = lm.to(device()).eval().requires_grad_(False)
        self.threads = 1 if lm.num_parameters() < ONE_THREAD else processes.CPU_THREADS

    def load(self, model):
        mine = dict(self.lm.named_parameters())
        buffers = dict(self.lm.named_buffers())
        for name, p in weights(model):
            (mine.pop(name) if name in mine else buffers[name]).copy_(p)
        assert not mine, f"weights that were not loaded: {sorted(mine)}"

    def sample(self, prompts, seeds, how):
        parts = [slice(i, i + HF_ROWS) for i in range(0, len(prompts), HF_ROWS)]
        processes.use_cores(self.threads)
        with progress(total=len(prompts), disable=rank() > 0) as bar:
            found = [row for part in parts for row in self.sample_rows(prompts[part], seeds[part], how, bar)]
        processes.use_cores()
        return [(ids.clone(), logp.clone()) for ids, logp in found]  # tensors as any, made outside of inference mode

    @torch.inference_mode()  # less work an operation than without gradients alone
    def sample_rows(self, prompts, seeds, how, bar):
        from transformers import DynamicCache

        before, since = bar.n, time.perf_counter()
        rows, width = torch.arange(len(prompts)), max(map(len, prompts))
        noise = [torch.rand(how.max_response_len, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        noise, cache = torch.stack(noise), DynamicCache(config=self.lm.config)
        order = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}  # each is read once
        ids = torch.tensor([[0] * (width - len(p)) + [*p] for p in order], device=device())  # (U, T), padding first
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in order], device=device())  # (U, T)
        which = torch.tensor([order[tuple(p)] for p in prompts], device=device())  # (B,)
        lengths = torch.full((len(prompts),), how.max_response_len)
        tokens = torch.zeros(len(prompts), how.max_response_len, dtype=torch.long)
        logps = torch.zeros(len(prompts), how.max_response_len)
        for t in range(how.max_response_len):
            positions = (mask.cumsum(1) - 1).clamp(min=0)  # padding too needs one that there is
            inputs = dict(input_ids=ids, attention_mask=mask, position_ids=positions[:, -ids.shape[1] :])
            logits = self.lm(**inputs, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()  # (B, V)
            if t == 0:
                cache.batch_select_indices(which)
                logits, mask = logits[which], mask[which]  # (B, V), (B, T)
            logp = keep_likeliest(logits / how.temperature, how.top_p, how.top_k).log_softmax(-1)  # (B, V)
            token = sample_token(logp, noise[rows, t].to(device()))  # (B,)
            tokens[rows, t], logps[rows, t] = token.cpu(), logp.gather(1, token[:, None])[:, 0].cpu()
            ended = rows[torch.isin(tokens[rows, t], torch.tensor(self.stop))]
            lengths[ended] = lengths[ended].clamp(max=t + 1)
            going = lengths[rows] > t + 1  # (B,)
            speed = int(lengths.clamp(max=t + 1).sum()) / (time.perf_counter() - since)
            bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
            bar.update(before + int((lengths <= t + 1).sum()) - bar.n)
            if not going.any():
                break
            ids, mask = token[:, None], F.pad(mask, (0, 1), value=1)
            if going.float().mean() < HF_CROWD:
                keep = going.nonzero()[:, 0].to(device())
                cache.batch_select_indices(keep)
                rows, ids, mask = rows[going], ids[keep], mask[keep]
        return [(tokens[i, :length], logps[i, :length]) for i, length in enumerate(lengths.tolist())]


def keep_likeliest(logits, top_p, top_k):  # (B, V) -> (B, V), minus infinity where nothing may be sampled
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = TopKLogitsWarper(min(top_k, logits.shape[1]))(None, logits) if top_k else logits
    return TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits


def sample_token(logp, uniform):  # (B, V), (B,) in [0, 1) -> (B,), where the total probability so far passes uniform
    total = logp.double().exp().cumsum(-1)  # double, so that uniform x total[-1] stays below total[-1]
    found = torch.searchsorted(total, uniform.double()[:, None] * total[:, -1:], right=True)[:, 0]
    return found.clamp(max=logp.shape[1] - 1)  # of what is no number too


def uses_vllm(args):
    auto = args.engine == "auto" and torch.cuda.is_available() and importlib.util.find_spec("vllm")
    return args.engine == "vllm" or auto
