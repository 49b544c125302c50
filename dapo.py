"""DAPO: GRPO without the KL, and what can be switched off one by one.                                          arXiv 2503.14476

    A_i  = (r_i - mean of its group) / std of its group                                      --norm      advantages
    L    = - sum_i w_i sum_t min(ratio_it A_i, clip(ratio_it, 1 - low, 1 + high) A_i)        --clip_*    policy_loss
    w_i  = 1 / sum_j |o_j|, every token counts the same                                      --loss_agg  token_weights
    r_i  = 1 or -1, right or wrong, + clip((limit - buffer - |o_i|) / buffer, -1, 0)         --overlong  overlong_penalty
    A group is kept if 0 < number of its right responses < G                                 --dynamic_* KEEPS

    technique                   flag                       off
    Clip-Higher                 --clip_high 0.28           0.2
    token-level loss            --loss_agg token_mean      seq_mean
    dynamic sampling            --dynamic_sampling on      off
    soft overlong punishment    --overlong penalty         keep; or filter, the paper's other way with truncated responses
    group-level normalization   --norm                     none: the fifth, as arXiv 2508.08221 counts

The limit is --max_response_len. P prompts, G responses to each, N = P G responses in a batch; P' prompts were sampled to
find P with groups to keep. T tokens of one pack of responses, one after the other.

    accelerate launch dapo.py --dynamic_sampling off
"""

import math
import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: idle threads soon leave their cores

import torch

import common
from rewards import GradePool

DEFAULTS = {  # flag: (laptop, node). Node is the paper. What it leaves open is marked so; the model and the evaluation
    # are those of the study, arXiv 2508.08221, so that the scripts can be compared
    "norm": ("group_mean_group_std", "group_mean_group_std"),  # equation 9
    "loss_agg": ("token_mean", "token_mean"),  # section 3.3; over the mini-batch, as in the authors' recipe
    "clip_low": (0.2, 0.2),  # section 4.1
    "clip_high": (0.28, 0.28),  # sections 3.1 and 4.1: Clip-Higher
    "overlong": ("penalty", "penalty"),  # section 3.4
    "overlong_buffer": (40, 4096),  # section 4.1
    "dynamic_sampling": ("on", "on"),  # section 3.2
    "max_resample": (4, 9),  # open; the authors' recipe gives up after 10 rounds, of three times as many prompts
    "wrong_reward": (-1, -1),  # equation 7
    "model": ("data/tiny/base", "Qwen/Qwen3-4B-Base"),  # the study's; the paper: Qwen2.5-32B
    "template": ("chat", "chat"),  # the study's; the paper asks for a last line "Answer: ..."
    "enable_thinking": ("on", "on"),  # not stated; the models' own default
    "data": ("hard", "dapo"),  # section 3.5
    "eval_data": (
        "eval_easy,eval_medium,eval_hard,eval_plus,eval_minus,eval_long",
        "math500,olympiadbench,minerva_math,amc23,aime24,aime25",  # the study's; the paper: aime24
    ),
    "steps": (80, 500),  # open
    "prompts_per_step": (16, 512),  # section 4.1
    "group_size": (8, 16),  # section 4.1
    "minibatches": (4, 16),  # section 4.1
    "lr": (1e-4, 1e-6),  # section 4.1
    "weight_decay": (0.0, 0.1),  # open; the authors' recipe
    "lora_rank": (0, 0),  # all weights are trained
    "warmup_steps": (0, 20),  # section 4.1
    "old_logp": ("rollout", "recompute"),  # the authors' recipe
    "max_grad_norm": (1.0, 1.0),  # open; the authors' recipe
    "temperature": (1.0, 1.0),  # open; the authors' recipe
    "top_p": (1.0, 1.0),  # open; the authors' recipe (section 4.1 evaluates with 0.7)
    "top_k": (0, 0),  # open; the authors' recipe
    "max_prompt_len": (64, 2048),  # open; the authors' recipe
    "max_response_len": (192, 20480),  # section 4.1: 16,384 and the buffer
    "seed": (1, 42),  # the study's
    "eval_every": (40, 20),  # open
    "eval_samples": (1, 8),  # the study's; the paper: 32
    "eval_pass_k": (0, 0),  # as many as are sampled
    "eval_temperature": (1.0, 0.99),  # the study's: 0.99 in training (section 4.1: 1.0)
    "eval_top_p": (1.0, 0.99),  # the study's (section 4.1: 0.7)
    "eval_top_k": (0, 100),  # as the temperature
    "eval_max_response_len": (192, 20480),  # as in training
    "save_every": (20, 20),  # the study's
}

EPS = 1e-6  # added to every standard deviation


def group_mean(r):  # (P, G) -> (P, 1); relative to one of them, so that equal rewards have exactly their own mean
    return r[:, :1] + (r - r[:, :1]).mean(1, keepdim=True)


def batch_mean(r):  # (P, G) -> (), in the same way
    return group_mean(r.flatten()[None])[0, 0]


def group_std(r):  # (P, G) -> (P, 1), unbiased
    return r.std(1, keepdim=True) + EPS


def batch_std(r):  # (P, G) -> (), unbiased, of the raw rewards
    return r.std() + EPS


NORMS = {
    "none":                 lambda r: r,
    "group_mean":           lambda r: r - group_mean(r),
    "batch_mean":           lambda r: r - batch_mean(r),
    "group_mean_group_std": lambda r: (r - group_mean(r)) / group_std(r),  # GRPO
    "batch_mean_batch_std": lambda r: (r - batch_mean(r)) / batch_std(r),  # REINFORCE++
    "group_mean_batch_std": lambda r: (r - group_mean(r)) / batch_std(r),  # Lite PPO
}  # fmt: skip


def advantages(rewards, norm):  # (P, G) -> (P, G)
    return NORMS[norm](rewards)


LOSS_AGGS = {  # lengths (n,) of the responses of one mini-batch, of which those with length 0 are left out -> (n,)
    "token_mean": lambda lengths, max_len: 1 / lengths.sum(),  # every token counts the same
    "seq_mean": lambda lengths, max_len: 1 / (lengths > 0).sum() / lengths,  # every response counts the same
    "constant": lambda lengths, max_len: 1 / (lengths > 0).sum() / max_len,  # Dr. GRPO
}


def token_weights(lengths, loss_agg, max_len):  # (n,) -> (n,), the weight of one token of response i
    weight = torch.ones_like(lengths) * LOSS_AGGS[loss_agg](lengths, max_len)
    return torch.where(lengths > 0, weight, 0.0)


def policy_loss(logp, old_logp, adv, clip_low, clip_high):  # (T,) each -> loss, ratio (T,); low, high (T,) bool
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    low, high = (clipped > ratio) & (adv < 0), (clipped < ratio) & (adv > 0)  # the bound that leaves it no gradient
    return -torch.min(ratio * adv, clipped * adv), ratio, low, high


def overlong_penalty(lengths, limit, buffer):  # (N,) -> (N,)
    return ((limit - buffer - lengths) / buffer).clamp(-1, 0)


KEEPS = {  # is the response right? (P', G) -> is the group kept? (P',)
    "on": lambda correct: correct.any(1) & ~correct.all(1),
    "off": lambda correct: torch.ones(len(correct), dtype=torch.bool),
}


def parse_args(argv=None):
    p = common.Parser(__file__, __doc__, DEFAULTS)
    p.add_argument("--norm", choices=NORMS, help="The advantage: a reward less which mean, over which deviation.")
    p.add_argument("--loss_agg", choices=LOSS_AGGS, help="The weight of a token: the same for all, or by its response.")
    p.add_argument("--clip_low", type=common.number(float, 0, 1), help="The ratio is clipped below 1 - clip_low.")
    p.add_argument("--clip_high", type=common.number(float, 0), help="The ratio is clipped above 1 + clip_high.")
    text = "Truncated responses: filter, not trained on; penalty, long ones lose reward."
    p.add_argument("--overlong", choices=["keep", "filter", "penalty"], help=text)
    p.add_argument("--overlong_buffer", type=common.COUNT, help="Tokens below the limit over which the penalty grows.")
    p.add_argument("--dynamic_sampling", choices=KEEPS, help="Whether others replace groups all right or all wrong.")
    p.add_argument("--max_resample", type=common.COUNT, help="Rounds of sampling after the first, at most.")
    p.add_argument("--wrong_reward", type=int, choices=[0, -1], help="The reward of a wrong response; right is 1.")
    args = common.parse_args(p, argv)
    alike = torch.tensor([[1.0, 1.0], [0.0, 0.0]])[: args.prompts_per_step]  # in each group, as in one of one
    if args.group_size == 1 and not advantages(alike, args.norm).any():
        common.fail(f"--group_size 1: has no advantage under --norm {args.norm}; give 2 or more")
    if args.group_size == 1 and args.dynamic_sampling == "on":
        common.fail("--group_size 1: is all right or all wrong; give 2 or more, or --dynamic_sampling off")
    if args.overlong == "penalty" and args.overlong_buffer > args.max_response_len:
        common.fail(
            f"--overlong_buffer {args.overlong_buffer}: longer than the limit; give at most "
            f"--max_response_len {args.max_response_len}"
        )
    if args.minibatches == 1 and common.rank() == 0:
        print("--minibatches 1: the ratio is always 1, so that --clip_low and --clip_high do nothing")
    return args


def main():
    args = parse_args()
    accelerator, model, optimizer, engine, problems, log = common.start(args)
    pool = GradePool()
    for step in range(log.first_step, args.steps + 1):
        # rollout: G responses to each prompt, from the current policy, until P groups can be kept
        engine.wake()
        log.lap("wake")
        engine.load(model)
        log.lap("sync")
        if step % args.eval_every == 0 or step == args.steps:
            common.evaluate(engine, pool, log, step)
        if step == args.steps:
            break
        sampled, correct, lengths = [], [], []
        for attempt in range(1 + args.max_resample):
            key = (step, attempt) if attempt else step  # the first round's seeds are those of the other scripts
            fresh = engine.generate(problems.take(args.prompts_per_step), args.group_size, key)
            log.lap("generate", engine.waited())
            grades = common.distributed_map(pool.grade, [(r.text, r.problem["answer"]) for r in fresh])
            log.rollout(fresh, grades)
            correct += [g.correct for g in grades]
            lengths += [float(len(r.ids)) for r in fresh]
            solved = torch.tensor(correct).view(-1, args.group_size)  # (P', G)
            kept = KEEPS[args.dynamic_sampling](solved).nonzero()[: args.prompts_per_step, 0].tolist()  # P, or fewer
            sampled = [r if i // args.group_size in kept else None for i, r in enumerate(sampled + fresh)]  # (P' G,)
            log.lap("reward")
            if len(kept) == args.prompts_per_step:
                break
        else:
            few = f"{len(kept)} of {args.prompts_per_step} groups after --max_resample {args.max_resample}"
            log.say(f"step {step}: {few}; going on with them")
        engine.sleep()
        # responses sampled for this step, those of dropped groups too
        log.mean("rollout/sampled_responses", len(sampled))
        log.mean("rollout/kept_groups", len(kept))  # groups that are trained on
        log.lap("generate", engine.waited())

        # reward, less what a long response loses
        lengths = torch.tensor(lengths, device=accelerator.device)  # (P' G,)
        penalty = overlong_penalty(lengths, args.max_response_len, args.overlong_buffer)  # (P' G,)
        values = [1.0 if right else float(args.wrong_reward) for right in correct]
        rewards = torch.tensor(values, device=accelerator.device) + penalty * (args.overlong == "penalty")
        rewards = rewards.view(-1, args.group_size)  # (P', G)

        # advantage: one number a response, shared by all its tokens; from here on only of the groups that are kept
        adv = advantages(rewards[kept], args.norm).flatten() if kept else rewards.new_zeros(0)  # (N,)
        log.advantages(rewards, adv)
        batch = [r for r in sampled if r]
        lengths = lengths.view(-1, args.group_size)[kept].flatten()
        log.lap("reward")

        # loss weights: one number a response too, from the whole mini-batch, before it is split
        if args.overlong == "filter":
            lengths[torch.tensor([r.truncated for r in batch], dtype=torch.bool)] = 0
        parts = lengths.tensor_split(args.minibatches)
        weight = torch.cat([token_weights(part, args.loss_agg, args.max_response_len) for part in parts])  # (N,)

        # old policy: frozen for all mini-batches of this rollout
        # a response without a gradient is not computed: one without an advantage, if no KL or entropy bonus is in the loss
        has_gradient = adv != 0  # (N,) bool
        minis = common.minibatches(batch, lengths > 0, has_gradient, args.minibatches, args.tokens_per_gpu)
        packs = [pack for packs in minis for pack in packs]
        log.packs(minis)
        common.freeze_old_logp(log, model, packs)
        log.lap("old_logp")

        # update: each mini-batch is one optimizer step, each pack one forward and backward pass
        lr = args.lr * min(1, (step + 1) / max(1, args.warmup_steps))
        optimizer.param_groups[0]["lr"] = lr
        for packs in minis:
            if not packs:  # all filtered: nothing to learn from, so not even Adam's momentum moves the weights
                continue
            for pack in packs:
                logp, entropy = model(pack, args.temperature)  # (T,)
                a, w = adv[pack.rows], weight[pack.rows]  # (T,)
                loss, ratio, low, high = policy_loss(logp, pack.old_logp, a, args.clip_low, args.clip_high)  # (T,)
                common.check_finite(log, step, pack, batch, loss)
                accelerator.backward((loss * w).sum() * accelerator.num_processes)  # the sum over GPUs, not their mean
                log.sum("train/loss", loss * w / args.minibatches)  # the loss, mean over the mini-batches
                # nats, mean over the trained tokens: those of responses with a gradient
                log.mean("train/entropy", entropy)
                log.mean("train/clip_low", low)  # share of tokens whose gradient the lower bound clips
                log.mean("train/clip_high", high)  # share of tokens whose gradient the upper bound clips
                log.max("train/ratio_max", ratio)  # the largest ratio
                log.trained_tokens(batch, pack, ratio, entropy, a, low, high)
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
            if not math.isfinite(grad_norm):
                log.stop(f"step {step}: the norm of the gradient is {grad_norm}; it was not applied")
            log.mean("train/grad_norm", grad_norm)  # norm of the gradient before it is clipped
            optimizer.step()
            optimizer.zero_grad()
        log.mean("train/lr", optimizer.param_groups[0]["lr"])  # learning rate, as the optimizer has it
        log.lap("update")
        log.write(step)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            common.save(log, engine, model, optimizer, problems, step + 1)
    log.write(args.steps)
    common.finish(log, accelerator, engine)


if __name__ == "__main__":
    main()
