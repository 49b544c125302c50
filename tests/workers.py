"""What the tests run under torchrun: the gradient of a fixed batch, from real packs and a real backward pass."""

import os
import sys
import time

import accelerate
import torch
from conftest import engine_args, load_policy, make_batch

import common
from lite_ppo import advantages, policy_loss, token_weights


def gradient(tokens_per_gpu, survivors, sharding):
    """-> loss, gradient of one optimizer step on the first of twelve fixed responses, the fourth and ninth filtered out"""
    accelerator = accelerate.Accelerator(cpu=True)
    torch.set_num_threads(1)
    model = common.shard(load_policy(), engine_args(sharding=sharding))
    batch = make_batch(12)
    lengths = torch.tensor([float(len(r.ids)) for r in batch])
    lengths[[3, 8]] = lengths[survivors:] = 0
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 0, 1]).view(3, 4)
    adv, weight = advantages(rewards, "group_mean_batch_std").flatten(), token_weights(lengths, "seq_mean", 64)
    total = 0.0
    [packs] = common.minibatches(batch, lengths > 0, torch.ones(12), 1, tokens_per_gpu)
    for pack in packs:
        logp, _ = common.logprobs(model, pack, 0.9)
        loss, _ = policy_loss(logp, logp.detach() - 0.1, adv[pack.rows], 0.2, 0.28)
        loss = (loss * weight[pack.rows]).sum()
        accelerator.backward(loss * accelerator.num_processes)
        total += loss.item()
    return sum(common.all_gather(total)), torch.cat([common.gathered(p.grad).flatten() for p in model.parameters()])


if __name__ == "__main__":
    result = gradient(int(sys.argv[1]), int(sys.argv[2]), sys.argv[4])
    if int(os.environ["RANK"]) == 0:
        torch.save(result, sys.argv[3])
    time.sleep(common.GLOO_REST)
    torch.distributed.destroy_process_group()
