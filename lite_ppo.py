"""Lite PPO: PPO's clipped loss without a critic, and two tricks.                                              arXiv 2508.08221

    A_i  = (r_i - mean of its group) / std of the batch                                      --norm      advantages
    L    = - sum_i w_i sum_t min(ratio_it A_i, clip(ratio_it, 1 - low, 1 + high) A_i)        --clip_*    policy_loss
    w_i  = 1 / sum_j |o_j|, every token counts the same                                      --loss_agg  token_weights

The paper's other tricks are the other choices of these flags, one line of math each, and two more: --overlong, --wrong_reward.
P prompts, G responses to each, N = P G responses in a batch; T tokens of one pack of responses, one after the other.

    accelerate launch lite_ppo.py --norm group_mean_batch_std
"""

import math
import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: idle threads soon leave their cores

import torch

import common
from rewards import GradePool

DEFAULTS = {  # flag: (laptop, node). Node is the paper: sections 3.1 and 4 and appendix A.1, version 3
    "norm": ("group_mean_batch_std", "group_mean_batch_std"),  # section 5
    "loss_agg": ("token_mean", "token_mean"),  # section 5
    "clip_low": (0.2, 0.2),  # section 4.2
    "clip_high": (0.2, 0.2),  # section 5: no Clip-Higher
    "overlong": ("keep", "keep"),  # section 5: no overlong filter
    "wrong_reward": (0, 0),  # section 3.1; -1 is figure 18
    "model": ("data/tiny/base", "Qwen/Qwen3-4B-Base"),  # section 3.1
    "template": ("chat", "chat"),  # appendix A.2
    "enable_thinking": ("on", "on"),  # not stated; the models' own default
    "data": ("hard", "hard"),  # figure 15
    "eval_data": (
        "eval_easy,eval_medium,eval_hard,eval_plus,eval_minus,eval_long",
        "math500,olympiadbench,minerva_math,amc23,aime24,aime25",  # section 3.1
    ),
    "steps": (80, 500),  # appendix A.1
    "prompts_per_step": (16, 128),  # section 3.1
    "group_size": (8, 8),  # section 3.1
    "minibatches": (4, 8),  # not stated; 1,024 responses, 4 x 32 an update on one rank make 8
    "lr": (1e-4, 1e-6),  # appendix A.1
    "weight_decay": (0.0, 0.0),  # appendix A.1
    "lora_rank": (0, 0),  # all weights are trained
    "warmup_steps": (0, 50),  # appendix A.1
    "old_logp": ("rollout", "recompute"),  # not stated; the default of the authors' framework
    "max_grad_norm": (1.0, 1.0),  # not stated; the default of the authors' framework
    "temperature": (1.0, 0.99),  # section 3.1
    "top_p": (1.0, 0.99),  # section 3.1
    "top_k": (0, 100),  # section 3.1
    "max_prompt_len": (64, 2048),  # appendix A.1 says 1024; two problems of OlympiadBench are longer
    "max_response_len": (192, 8192),  # section 3.1 (appendix A.1 says 8000)
    "seed": (1, 42),  # appendix A.1
    "eval_every": (40, 20),  # the paper evaluates every step
    "eval_samples": (1, 8),  # not stated; 8 fits the paper's numbers
    "eval_pass_k": (0, 0),  # as many as are sampled
    "eval_temperature": (1.0, 0.99),  # not stated; as in training, so that the curve is of what is trained
    "eval_top_p": (1.0, 0.99),  # as the temperature
    "eval_top_k": (0, 100),  # as the temperature
    "eval_max_response_len": (192, 8192),  # as in training
    "save_every": (20, 20),  # appendix A.1
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


def parse_args(argv=None):
    p = common.Parser(__file__, __doc__, DEFAULTS)
    p.add_argument("--norm", choices=NORMS, help="The advantage: a reward less which mean, over which deviation.")
    p.add_argument("--loss_agg", choices=LOSS_AGGS, help="The weight of a token: the same for all, or by its response.")
    p.add_argument("--clip_low", type=common.number(float, 0, 1), help="The ratio is clipped below 1 - clip_low.")
    p.add_argument("--clip_high", type=common.number(float, 0), help="The ratio is clipped above 1 + clip_high.")
    p.add_argument("--overlong", choices=["keep", "filter"], help="Truncated responses: filter, not trained on.")
    p.add_argument("--wrong_reward", type=int, choices=[0, -1], help="The reward of a wrong response; right is 1.")
    args = common.parse_args(p, argv)
    alike = torch.tensor([[1.0, 1.0], [0.0, 0.0]])[: args.prompts_per_step]  # in each group, as in one of one
    if args.group_size == 1 and not advantages(alike, args.norm).any():
        common.fail(f"--group_size 1: has no advantage under --norm {args.norm}; give 2 or more")
    if args.minibatches == 1 and common.rank() == 0:
        print("--minibatches 1: the ratio is always 1, so that --clip_low and --clip_high do nothing")
    return args


def main():
    args = parse_args()
    accelerator, model, optimizer, engine, problems, log = common.start(args)
    pool = GradePool()
    for step in range(log.first_step, args.steps + 1):
        # rollout: G responses to each prompt, from the current policy
        engine.wake()
        log.lap("wake")
        engine.load(model)
        log.lap("sync")
        if step % args.eval_every == 0 or step == args.steps:
            common.evaluate(engine, pool, log, step)
        if step == args.steps:
            break
        batch = engine.generate(problems.take(args.prompts_per_step), args.group_size, step)
        engine.sleep()
        log.lap("generate", engine.waited())

        # reward
        grades = common.distributed_map(pool.grade, [(r.text, r.problem["answer"]) for r in batch])
        log.rollout(batch, grades)
        values = [1.0 if g.correct else float(args.wrong_reward) for g in grades]
        rewards = torch.tensor(values, device=accelerator.device).view(-1, args.group_size)  # (P, G)

        # advantage: one number a response, shared by all its tokens
        adv = advantages(rewards, args.norm).flatten()  # (N,)
        log.advantages(rewards, adv)
        log.lap("reward")

        # loss weights: one number a response too, from the whole mini-batch, before it is split
        lengths = torch.tensor([float(len(r.ids)) for r in batch], device=accelerator.device)  # (N,)
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
