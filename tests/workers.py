"""What the tests run under torchrun, in several processes: `workers.py FILE NAME ARGUMENTS / NAME ARGUMENTS ...`.

The first process leaves what it got, for each NAME in turn, in FILE: starting them takes longer than what they do.
"""

import math
import sys
import time
from argparse import Namespace
from pathlib import Path

import accelerate
import pytest
import torch
import torch.distributed as dist
from conftest import engine_args, load_policy, make_batch

import common
from infra import packs, processes, runs
from infra import policy as policy_module
from lite_ppo import advantages, policy_loss, token_weights


def gradient(sharding, tokens_per_gpu, survivors):
    """-> loss, gradient of one optimizer step on the first of twelve fixed responses, the fourth and ninth filtered out"""
    accelerator = accelerate.Accelerator(cpu=True)
    torch.set_num_threads(1)
    policy = load_policy()
    policy.lm.train().gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )  # as on a GPU
    model = policy_module.shard(policy, engine_args(sharding=sharding))
    batch = make_batch(12)
    lengths = torch.tensor([float(len(r.ids)) for r in batch])
    lengths[[3, 8]] = lengths[int(survivors) :] = 0
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 0, 1]).view(3, 4)
    adv, weight = advantages(rewards, "group_mean_batch_std").flatten(), token_weights(lengths, "seq_mean", 64)
    total = 0.0
    [mini] = packs.minibatches(batch, lengths > 0, torch.ones(12), 1, int(tokens_per_gpu))
    for pack in mini:
        logp, _ = model(pack, 0.9)
        loss, *_ = policy_loss(logp, logp.detach() - 0.1, adv[pack.rows], 0.2, 0.28)
        loss = (loss * weight[pack.rows]).sum()
        accelerator.backward(loss * accelerator.num_processes)
        total += loss.item()
    return sum(processes.all_gather(total)), torch.cat(
        [policy_module.unsharded(p.grad).flatten() for p in model.parameters()]
    )


def streamed(sharding, dtype, lora_rank):
    """-> what an engine is sent of the laptop's base model, the trainer computing in this precision"""
    accelerate.Accelerator(cpu=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_module, "compute_dtype", lambda: getattr(torch, dtype))
        model = policy_module.shard(load_policy(lora_rank=int(lora_rank)), engine_args(sharding=sharding))
        return {name: p.clone() for name, p in policy_module.weights(model)}


def noted(folder):
    """-> the row of metrics of a step in which the first process notes one thing and the second another"""
    accelerate.Accelerator(cpu=True)
    log = runs.Log(Namespace(out=folder, steps=1, log_tokens="off"), 0, {}, None, None)
    if processes.rank() == 1:
        log.mean("train/own", [5.0])
        log.max("train/own_max", torch.tensor([7.0]))
    log.mean("train/shared", [1.0 + processes.rank()] * (1 + processes.rank()))  # 1 on the first, 2 and 2 on the second
    log.max("train/shared_max", torch.tensor([float(processes.rank())]))
    log.max("train/empty", torch.zeros(0))
    log.mean("train/no_number", [math.inf])
    if processes.rank() == 0:
        log.mean("train/first", [3.0])
    log.write(0)
    return runs.read_jsonl(Path(folder) / "metrics.jsonl")[0][1] if processes.rank() == 0 else None


def summed(tokens_per_gpu):
    """-> how many tokens each of twelve fixed responses has, counted in packs; the fourth is in none"""
    accelerate.Accelerator(cpu=True)
    batch = make_batch(12)
    in_loss = torch.ones(12, dtype=torch.bool)
    in_loss[3] = False
    minis = packs.minibatches(batch, in_loss, in_loss, 2, int(tokens_per_gpu))
    every = [pack for mini in minis for pack in mini]
    return common.per_response(every, [torch.ones(len(pack.labels)) for pack in every], 12)


if __name__ == "__main__":
    path, *calls = sys.argv[1:]
    calls = [call.split() for call in " ".join(calls).split(" / ")]
    results = [globals()[name](*arguments) for name, *arguments in calls]
    if processes.rank() == 0:
        torch.save(results, path)
    time.sleep(common.GLOO_REST)
    dist.destroy_process_group()
