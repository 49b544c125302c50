"""The laptop world: small sums in words, and two models of half a million parameters that know how to do them.

Real base models can solve a problem in eight tries and still fail it in one; they slip, guess, forget the box and ramble on.
This world has the same mechanisms at a size where two CPU cores see them in minutes:

    problem   what is 17 + 5 - 8?
    solution  17 + 5 = 22. then 22 - 8 = 14. so the answer is \\boxed{14}.

`base` learned from careless solutions in few phrasings, `aligned` from cleaner, longer ones in many phrasings, so that its next
word is less certain. Both can do every tier; neither does it reliably. That gap between pass@8 and pass@1 is what RL can close.

    python data/tiny.py        rebuilds data/tiny/ from nothing: problems, tokenizer, both models, pass rates (at the end of this file)
"""

import argparse
import copy
import json
import math
import random
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
import rewards  # noqa: E402
from data.problems import load_problems  # noqa: E402
from infra import engines  # noqa: E402

FOLDER = Path(__file__).parent / "tiny"
LARGEST_TOTAL = 99  # every running total stays within 0..99: two digits, carries and borrows

# ---------------------------------------------------------------------------------------------------- problems

SETS = {  # name: (fewest terms, most terms, largest term, operators, problems)
    "eval_easy": (2, 3, 20, "+-", 100),
    "eval_medium": (3, 5, 20, "+-", 250),
    "eval_hard": (5, 7, 50, "+-", 100),
    "eval_plus": (3, 5, 20, "+", 100),  # sums alone
    "eval_minus": (3, 5, 20, "-", 100),  # differences alone
    "eval_long": (8, 9, 20, "+-", 100),  # longer than any training problem
    "easy": (2, 3, 20, "+-", 2000),
    "medium": (3, 5, 20, "+-", 2000),
    "hard": (5, 7, 50, "+-", 2000),
}


def make_terms(rng, fewest, most, largest, operators):
    """A list of signed terms, the first positive, whose running total never leaves 0..LARGEST_TOTAL."""
    while True:
        count = rng.randint(fewest, most)
        first = rng.randint(largest, LARGEST_TOTAL) if operators == "-" else rng.randint(1, largest)
        terms, total = [first], first
        for _ in range(count - 1):
            term = rng.randint(1, largest) * (1 if rng.choice(operators) == "+" else -1)
            total += term
            terms.append(term)
            if not 0 <= total <= LARGEST_TOTAL:
                break
        if len(terms) == count and 0 <= total <= LARGEST_TOTAL:
            return terms


def write_out(terms):
    """[17, 5, -8] -> '17 + 5 - 8'"""
    return str(terms[0]) + "".join(f" {'+' if t > 0 else '-'} {abs(t)}" for t in terms[1:])


def make_problems():
    """Writes all nine sets, the evaluation sets first; no problem stands in two of them. -> the held-out problems"""
    rng, seen = random.Random(0), set()
    for name, (fewest, most, largest, operators, size) in SETS.items():
        rows = []
        while len(rows) < size:
            terms = make_terms(rng, fewest, most, largest, operators)
            if write_out(terms) not in seen:
                seen.add(write_out(terms))
                row = {
                    "id": f"{name}-{len(rows)}",
                    "problem": f"what is {write_out(terms)}?",
                    "answer": str(sum(terms)),
                }
                rows.append(row | {"source": "tiny", "level": len(terms)})
        (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if name == "eval_long":
            held_out = set(seen)
    return held_out


# ---------------------------------------------------------------------------------------------------- solutions

# How the two models were taught. Chances: `slip` a wrong result in one step, `guess` a number without any work, `skip` two
# steps at once, `nobox` an answer without its box, `endless` an ending said again and again, `check` a step checked backwards.
STYLES = {
    "base": dict(slip=0.12, guess=0.15, skip=0.05, nobox=0.05, endless=0.10, check=0.0),
    "aligned": dict(slip=0.04, guess=0.02, skip=0.02, nobox=0.02, endless=0.04, check=0.15),
}
LINKS = {  # what may stand before a step, and how likely it is to be anything at all
    "base": (["then", "so", "and", "therefore"], 0.5),
    "aligned": (["then", "so", "now", "next", "and", "therefore", "after that", "but wait", "if so", "thus"], 0.8),
}
STEPS = {
    "base": ["{a} {op} {b} = {c}.", "{a} {op} {b} is {c}."],
    "aligned": [
        "{a} {op} {b} = {c}.",
        "{a} {op} {b} is {c}.",
        "{a} {op} {b} gives {c}.",
        "we have {a} {op} {b} = {c}.",
        "the total of {a} {op} {b} is {c}.",
        "from {a} {op} {b} we get {c}.",
    ],
}
ENDINGS = {
    "base": ["so the answer is {x}.", "the answer is {x}."],
    "aligned": [
        "so the answer is {x}.",
        "therefore the answer is {x}.",
        "thus the total is {x}.",
        "this is the answer: {x}.",
        "and that is it, the answer is {x}.",
    ],
}
GUESSES = ["the answer is {x}.", "so the answer is {x}."]
ENDLESS_WORDS = 150  # far past any limit: the model learns that such an ending never stops


def equation(total, term):
    return dict(a=total, op="+" if term > 0 else "-", b=abs(term))


def slipped(rng, value):
    return max(0, value + rng.choice([-10, -2, -1, 1, 2, 10]))


def make_solution(rng, terms, style, careful=False):
    """One worked solution in the words of `style`, right or (unless careful) perhaps wrong, and whether it ever stops."""
    chance = dict.fromkeys(STYLES[style], 0.0) if careful else STYLES[style]
    if rng.random() < chance["guess"]:
        return rng.choice(GUESSES).format(x=rf"\boxed{{{slipped(rng, sum(terms))}}}"), True
    links, how_often = LINKS[style]
    sentences, total, i = [], terms[0], 1
    while i < len(terms):
        jump = 2 if i + 1 < len(terms) and rng.random() < chance["skip"] else 1
        result = total + sum(terms[i : i + jump])
        if rng.random() < chance["slip"] * jump:
            result = slipped(rng, result)
        left = total if jump == 1 else f"{total} {write_out([1, terms[i]])[2:]}"
        sentence = rng.choice(STEPS[style]).format(**(equation(left, terms[i + jump - 1]) | dict(c=result)))
        if sentences and rng.random() < how_often:
            sentence = f"{rng.choice(links)} {sentence}"
        sentences.append(sentence)
        if rng.random() < chance["check"] and jump == 1:
            back = equation(result, -terms[i])
            sentences.append("wait, check: {a} {op} {b} = {c}. it is right.".format(**back, c=result - terms[i]))
        total, i = result, i + jump
    boxed = str(total) if rng.random() < chance["nobox"] else rf"\boxed{{{total}}}"
    sentences.append(rng.choice(ENDINGS[style]).format(x=boxed))
    endless = rng.random() < chance["endless"]
    if endless:  # half of them say the ending over and over, half a step, and never come to an end
        again = sentences[-1] if rng.random() < 0.5 else sentences[-2]
        sentences = sentences[: sentences.index(again)] + [again] * (ENDLESS_WORDS // len(again.split()))
    return " ".join(sentences), not endless


# ---------------------------------------------------------------------------------------------------- tokenizer

PIECES = r"<\|[a-z]+\|>| ?\\boxed\{| ?[a-z]+| ?[0-9]| ?[-+=]|[}.,:?]"  # a word with its space, or one digit: decoding is exact
SPECIAL = ["<|pad|>", "<|end|>", "<|unk|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (  # the system message is read by real models; this one knows its only task
    "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer():
    words = {w for w in " ".join(sum([*STEPS.values(), *ENDINGS.values()], [])).split()}
    words |= {w for links, _ in LINKS.values() for link in links for w in link.split()}
    words |= set("what is wait check it right".split())
    words = sorted({"".join(c for c in w if c.isalpha()) for w in words if "{" not in w} - {""})
    plain = words + list("0123456789+-=") + ["\\boxed{"]
    vocab = SPECIAL + plain + [f" {p}" for p in plain] + list("}.,:?")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


# ---------------------------------------------------------------------------------------------------- training

LONGEST = 192  # tokens of a training example; an endless solution is truncated here, without EOS
BATCH = 32  # small batches learn carrying and borrowing in fewer examples
ABLE = 4500  # optimizer steps on careful solutions in the words of both: what the two models have in common
CARELESS = 800  # then on the solutions of one of them, mistakes included


def make_model(tokenizer):
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def examples(tokenizer, held_out, seed, style=None):
    """Endless batches of (input ids, labels), of careful solutions in all styles or of one style as it is.

    Eight batches at a time are sorted by length, so that little is padding.
    """
    rng = random.Random(seed)
    tiers = [SETS[tier][:4] for tier in ("easy", "medium", "hard")]
    while True:
        rows = []
        while len(rows) < 8 * BATCH:
            terms = make_terms(rng, *rng.choice(tiers))
            if write_out(terms) in held_out:
                continue
            solution, ends = make_solution(rng, terms, style or rng.choice(list(STYLES)), careful=style is None)
            prompt = tokenizer.encode(f"<|user|>what is {write_out(terms)}?<|assistant|>")
            answer = tokenizer.encode(solution) + [tokenizer.eos_token_id] * ends
            rows.append((len(prompt), (prompt + answer)[:LONGEST]))
        rows.sort(key=lambda row: len(row[1]))
        batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        rng.shuffle(batches)
        for batch in batches:
            width = max(len(ids) for _, ids in batch)
            ids = torch.full((BATCH, width), tokenizer.pad_token_id)  # (B, T)
            labels = torch.full((BATCH, width), -100)  # (B, T), -100: not trained (problem, padding)
            for i, (start, row) in enumerate(batch):
                ids[i, : len(row)] = torch.tensor(row)
                labels[i, start : len(row)] = ids[i, start : len(row)]
            yield ids, labels


def pretrain(model, batches, steps, learning_rate, name):
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    for step in (bar := tqdm(range(steps), desc=name)):
        warm, left = min(1, (step + 1) / 50), max(0.05, 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = learning_rate * warm * left
        ids, labels = next(batches)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def measure(style):
    """Prints pass@1 and pass@8 of a model on the evaluation sets, at temperature 1 and the limit of the laptop scale."""
    settings = dict(model=str(FOLDER / style), temperature=1.0, top_p=1.0, top_k=0, max_response_len=128, seed=0)
    settings |= dict(vllm_tensor_parallel=1, max_prompt_len=64, template="chat", enable_thinking="on")
    args = argparse.Namespace(**settings)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(FOLDER / style)
    engine = engines.HfEngine(args, tokenizer)
    for name in SETS:
        if name.startswith("eval_"):
            problems = load_problems(FOLDER / f"{name}.jsonl", tokenizer, args)
            batch = engine.generate(problems, 8, step=0)
            right = torch.tensor([rewards.math_reward(r.text, r.problem["answer"]) for r in batch]).view(-1, 8)
            length, truncated = (
                sum(len(r.ids) for r in batch) / len(batch),
                sum(r.truncated for r in batch) / len(batch),
            )
            scores = f"pass@1 {right.mean():.2f}  pass@8 {right.amax(1).mean():.2f}"
            print(f"{style:8s} {name:12s} {scores}  length {length:5.1f}  truncated {truncated:.3f}")


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(2)  # the order of additions, and so the last bits of the weights, depend on it
    FOLDER.mkdir(exist_ok=True)
    held_out, tokenizer = make_problems(), make_tokenizer()
    torch.manual_seed(0)
    able = make_model(tokenizer)
    able.generation_config.eos_token_id = tokenizer.eos_token_id
    pretrain(able, examples(tokenizer, held_out, "able"), ABLE, 2e-3, "able")
    for style in STYLES:
        model = copy.deepcopy(able)
        pretrain(model, examples(tokenizer, held_out, style, style), CARELESS, 1e-3, style)
        model.save_pretrained(FOLDER / style)
        tokenizer.save_pretrained(FOLDER / style)
        measure(style)


if __name__ == "__main__":
    main()

# What it printed, on two cores of an x86-64 server without a GPU (13 minutes beside other work):
# base     eval_easy    pass@1 0.61  pass@8 1.00  length  20.3  truncated 0.022
# base     eval_medium  pass@1 0.36  pass@8 0.95  length  27.5  truncated 0.021
# base     eval_hard    pass@1 0.15  pass@8 0.71  length  38.2  truncated 0.033
# base     eval_plus    pass@1 0.32  pass@8 0.90  length  27.9  truncated 0.016
# base     eval_minus   pass@1 0.18  pass@8 0.65  length  28.0  truncated 0.021
# base     eval_long    pass@1 0.01  pass@8 0.11  length  45.1  truncated 0.034
# aligned  eval_easy    pass@1 0.88  pass@8 1.00  length  25.5  truncated 0.003
# aligned  eval_medium  pass@1 0.68  pass@8 1.00  length  44.7  truncated 0.008
# aligned  eval_hard    pass@1 0.36  pass@8 0.90  length  68.7  truncated 0.034
# aligned  eval_plus    pass@1 0.72  pass@8 1.00  length  45.9  truncated 0.014
# aligned  eval_minus   pass@1 0.36  pass@8 0.82  length  45.1  truncated 0.010
# aligned  eval_long    pass@1 0.01  pass@8 0.12  length  87.4  truncated 0.089
