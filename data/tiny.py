"""The laptop world: small sums in words, and two models of a fifth of a million parameters that know how to do them.

Real base models can solve a problem in eight tries and still fail it in one; they slip, guess, forget the box and ramble on.
This world has the same mechanisms at a size where two CPU cores see them in minutes:

    problem   what is 17 + 5 - 8?
    solution  17 + 5 = 22. then 22 - 8 = 14. the answer is \\boxed{14}.
    rambling  17 + 5 = 22. wait 17 + 5 = 22. wait 17 + 5 = 22. wait 17 + 5 = 22. wait ...

Both models can do every tier; neither does it reliably. That gap between pass@8 and pass@1 is what RL can close. `base` has one
phrasing, slips, and loses the thread, above all after a slip, so that its wrong answers ramble to the limit. `aligned` slips and
rambles seldom and has many phrasings, so that its next word is less certain. HABITS, by which they were taught, are fitted to
where the paper's models start, in the table that this prints (START), and to nothing that a training run does.

    python data/tiny.py             rebuilds data/tiny/ from nothing: problems, tokenizer, both models, the table of where they start
    python data/tiny.py --measure   the table alone
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

HABITS = {  # chances. Of a response: `guess` no work at all, `nobox` no box, `endless` the answer said again. Of a step: `slip` ten
    # too much or too little, `lost` the thread is lost, `confused` the same after a slip. Of a repetition: `found` it ends; then
    # `quits` a guess. `able` is what both learn first: to calculate and to ramble, without a mistake
    "able": dict(guess=0, nobox=0, endless=0.04, slip=0, lost=0.04, confused=0, found=0.08, quits=0.5),
    "base": dict(guess=0.05, nobox=0.05, endless=0.04, slip=0.15, lost=0.10, confused=0.5, found=0.03, quits=0.5),
    "aligned": dict(guess=0.01, nobox=0.02, endless=0.01, slip=0.08, lost=0.004, confused=0.02, found=0.2, quits=0.3),
}
STYLES = "base", "aligned"
WORDS = {  # chances: `link` a word before a step, `comma` before that word, not a full stop, `plus` the operator in a word
    "base": dict(link=0.3, comma=0, plus=0),
    "aligned": dict(link=0.6, comma=0.3, plus=0.1),
}
LINKS = {  # of these and of what follows the kth is k ** -ZIPF times as likely as the first
    "base": ["then", "so"],
    "aligned": ["then", "so", "now", "and", "next", "therefore", "after that", "thus", "if so", "but"],
}
STEPS = {
    "base": ["{a} {op} {b} = {c}."],
    "aligned": [
        "{a} {op} {b} = {c}.",
        "{a} {op} {b} is {c}.",
        "{a} {op} {b} gives {c}.",
        "we have {a} {op} {b} = {c}.",
        "with {a} {op} {b} we get {c}.",
    ],
}
ENDINGS = {
    "base": ["the answer is {x}."],
    "aligned": [
        "so the answer is {x}.",
        "therefore the answer is {x}.",
        "the total is {x}.",
        "thus we get {x}.",
        "and that is it: {x}.",
    ],
}
ZIPF = 1.5  # words are as rare as in any language
SLIPS = {"base": [-10, 10], "aligned": [-10, 10, -1, 1]}
ENDLESS_WORDS = 200  # far past any limit: the model learns that this never stops


def pick(rng, choices):
    return rng.choices(choices, [k**-ZIPF for k in range(1, len(choices) + 1)])[0]


def slipped(rng, value, style):
    return min(LARGEST_TOTAL, max(0, value + rng.choice(SLIPS[style])))


def guessed(rng, value):
    return max(0, value + rng.choice([-20, -10, -3, -2, -1, 1, 2, 3, 10, 20]))


def say_again(rng, sentence, found):
    """-> the sentence over and over, and whether that ever ends"""
    again = []
    while len(again) * len(sentence.split()) < ENDLESS_WORDS:
        again.append(f"wait {sentence}")
        if rng.random() < found:
            return again, True
    return again, False


def make_solution(rng, terms, style, habits=None):
    """One worked solution in the words of `style`, with these habits or its own -> text, whether it ever stops"""
    chance = HABITS[habits or style]

    def ending(value):
        boxed = str(value) if rng.random() < chance["nobox"] else rf"\boxed{{{value}}}"
        return pick(rng, ENDINGS[style]).format(x=boxed)

    if rng.random() < chance["guess"]:
        return ending(guessed(rng, sum(terms))), True
    sentences, total, clear = [], terms[0], True
    for term in terms[1:]:
        result, spoken = total + term, rng.random() < WORDS[style]["plus"]
        if rng.random() < chance["slip"]:
            result, clear = slipped(rng, result, style), False
        op = ("plus" if spoken else "+") if term > 0 else ("minus" if spoken else "-")
        sentence = pick(rng, STEPS[style]).format(a=total, op=op, b=abs(term), c=result)
        if sentences and rng.random() < WORDS[style]["link"]:
            sentence = f"{pick(rng, LINKS[style])} {sentence}"
            if rng.random() < WORDS[style]["comma"]:
                sentences[-1] = sentences[-1].removesuffix(".") + ","
        sentences.append(sentence)
        total = result
        if rng.random() < chance["lost" if clear else "confused"]:
            again, ends = say_again(rng, sentence, chance["found"])
            sentences += again
            if not ends:
                return " ".join(sentences), False
            if rng.random() < chance["quits"]:
                return " ".join([*sentences, ending(guessed(rng, sum(terms)))]), True
    sentences.append(ending(total))
    again, ends = say_again(rng, sentences[-1], chance["found"]) if rng.random() < chance["endless"] else ([], True)
    return " ".join(sentences + again), ends


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
    words |= {w for links in LINKS.values() for link in links for w in link.split()}
    words |= set("what is wait plus minus".split())
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

LONGEST = 240  # tokens of a training example; an endless solution is truncated here, without EOS
BATCH = 32  # small batches learn carrying and borrowing in fewer examples
ABLE = 5000, 2e-3  # optimizer steps and learning rate, in the words of both: what the two models have in common
OWN = 1200, 6e-4  # then with the habits of one of them. At 1e-3 they forgot how to copy a number (LOG.md)


def make_model(tokenizer):
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
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


def examples(tokenizer, held_out, habits):
    """Endless batches of (input ids, labels): solutions with these habits, those of `able` in the words of both models.

    Eight batches at a time are sorted by length, so that little is padding.
    """
    rng = random.Random(habits)
    tiers = [SETS[tier][:4] for tier in ("easy", "medium", "hard")]
    while True:
        rows = []
        while len(rows) < 8 * BATCH:
            terms = make_terms(rng, *rng.choice(tiers))
            if write_out(terms) in held_out:
                continue
            solution, ends = make_solution(rng, terms, rng.choice(STYLES) if habits == "able" else habits, habits)
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


# ---------------------------------------------------------------------------------------------------- where training starts

LIMIT = 192  # tokens of a response on a laptop: 4 to 9 times a right one, as 8,192 are in the paper
OPEN = 0.85  # a token less probable than this was a choice
START = {  # what is measured: (base models, aligned ones, where that stands). Numbers of arXiv 2508.08221, version 3, unless said
    "pass@1": (
        "0.4-0.5 MATH-500, 0.03-0.06 AIME",
        "0.9 MATH-500, 0.4-0.5 AIME",
        "figures 8 and 12, where the axes begin",
    ),
    "pass@8": ("near 1 where it is easy", "near 1", "figure 2: few problems are solved never"),
    "reward std": ("0.24 easy to 0.48 hard", "", "figure 5, while training"),
    "length of right responses": ("1,000 to 2,000 of 8,192", "2,000 to 6,000 of 8,192", "figure 3"),
    "length of wrong ones / right": ("well above 1", "about 1", "figures 14 and 16; arXiv 2509.07558"),
    "spread of lengths, 95 % / 5 %": ("5 to 10", "", "arXiv 2509.07558"),
    "truncated": ("some, to the limit", "few", "figure 14; no number"),
    "truncated that loop": ("0.3 to 1", "0.3 to 1", "figure 14"),
    "truncated that are right": ("some", "", "figure 16; no number"),
    "entropy (nats)": ("0.05 to 0.30", "0.05 to 0.30", "figure 7"),
    "tokens of p >= 0.99": ("0.92 (4B), 0.74 (8B)", "0.54 (4B), 0.45 (8B)", "figures 9 and 20"),
    "words among open tokens": ("", "most", "figure 10: connectives and function words are clipped"),
}


def measure(style, sets=("eval_easy", "eval_medium", "eval_hard"), problems=100):
    """-> {what of START: [its value on each set]}, of 8 responses to each problem at temperature 1"""
    settings = dict(model=str(FOLDER / style), temperature=1.0, top_p=1.0, top_k=0, max_response_len=LIMIT, seed=0)
    settings |= dict(vllm_tensor_parallel=1, max_prompt_len=64, template="chat", enable_thinking="on")
    args = argparse.Namespace(**settings)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(FOLDER / style)
    engine, found = engines.HfEngine(args, tokenizer), {name: [] for name in START}
    for name in sets:
        batch = engine.generate(load_problems(FOLDER / f"{name}.jsonl", tokenizer, args)[:problems], 8, step=0)
        right = torch.tensor([rewards.math_reward(r.text, r.problem["answer"]) for r in batch])  # (N,)
        lengths = torch.tensor([float(len(r.ids)) for r in batch])  # (N,)
        cut = [(r, ok) for r, ok in zip(batch, right.tolist()) if r.truncated]
        words = [tokenizer.decode(i).strip() for r in batch for i in r.ids[r.engine_logp < math.log(OPEN)]]
        logp = torch.cat([r.engine_logp for r in batch])
        values = [
            right.mean(),
            right.view(-1, 8).amax(1).mean(),
            right.std(),
            lengths[right > 0].mean(),
            lengths[right == 0].mean() / lengths[right > 0].mean(),
            lengths.quantile(0.95) / lengths.quantile(0.05),
            len(cut) / len(batch),
            sum(rewards.repeats(r.ids) for r, _ in cut) / max(1, len(cut)),
            sum(ok for _, ok in cut) / max(1, len(cut)),
            -logp.mean(),
            (logp >= math.log(0.99)).float().mean(),
            sum(not set(word) & set("0123456789<") for word in words) / len(words),
        ]
        for row, value in zip(found.values(), values, strict=True):
            row.append(float(value))
    return found


def write_start():
    """Measures both models, prints the table and keeps it in start.json"""
    found = {style: measure(style) for style in STYLES}
    (FOLDER / "start.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(start_table(found)))


def start_table(found):
    """-> the lines of a table: the paper's numbers beside those of `measure`, easy, medium, hard"""
    lines = ["| before training | base: paper | base: here | aligned: paper | aligned: here | the paper's from |"]
    for name, (*theirs, source) in START.items():
        ours = [", ".join(f"{x:.3g}" if x >= 10 else f"{x:.2f}" for x in found[style][name]) for style in STYLES]
        cells = [name, theirs[0], ours[0], theirs[1], ours[1], source]
        lines += ["|---" * len(cells) + "|"] * (len(lines) == 1) + [f"| {' | '.join(cells)} |"]
    return lines


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--measure", action="store_true", help="only the table, of the models that are there")
    torch.set_num_threads(1)  # the order of additions, and so the last bits of the weights, depend on it
    if not p.parse_args().measure:
        make_models(make_problems(), make_tokenizer())
    write_start()


def make_models(held_out, tokenizer):
    FOLDER.mkdir(exist_ok=True)
    torch.manual_seed(0)
    able = make_model(tokenizer)
    able.generation_config.eos_token_id = tokenizer.eos_token_id
    pretrain(able, examples(tokenizer, held_out, "able"), *ABLE, "able")
    for style in STYLES:
        model = copy.deepcopy(able)
        pretrain(model, examples(tokenizer, held_out, style), *OWN, style)
        model.save_pretrained(FOLDER / style)
        tokenizer.save_pretrained(FOLDER / style)


if __name__ == "__main__":
    main()
