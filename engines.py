"""Who samples: vLLM, or a transformers model where there is none. Both have the same methods and their own copy of the weights.

The order of a step: wake, load, generate as often as you like, sleep.
"""

import contextlib
import gc
import hashlib
import importlib.util
import math
import os
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import plan
from training import (
    all_gather,
    barrier,
    base_of,
    compute_dtype,
    device,
    in_turn,
    join_group,
    own_rng,
    rank,
    use_tf32,
    weights,
    world,
)

HF_ROWS = 256  # sequences the hf engine samples at a time
HF_CROWD = 0.8  # it drops the finished ones whenever fewer than this share is still going


@dataclass
class Response:
    problem: dict  # the row it answers, prompt_ids included
    ids: torch.Tensor  # (L,) its tokens, the end token included if it came to an end
    engine_logp: torch.Tensor  # (L,) their log-probabilities as the engine sampled them
    truncated: bool  # cut at the limit
    text: str


def seed_of(seed, step, problem_id, sample):
    """The seed of one response: a function of what it is, never of who samples it. Within a group no two are equal."""
    digest = hashlib.sha256(f"{seed} {step} {problem_id}".encode()).digest()
    return (int.from_bytes(digest[:4], "big") + sample) & 0x7FFFFFFF


def stop_ids(model, tokenizer):
    """What ends a response: the model's and the tokenizer's end, and that of a chat turn, which base models leave out."""
    from transformers import GenerationConfig

    ids = {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|im_end|>")}
    with contextlib.suppress(OSError):  # no generation_config.json
        eos = GenerationConfig.from_pretrained(model).eos_token_id
        ids |= set(eos if isinstance(eos, list) else [eos])
    return sorted(ids - {None})


@dataclass(frozen=True)
class Sampling:
    temperature: float
    top_p: float
    top_k: int  # 0: all
    max_response_len: int


class Engine:
    def __init__(self, args, tokenizer):
        self.args, self.tokenizer, self.stop = args, tokenizer, stop_ids(base_of(args.model), tokenizer)
        self.sampling = Sampling(args.temperature, args.top_p, args.top_k, args.max_response_len)
        self.idle = 0.0

    def generate(self, problems, n, step, sampling=None):
        """n responses to each problem, problem by problem, the same list on every process.

        `step`, whatever it is, is for the seeds; `sampling` is that of the rollouts unless told.
        """
        requests = [(p, seed_of(self.args.seed, step, p["id"], i)) for p in problems for i in range(n)]
        share = self.args.vllm_tensor_parallel  # processes that sample together, with the same requests
        mine = requests[rank() // share :: world() // share]  # a group is scattered: its long responses do not meet
        prompts, seeds = [p["prompt_ids"] for p, _ in mine], [seed for _, seed in mine]
        found, since = self.sample(prompts, seeds, sampling or self.sampling), time.perf_counter()
        barrier()
        self.idle += time.perf_counter() - since
        sampled = in_turn(all_gather(found if rank() % share == 0 else [])[::share])
        texts = self.tokenizer.batch_decode([ids for ids, _ in sampled], skip_special_tokens=True)
        return [
            Response(problem, ids, logp, int(ids[-1]) not in self.stop, text)
            for (problem, _), (ids, logp), text in zip(requests, sampled, texts)
        ]

    def waited(self):
        """-> seconds that this process has waited for the others' samples, since the last call"""
        idle, self.idle = self.idle, 0.0
        return idle

    def wake(self):
        pass

    def sleep(self):
        pass

    def close(self):
        pass


class VllmEngine(Engine):
    """vLLM in this process, one engine a GPU. Asleep it holds neither weights nor cache (on a CPU it never sleeps)."""

    def __init__(self, args, tokenizer, alone=False):
        super().__init__(args, tokenizer)
        cuda = torch.cuda.is_available()
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if cuda else "ERROR")  # else a warning at each sleep
        join_group()
        if not cuda:
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(math.ceil(args.kv_cache_gib or 1))  # GiB
            import vllm._custom_ops

            vllm._custom_ops._supports_onednn = False  # else layers keep packed copies, and `load` misses a tied head
        from vllm import LLM

        longest, head = plan.longest(args), {"head_dtype": "float32"} if args.head_dtype == "float32" else {}
        with own_rng():  # LLM() seeds python's, numpy's and torch's generators, alike on every process
            self.llm = LLM(
                base_of(args.model),
                dtype=str(compute_dtype()).removeprefix("torch."),
                distributed_executor_backend="external_launcher",  # in process, in the process group that is there
                tensor_parallel_size=args.vllm_tensor_parallel,
                load_format="dummy",  # `load` brings the weights before the first sample
                enable_sleep_mode=cuda and args.sleep == "on",
                enforce_eager=not cuda,  # CUDA graphs on a GPU; no half minute of compiling on a CPU
                kv_cache_memory_bytes=kv_cache_bytes(args, alone) if cuda else None,
                gpu_memory_utilization=0.01 if cuda else 0.3,  # so much has to be free at once; the plan knows better
                max_model_len=longest,
                max_num_seqs=plan.MAX_SEQS,
                max_num_batched_tokens=8192 if cuda else max(8192, longest),
                enable_chunked_prefill=cuda,  # on a CPU vLLM cannot put back the seed of a prompt it has read in part
                logprobs_mode="processed_logprobs",  # after temperature, top-k and top-p
                hf_overrides=head,  # as in the trainer
                generation_config="vllm",  # sampling as we say, not as the checkpoint says
                seed=args.seed,
            )
        use_tf32()
        self.sleep()

    def wake(self):
        gc.collect()
        torch.cuda.empty_cache()  # what the trainer's allocator keeps for later is not free for vLLM
        self.llm.wake_up(tags=["weights"])

    def load(self, model):
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights(model)})
        self.llm.reset_prefix_cache()  # its keys and values came from the old weights
        torch.cuda.empty_cache()  # of the weights that passed
        self.llm.wake_up(tags=["kv_cache"])

    def sample(self, prompts, seeds, how):
        from vllm import SamplingParams

        settings = dict(temperature=how.temperature, top_p=how.top_p, top_k=how.top_k, max_tokens=how.max_response_len)
        settings |= dict(stop_token_ids=self.stop, logprobs=0, flat_logprobs=True, detokenize=False)
        params = [SamplingParams(seed=seed, **settings) for seed in seeds]
        outs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        outs = [out.outputs[0] for out in outs]
        return [(torch.tensor(out.token_ids), torch.tensor(out.logprobs.logprobs)) for out in outs]

    def sleep(self):
        self.llm.sleep(level=2)  # without vLLM's sleep mode it only stops taking requests

    def close(self):
        self.llm.llm_engine.engine_core.shutdown()  # before Accelerate's end: it takes the process group along


class HfEngine(Engine):
    """The same methods over a transformers model, for machines without vLLM. It never sleeps."""

    def __init__(self, args, tokenizer):
        super().__init__(args, tokenizer)
        from transformers import AutoModelForCausalLM

        lm = AutoModelForCausalLM.from_pretrained(
            base_of(args.model), dtype=compute_dtype(), attn_implementation="sdpa"
        )
        self.lm = lm.to(device()).eval().requires_grad_(False)

    def load(self, model):
        mine = dict(self.lm.named_parameters())
        for name, p in weights(model):
            mine.pop(name).copy_(p)
        assert not mine, f"weights that were not loaded: {sorted(mine)}"

    def sample(self, prompts, seeds, how):
        parts = [slice(i, i + HF_ROWS) for i in range(0, len(prompts), HF_ROWS)]
        return [row for part in parts for row in self.sample_rows(prompts[part], seeds[part], how)]

    @torch.no_grad()
    def sample_rows(self, prompts, seeds, how):
        from transformers import DynamicCache

        rows, width = torch.arange(len(prompts)), max(map(len, prompts))
        noise = [torch.rand(how.max_response_len, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        noise, cache = torch.stack(noise), DynamicCache(config=self.lm.config)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device())  # (B, T), padded on the left
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device())  # (B, T)
        lengths = torch.full((len(prompts),), how.max_response_len)
        tokens = torch.zeros(len(prompts), how.max_response_len, dtype=torch.long)
        logps = torch.zeros(len(prompts), how.max_response_len)
        for t in range(how.max_response_len):
            inputs = dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1)[:, -ids.shape[1] :])
            logits = self.lm(**inputs, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()  # (B, V)
            logp = keep_likeliest(logits / how.temperature, how.top_p, how.top_k).log_softmax(-1)  # (B, V)
            token = draw(logp, noise[rows, t].to(device()))  # (B,)
            tokens[rows, t], logps[rows, t] = token.cpu(), logp.gather(1, token[:, None])[:, 0].cpu()
            ended = rows[torch.isin(tokens[rows, t], torch.tensor(self.stop))]
            lengths[ended] = lengths[ended].clamp(max=t + 1)
            going = lengths[rows] > t + 1  # (B,)
            if not going.any():
                break
            ids, mask = token[:, None], F.pad(mask, (0, 1), value=1)
            if going.float().mean() < HF_CROWD:
                keep = going.nonzero()[:, 0].to(device())
                cache.batch_select_indices(keep)
                rows, ids, mask = rows[going], ids[keep], mask[keep]
        return [(tokens[i, :length].clone(), logps[i, :length].clone()) for i, length in enumerate(lengths.tolist())]


def keep_likeliest(logits, top_p, top_k):  # (B, V) -> (B, V), minus infinity where nothing may be sampled
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = TopKLogitsWarper(min(top_k, logits.shape[1]))(None, logits) if top_k else logits
    return TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits


def draw(logp, uniform):  # (B, V), (B,) in [0, 1) -> (B,), where the running total of probability passes `uniform`
    total = logp.double().exp().cumsum(-1)  # double, so that uniform x total[-1] stays below total[-1]
    return torch.searchsorted(total, uniform.double()[:, None] * total[:, -1:], right=True)[:, 0]


def kv_cache_bytes(args, alone):
    from transformers import AutoConfig

    shape = plan.shape(AutoConfig.from_pretrained(base_of(args.model)))
    return int(plan.kv_cache(args, shape, world(), plan.here()[1], alone)[0])


def make_engine(args, tokenizer, alone=False):
    """alone: nobody trains beside it, so that vLLM's cache may have that room too"""
    return VllmEngine(args, tokenizer, alone) if uses_vllm(args) else HfEngine(args, tokenizer)


def uses_vllm(args):
    return args.engine == "vllm" or (
        args.engine == "auto" and torch.cuda.is_available() and importlib.util.find_spec("vllm")
    )
