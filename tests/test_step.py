"""Whole rollouts by hand: two of them by the real script, and again in the plainest way, one response and one token at a time.

What the engine sampled is taken as it is; from there on nothing of the project is used: rewards by comparing integers,
moments by Python's `statistics`, log-probabilities from dense logits of one sequence, the losses in a loop over tokens.
"""

import copy
import re
import statistics

import pytest
import torch
from conftest import BASE, run_main

import common
import dapo
import grpo
import lite_ppo

SHORT = [  # two rollouts in which every part has something to do: clips, warm-up, a cut gradient, truncated responses
    *(
        "--scale",
        "laptop",
        "--data",
        "medium",
        "--eval_data",
        "eval_easy",
        "--steps",
        2,
        "--prompts_per_step",
        4,
        "--weight_decay",
        0.1,
    ),
    *("--group_size", 4, "--minibatches", 2, "--lr", 2e-3, "--warmup_steps", 3, "--max_grad_norm", 0.2),
    *("--temperature", 0.8, "--max_response_len", 40, "--tokens_per_gpu", 160, "--clip_low", 0.03, "--clip_high", 0.05),
]
CASES = {
    "grpo": (grpo, {"kl_coef": 0.5}),
    "grpo_k2": (grpo, {"kl_coef": 0.5, "kl_estimator": "k2", "wrong_reward": -1}),
    "grpo_k1": (grpo, {"kl_coef": 0.5, "kl_estimator": "k1", "norm": "batch_mean_batch_std", "loss_agg": "constant"}),
    "dapo": (dapo, {"overlong_buffer": 20}),
    "dapo_filter": (dapo, {"overlong": "filter", "max_resample": 1, "loss_agg": "seq_mean"}),
    "dapo_plain": (dapo, {"dynamic_sampling": "off", "overlong": "keep", "norm": "batch_mean"}),
    "lite_ppo": (lite_ppo, {}),
    "lite_ppo_filter": (
        lite_ppo,
        {"overlong": "filter", "wrong_reward": -1, "norm": "group_mean", "loss_agg": "constant"},
    ),
    "lite_ppo_none": (lite_ppo, {"overlong": "filter", "norm": "none", "loss_agg": "seq_mean"}),
}


def moments(norm, rewards, group):  # -> what is subtracted from a reward of this group, and what it is divided by
    everything = [r for g in rewards for r in g]
    mean = {"none": lambda: 0, "group": lambda: statistics.mean(group), "batch": lambda: statistics.mean(everything)}
    std = {"group_std": lambda: statistics.stdev(group), "batch_std": lambda: statistics.stdev(everything)}
    return mean[norm.split("_")[0]](), std[norm[-9:].lstrip("_")]() + 1e-6 if norm.endswith("std") else 1


def logprobs(lm, response, temperature):  # -> of the response's tokens, the end token among them
    prompt, ids = torch.tensor(response.problem["prompt_ids"]), response.ids
    logits = lm(input_ids=torch.cat([prompt, ids])[None]).logits[0] / temperature
    return torch.stack([logits[len(prompt) - 1 + t].log_softmax(-1)[token] for t, token in enumerate(ids)])


def is_right(response):
    boxes = re.findall(r"\\boxed\{(-?\d+)\}", response.text)
    return bool(boxes) and int(boxes[-1]) == int(response.problem["answer"])


def kl(d, estimator):
    return {"k1": d, "k2": d * d / 2, "k3": torch.exp(-d) - 1 + d}[estimator]


def train_by_hand(args, rollouts):
    """-> the weights after these rollouts"""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
    ref = copy.deepcopy(lm)
    optimizer = torch.optim.AdamW(lm.parameters(), weight_decay=args.weight_decay)
    for step, sampled in enumerate(rollouts):
        groups = [sampled[i : i + args.group_size] for i in range(0, len(sampled), args.group_size)]
        if getattr(args, "dynamic_sampling", "off") == "on":
            groups = [group for group in groups if 0 < sum(map(is_right, group)) < args.group_size]
        groups = groups[: args.prompts_per_step]
        rewards = [[1 if is_right(r) else args.wrong_reward for r in group] for group in groups]
        overlong = getattr(args, "overlong", "keep")
        if overlong == "penalty":
            soft = args.max_response_len - args.overlong_buffer
            for group, group_rewards in zip(groups, rewards):
                for i, r in enumerate(group):
                    group_rewards[i] -= max(0, len(r.ids) - soft) / args.overlong_buffer
        todo = []
        for group, group_rewards in zip(groups, rewards):
            mean, std = moments(args.norm, rewards, group_rewards)
            todo += [(r, (reward - mean) / std) for r, reward in zip(group, group_rewards)]
        with torch.no_grad():
            old = [logprobs(lm, r, args.temperature) for r, _ in todo]
            far = [logprobs(ref, r, args.temperature) for r, _ in todo]
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / args.warmup_steps)
        first, parts = 0, []
        for m in range(args.minibatches):
            last = first + len(todo) // args.minibatches + (m < len(todo) % args.minibatches)
            parts, first = parts + [range(first, last)], last
        for part in parts:
            part = [i for i in part if not (overlong == "filter" and todo[i][0].truncated)]
            tokens, loss = sum(len(todo[i][0].ids) for i in part), 0
            for i in part:
                r, adv = todo[i]
                share = {"token_mean": 1 / tokens, "seq_mean": 1 / len(part) / len(r.ids)}
                share["constant"] = 1 / len(part) / args.max_response_len
                for new, before, start in zip(logprobs(lm, r, args.temperature), old[i], far[i]):
                    ratio = torch.exp(new - before)
                    cut = min(max(ratio, torch.tensor(1 - args.clip_low)), torch.tensor(1 + args.clip_high))
                    term = min(ratio * adv, cut * adv)
                    if getattr(args, "kl_coef", 0):
                        term = term - args.kl_coef * kl(new - start, args.kl_estimator)
                    loss = loss - share[args.loss_agg] * term
            if part:
                loss.backward()
                torch.nn.utils.clip_grad_norm_(lm.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
    return lm


@pytest.mark.parametrize("script, settings", CASES.values(), ids=CASES)
def test_two_rollouts_by_hand(script, settings, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    generate, rollouts, parsed = engines.Engine.generate, {}, []

    def listen(engine, problems, n, step, *how):
        batch = generate(engine, problems, n, step, *how)
        if step != "eval":
            rollouts.setdefault(step[0] if isinstance(step, tuple) else step, []).extend(batch)
        return batch

    start = common.start
    monkeypatch.setattr(common, "start", lambda args: parsed.append(args) or start(args))
    monkeypatch.setattr(engines.Engine, "generate", listen)
    flags = [x for k, v in settings.items() for x in (f"--{k}", v)]
    rows = run_main(monkeypatch, script, *SHORT, *flags, "--out", tmp_path / "run")
    want = train_by_hand(parsed[0], [rollouts[0], rollouts[1]]).state_dict()
    got, before = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (tmp_path / "run" / "checkpoints" / "step_000002", BASE)
    )
    flat = [torch.cat([(weights[name] - before[name]).flatten() for name in before]) for weights in (got, want)]
    off = float((flat[0] - flat[1]).norm() / flat[1].norm())
    print(f"{script.__name__} {settings}: the update differs by {off:.1e} of its length")
    assert off < 1e-3
    # every part had something to do
    assert rows[1]["train/clip_low"] + rows[1]["train/clip_high"] > 0 and rows[0]["train/grad_norm"] > 0.2
    assert 0 < rows[0]["rollout/truncated"] < 1
    if getattr(parsed[0], "dynamic_sampling", "off") == "on":
        assert rows[0]["rollout/sampled_responses"] > 16
    assert [row["train/lr"] for row in rows[:2]] == pytest.approx([2e-3 / 3, 4e-3 / 3])
