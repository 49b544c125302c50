"""GRPO: PPO's clipped loss with the group in place of a critic, and a KL to the first policy.                   arXiv 2402.03300

    A_i  = (r_i - mean of its group) / std of its group                                      --norm      advantages
    L    = - sum_i w_i sum_t [ min(ratio_it A_i, clip(ratio_it, 1 - low, 1 + high) A_i)      --clip_*    policy_loss
                               - kl_coef KL_it ]                                             --kl_*      kl
    w_i  = 1 / (n |o_i|), every response counts the same                                     --loss_agg  token_weights
    KL   = exp(-d) - 1 + d,  d_it = log pi(o_it) - log pi_ref(o_it), pi_ref the policy before the first step

n responses in a mini-batch. P prompts, G responses to each, N = P G responses in a batch; T tokens of one pack of responses,
one after the other.

    accelerate launch grpo.py --kl_coef 0.04
"""

import math
import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: idle threads soon leave their cores

import torch

import common
from rewards import GradePool

DEFAULTS = {  # flag: (laptop, node). Node is the paper. What it leaves open is marked so; the model and the evaluation
    # are those of the study, arXiv 2508.08221, so that the scripts can be compared
    "norm": ("group_mean_group_std", "group_mean_group_std"),  # section 4.1.2
    "loss_agg": ("seq_mean", "seq_mean"),  # equation 3
    "clip_low": (0.2, 0.2),  # equation 3, without a number; 0.2 is PPO's
    "clip_high": (0.2, 0.2),  # the same
    "kl_coef": (0.04, 0.04),  # section 4.2
    "kl_estimator": ("k3", "k3"),  # equation 4
    "wrong_reward": (0, 0),  # open: the paper has a reward model. The group's std undoes any scale
    "model": ("data/tiny/base", "Qwen/Qwen3-4B-Base"),  # the study's; the paper: DeepSeekMath-Instruct 7B
    "template": ("chat", "chat"),  # the study's
    "enable_thinking": ("on", "on"),  # the models' own default
    "data": ("hard", "easy"),  # GSM8K and the easiest of MATH; the paper: its own instructions on GSM8K and MATH
    "eval_data": (
        "eval_easy,eval_medium,eval_hard,eval_plus,eval_minus,eval_long",
        "math500,olympiadbench,minerva_math,amc23,aime24,aime25",  # the study's
    ),
    "steps": (80, 500),  # open
    "prompts_per_step": (16, 16),  # section 4.2: a batch of 1,024
    "group_size": (8, 64),  # section 4.2
    "minibatches": (4, 1),  # section 4.2: a single update after each exploration
    "lr": (1e-4, 1e-6),  # section 4.2
    "weight_decay": (0.0, 0.0),  # open
    "lora_rank": (0, 0),  # all weights are trained
    "warmup_steps": (0, 0),  # open
    "old_logp": ("rollout", "recompute"),  # open; what the papers' authors do
    "max_grad_norm": (1.0, 1.0),  # open
    "temperature": (1.0, 1.0),  # open
    "top_p": (1.0, 1.0),  # open
    "top_k": (0, 0),  # open
    "max_prompt_len": (64, 2048),  # open; room for every problem
    "max_response_len": (192, 1024),  # section 4.2
    "seed": (1, 42),  # the study's
    "eval_every": (40, 20),  # open
    "eval_samples": (1, 8),  # the study's
    "eval_pass_k": (0, 0),  # as many as are sampled
    "eval_temperature": (1.0, 0.99),  # the study's, as its training
    "eval_top_p": (1.0, 0.99),  # as the temperature
    "eval_top_k": (0, 100),  # as the temperature
    "eval_max_response_len": (192, 8192),  # the study's
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


KLS = {  # d (T,) -> (T,). Over what the policy samples, the mean of the value; that of the gradient
    "k1": lambda d: d,  # KL(pi, ref); 0: as a loss it pulls nowhere
    "k2": lambda d: d**2 / 2,  # no KL; the gradient of KL(pi, ref)
    "k3": lambda d: (-d).exp() - 1 + d,  # GRPO: KL(pi, ref); the gradient of KL(ref, pi)
}


def kl(logp, ref_logp, kl_estimator):  # (T,), (T,) -> (T,)
    return KLS[kl_estimator](logp - ref_logp)


def parse_args(argv=None):
    p = common.Parser(__file__, __doc__, DEFAULTS)
    p.add_argument("--norm", choices=NORMS, help="The advantage: a reward less which mean, over which deviation.")
    p.add_argument("--loss_agg", choices=LOSS_AGGS, help="The weight of a token: the same for all, or by its response.")
    p.add_argument("--clip_low", type=common.number(float, 0, 1), help="The ratio is clipped below 1 - clip_low.")
    p.add_argument("--clip_high", type=common.number(float, 0), help="The ratio is clipped above 1 + clip_high.")
    p.add_argument("--kl_coef", type=common.number(float, 0), help="The weight of the KL; 0 takes no reference.")
    p.add_argument("--kl_estimator", choices=KLS, help="How the KL is estimated from the sampled tokens.")
    p.add_argument("--wrong_reward", type=int, choices=[0, -1], help="The reward of a wrong response; right is 1.")
    args = common.parse_args(p, argv, reference=lambda args: args.kl_coef > 0)
    alike = torch.tensor([[1.0, 1.0], [0.0, 0.0]])[: args.prompts_per_step]  # in each group, as in one of one
    if args.group_size == 1 and not advantages(alike, args.norm).any():
        common.fail(f"--group_size 1: has no advantage under --norm {args.norm}; give 2 or more")
    if args.minibatches == 1 and common.rank() == 0:
        print("--minibatches 1: the ratio is always 1, so that --clip_low and --clip_high do nothing")
    return args


def main():
    args = parse_args()
    accelerator, model, optimizer, engine, problems, log = common.start(args)
    ref_model = common.load_reference(args, model) if args.kl_coef > 0 else None
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
        parts = lengths.tensor_split(args.minibatches)
        weight = torch.cat([token_weights(part, args.loss_agg, args.max_response_len) for part in parts])  # (N,)

        # old policy: frozen for all mini-batches of this rollout
        # a response without a gradient is not computed: one without an advantage, if no KL or entropy bonus is in the loss
        has_gradient = (adv != 0) | (args.kl_coef > 0)  # (N,) bool
        minis = common.minibatches(batch, lengths > 0, has_gradient, args.minibatches, args.tokens_per_gpu)
        packs = [pack for packs in minis for pack in packs]
        log.packs(minis)
        common.freeze_old_logp(log, model, packs)
        for pack in packs if ref_model else []:
            with torch.no_grad():
                pack.ref_logp, _ = ref_model(pack, args.temperature)  # (T,)
        log.lap("old_logp")

        # update: each mini-batch is one optimizer step, each pack one forward and backward pass
        lr = args.lr * min(1, (step + 1) / max(1, args.warmup_steps))
        optimizer.param_groups[0]["lr"] = lr
        for packs in minis:
            for pack in packs:
                logp, entropy = model(pack, args.temperature)  # (T,)
                a, w = adv[pack.rows], weight[pack.rows]  # (T,)
                loss, ratio, low, high = policy_loss(logp, pack.old_logp, a, args.clip_low, args.clip_high)  # (T,)
                if ref_model:
                    divergence = kl(logp, pack.ref_logp, args.kl_estimator)  # (T,)
                    # to the reference, by `--kl_estimator`, mean over the trained tokens; only with `--kl_coef` above 0
                    log.mean("train/kl", divergence)
                    loss = loss + args.kl_coef * divergence
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
