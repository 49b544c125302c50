"""What one GPU does in a second, as JSON: `python tests/bench_gpu.py`, ten minutes on an H100. Not collected by pytest.

A Qwen3 of 0.6 billion parameters (--size 4B: of 4) is made from its configuration with random weights; it ends a response once in
152,000 tokens, so that nearly all are as long as their limit. Times are medians, in seconds; memory is in GiB.
--size tiny does the same with the laptop's model on whatever machine there is, to see that the bench runs.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from infra import engines, flags, packs, plan, processes, runs  # noqa: E402
from infra import policy as policy_module  # noqa: E402

GIB = plan.GIB
BASE = str(processes.ROOT / "data" / "tiny" / "base")
SIZES = {  # hidden, inner, layers, heads; prompts, responses to each, tokens of a response; tokens of a pack
    "0.6B": ((1024, 3072, 28, 16), (16, 8, 2048), 16384),
    "4B": ((2560, 9728, 36, 32), (16, 4, 2048), 16384),
    "tiny": (None, (4, 2, 32), 512),
}
ROUNDS = 5
CUDA = torch.cuda.is_available()


def make_model(size, folder):
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    hidden, inner, layers, heads = SIZES[size][0]
    config = Qwen3Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=32768, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(processes.device()):
        Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)


def settings(model, tokens, response_len):
    machine = {name: node for name, (_, node) in flags.MACHINE.items()}
    paper = dict(model=model, temperature=1.0, top_p=1.0, top_k=0, max_prompt_len=64, max_response_len=response_len)
    paper |= dict(eval_max_response_len=response_len, seed=1, lora_rank=0, lr=1e-6, weight_decay=0.0, reference=False)
    return argparse.Namespace(**machine | paper | {"tokens_per_gpu": tokens})


def clock(function, *arguments):
    """-> seconds, result"""
    if CUDA:
        torch.cuda.synchronize()
    since = time.perf_counter()
    result = function(*arguments)
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - since, result


def free():
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] / GIB if CUDA else 0.0


def make_trainer(args):
    model = policy_module.load_policy(args)
    return model, policy_module.make_optimizer(args, model)


def full_pack(args, longest):
    """Sequences of one prompt and `longest` random tokens each, as many as go into a pack"""
    g, count = torch.Generator().manual_seed(0), args.tokens_per_gpu // (longest + 16)
    ids = [torch.randint(5, 90, (longest,), generator=g) for _ in range(count)]
    problem = {"id": "1", "prompt_ids": list(range(5, 21))}
    return packs.Pack([engines.Response(problem, x, torch.zeros(longest), True, "") for x in ids], range(count))


def update(model, optimizer, pack):
    logp, _ = model(pack, 1.0)
    (logp.sum() / len(logp)).backward()
    optimizer.step()
    optimizer.zero_grad()


def bench_training(args, shape, longest):
    """Forward, backward and step of a full pack, for each way to compute it"""
    rates, found = plan.rates(plan.local_gpus()[2]), {}
    ways = {"": {}, "head_dtype model": {"head_dtype": "model"}, "compile on": {"compile": "on"}}
    chunks = {f"HEAD_CHUNK {n}": n for n in (1024, 4096)}
    for name in [*ways, *chunks]:
        how = argparse.Namespace(**vars(args) | ways.get(name, {}))
        usual = policy_module.HEAD_CHUNK
        policy_module.HEAD_CHUNK = chunks.get(name, usual)
        free()
        before = torch.cuda.memory_allocated() if CUDA else 0
        model, optimizer = make_trainer(how)
        pack = full_pack(how, longest)
        first, _ = clock(update, model, optimizer, pack)
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(clock(update, model, optimizer, pack)[0] for _ in range(ROUNDS))
        row = {"first": first, "seconds": seconds, "tokens_per_s": len(pack.ids) / seconds}
        if CUDA:
            row["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / GIB
            row["planned_gib"] = sum(row[1] for row in plan.trainer(how, shape, 1).values()) / GIB
            row["mfu"] = shape.flops(pack.lengths) / seconds / rates[0] if rates else None
        found[name or "default"] = row
        policy_module.HEAD_CHUNK = usual
        del model, optimizer
    return found


def bench_engine(args, shape, tokenizer, prompts, n, length, kind):
    """vLLM beside a trainer: what sleep gives back, what a step's switches cost, sampling in the loop against vLLM alone"""
    model, optimizer = make_trainer(args)
    before, cache = free(), int(plan.kv_cache(args, shape, 1, plan.local_gpus()[1])[0])
    start, engine = clock(kind, args, tokenizer, cache)
    problems = [{"id": str(i), "prompt_ids": list(range(5, 21 + i))} for i in range(prompts)]
    how = engines.Sampling(1.0, 1.0, 0, length)
    times = {"wake": [], "load": [], "generate": [], "bare": [], "sleep": []}
    k3, left, awake = [], [], 0.0
    for cycle in range(4 * ROUNDS):
        times["wake"].append(clock(engine.wake)[0])
        times["load"].append(clock(engine.load, model)[0])
        awake = awake or free()
        if cycle < ROUNDS:
            seconds, batch = clock(engine.generate, problems, n, cycle, how)
            times["generate"].append(seconds)
            requests = [p["prompt_ids"] for p in problems for _ in range(n)]
            seeds = [cycle * 1000 + i for i in range(len(requests))]
            times["bare"].append(clock(engine.sample, requests, seeds, how)[0])
        times["sleep"].append(clock(engine.sleep)[0])
        left.append(free())
        if cycle < ROUNDS:
            pack = packs.Pack(batch, range(max(1, args.tokens_per_gpu // (length + 64))))
            with torch.no_grad():
                gap = model(pack, 1.0)[0] - pack.engine_logp
            k3.append((gap.exp() - 1 - gap).mean().item())
    tokens = sum(len(r.ids) for r in batch)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    step = sum(v for name, v in seconds.items() if name != "bare")
    found = {"start": start, "seconds": seconds, "tokens_per_s": tokens / seconds["generate"]}
    found["share_of_bare_vllm"] = seconds["bare"] / seconds["generate"]
    found["switching_share_of_sampling"] = (step - seconds["generate"]) / step
    found["awake_gib"], found["asleep_gib"] = before - awake, before - left[0]
    found["returned_share"] = (left[0] - awake) / (before - awake) if before > awake else None
    found["leak_gib_in_18_cycles"], found["k3"] = left[1] - left[-1], max(k3)
    engine.close()
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=SIZES, default="0.6B")
    p.add_argument("--engine", choices=["vllm", "hf"], default="vllm")
    p.add_argument("--only", choices=["training", "engine"])
    given = p.parse_args()
    _, (prompts, n, length), tokens = SIZES[given.size]
    processes.join_group()
    from transformers import AutoConfig, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        model = BASE if given.size == "tiny" else folder
        if model == folder:
            make_model(given.size, folder)
        args = settings(model, tokens, length)
        shape = plan.Shape(AutoConfig.from_pretrained(model))
        found = {"versions": runs.versions(), "size": given.size, "parameters": shape.params, "pack": tokens}
        found["responses"] = f"{prompts * n} of {length} tokens"
        if given.only != "engine":
            found["training"] = bench_training(args, shape, length)
        if given.only != "training":
            kind = engines.VllmEngine if given.engine == "vllm" else engines.HfEngine
            found["engine"] = bench_engine(args, shape, AutoTokenizer.from_pretrained(model), prompts, n, length, kind)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
