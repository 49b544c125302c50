"""Two training steps of a script, and again in the plainest way, one response and one token at a time: is the update the same?

    python tests/by_hand.py my_paper.py                            flags of the script may follow
    python tests/by_hand.py my_paper.py --changes tests/papers/cispo.py

What the engine sampled is taken as it is; from there on nothing of the project is used: rewards by comparing integers, moments by
Python's `statistics`, log-probabilities from dense logits of one sequence, the loss in a loop over tokens. It prints by how much
the change of the weights differs, as a share of its length; status 1 above 1e-3. A paper that changes an equation writes it once
more in a file of its own, with any of the functions `reward`, `keep`, `advantages`, `weight`, `token_losses` in their plain form.
"""

import argparse
import copy
import importlib.util
import re
import statistics
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
BASE = str(ROOT / "data" / "tiny" / "base")
LIMIT = 1e-3
FLAGS = (  # in two steps every part has something to do: clips, warm-up, a clipped gradient, truncated responses
    "--scale laptop --data medium --eval_data eval_easy --steps 2 --prompts_per_step 4 --group_size 4 --minibatches 2 "
    "--lr 2e-3 --weight_decay 0.1 --warmup_steps 3 --max_grad_norm 0.3 --temperature 0.8 --max_response_len 40 "
    "--tokens_per_gpu 160 --clip_low 0.03 --clip_high 0.05"
).split()

# ------------------------------------------------------------------------------------------------------- the equations


def is_right(response):
    boxes = re.findall(r"\\boxed\{(-?\d+)\}", response.text)
    return bool(boxes) and int(boxes[-1]) == int(response.problem["answer"])


def keep(group, args):  # -> is a group of responses trained on?
    return getattr(args, "dynamic_sampling", "off") == "off" or 0 < sum(map(is_right, group)) < len(group)


def reward(response, old_logp, ref_logp, args):  # (L,) each
    value = 1 if is_right(response) else args.wrong_reward
    if getattr(args, "overlong", "keep") == "penalty":
        soft = args.max_response_len - args.overlong_buffer
        value -= max(0, len(response.ids) - soft) / args.overlong_buffer
    return value


def moments(norm, group, everything):  # -> what is subtracted from a reward of this group, and what it is divided by
    mean = {"none": lambda: 0, "group": lambda: statistics.mean(group), "batch": lambda: statistics.mean(everything)}
    std = {"group_std": lambda: statistics.stdev(group), "batch_std": lambda: statistics.stdev(everything)}
    return mean[norm.split("_")[0]](), std[norm[-9:].lstrip("_")]() + 1e-6 if norm.endswith("std") else 1


def advantages(rewards, args):  # the rewards of each group -> the advantages of each group
    everything, found = [r for group in rewards for r in group], []
    for group in rewards:
        mean, std = moments(args.norm, group, everything)
        found.append([(r - mean) / std for r in group])
    return found


def weight(response, counted, args):  # -> of one token; counted: the responses of its mini-batch that are in the loss
    return {
        "token_mean": 1 / sum(len(r.ids) for r in counted),
        "seq_mean": 1 / len(counted) / len(response.ids),
        "constant": 1 / len(counted) / args.max_response_len,
    }[args.loss_agg]


def token_losses(response, logp, old_logp, ref_logp, adv, args):  # (L,) each -> a loss for each token of a response
    losses = []
    for new, old, ref in zip(logp, old_logp, ref_logp):
        ratio = torch.exp(new - old)
        clipped = min(max(ratio, torch.tensor(1 - args.clip_low)), torch.tensor(1 + args.clip_high))
        term = min(ratio * adv, clipped * adv)
        if getattr(args, "kl_coef", 0):
            d = new - ref
            term = term - args.kl_coef * {"k1": d, "k2": d * d / 2, "k3": torch.exp(-d) - 1 + d}[args.kl_estimator]
        losses.append(-term)
    return losses


# ------------------------------------------------------------------------------------------------------------ the loop


def logprobs(lm, response, temperature):  # -> (L,), of the response's tokens, EOS among them
    prompt, ids = torch.tensor(response.problem["prompt_ids"]), response.ids
    logits = lm(input_ids=torch.cat([prompt, ids])[None]).logits[0] / temperature
    return torch.stack([logits[len(prompt) - 1 + t].log_softmax(-1)[token] for t, token in enumerate(ids)])


def train_by_hand(args, rollouts, equations):
    """-> the weights after these rollouts"""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
    ref = copy.deepcopy(lm)
    optimizer = torch.optim.AdamW(lm.parameters(), weight_decay=args.weight_decay)
    for step, sampled in enumerate(rollouts):
        groups = [sampled[i : i + args.group_size] for i in range(0, len(sampled), args.group_size)]
        groups = [group for group in groups if equations.keep(group, args)][: args.prompts_per_step]
        found = [r for group in groups for r in group]
        with torch.no_grad():
            old, far = ([logprobs(which, r, args.temperature) for r in found] for which in (lm, ref))
        values = [equations.reward(*what, args) for what in zip(found, old, far)]
        values = [values[i : i + args.group_size] for i in range(0, len(values), args.group_size)]
        todo = [*zip(found, [a for group in equations.advantages(values, args) for a in group])]
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / max(1, args.warmup_steps))
        first = 0
        for m in range(args.minibatches):
            last = first + len(todo) // args.minibatches + (m < len(todo) % args.minibatches)
            part, first = range(first, last), last
            part = [i for i in part if not (getattr(args, "overlong", "") == "filter" and todo[i][0].truncated)]
            loss = 0
            for i in part:
                r, a = todo[i]
                losses = equations.token_losses(r, logprobs(lm, r, args.temperature), old[i], far[i], a, args)
                loss = loss + equations.weight(r, [todo[j][0] for j in part], args) * sum(losses)
            if part:
                loss.backward()
                torch.nn.utils.clip_grad_norm_(lm.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
    return lm.state_dict()


def compare_updates(script, flags, folder, changes=None):
    """-> by how much the script's change of the weights differs from that by hand, as a share of its length; its args

    script: the module; folder: a new one for its run; changes: a module with equations in the place of those above"""
    from transformers import AutoModelForCausalLM

    import common
    from infra import engines

    generate, start, rollouts, parsed = engines.Engine.generate, common.start, {}, []

    def listen(engine, problems, n, step, *how):
        batch = generate(engine, problems, n, step, *how)
        if step != "eval":
            rollouts.setdefault(step[0] if isinstance(step, tuple) else step, []).extend(batch)
        return batch

    with (
        mock.patch.object(common, "start", lambda args: parsed.append(args) or start(args)),
        mock.patch.object(engines.Engine, "generate", listen),
        mock.patch.object(sys, "argv", [f"{script.__name__}.py", *FLAGS, *map(str, flags), "--out", str(folder)]),
    ):
        script.main()
    [args] = parsed
    equations = SimpleNamespace(**globals() | (vars(changes) if changes else {}))
    want = train_by_hand(args, [rollouts[step] for step in range(args.steps)], equations)
    checkpoint = folder / "checkpoints" / f"step_{args.steps:06d}"
    got, before = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).state_dict() for f in (checkpoint, BASE)
    )
    ours, by_hand = (torch.cat([(w[name] - before[name]).flatten() for name in before]) for w in (got, want))
    return float((ours - by_hand).norm() / by_hand.norm()), args


def load_module(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("script", help="a script of the collection, or a copy")
    p.add_argument("--changes", help="a file with the equations that it changes")
    given, flags = p.parse_known_args()
    with tempfile.TemporaryDirectory() as work:
        changes = load_module(given.changes) if given.changes else None
        off, _ = compare_updates(load_module(given.script), flags, Path(work) / "run", changes)
    verdict = "the same" if off < LIMIT else "NOT the same"
    print(f"{given.script}: the update differs by {off:.1e} of its length from the one by hand: {verdict}")
    sys.exit(off >= LIMIT)
