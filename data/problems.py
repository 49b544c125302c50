"""Problems and prompts: what stands in a data file, and what a model is asked."""

import random

from infra.policy import find
from infra.processes import ROOT, fail
from infra.runs import read_jsonl

SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."  # arXiv 2508.08221, appendix A.2
PLAIN = "{system}\n\nProblem: {problem}\n\nSolution:"  # --template plain


def render(problem, tokenizer, template="chat", enable_thinking="on"):
    """-> the text of a prompt. A chat template that does not know `enable_thinking` takes no notice of it."""
    if template == "plain":
        return PLAIN.format(system=SYSTEM, problem=problem)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": problem}]
    switch = {"enable_thinking": enable_thinking == "on"}
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **switch)


def load_problems(path, tokenizer, args):
    """-> the rows of a .jsonl file, with `prompt_ids`. A row needs `problem` and `answer`; its `id` may be its line.

    args: max_prompt_len, template, enable_thinking"""
    found = read_jsonl(path, damaged=lambda i: fail(f"{path}, line {i}: not JSON; write one object a line"))
    if not found:
        fail(f"{path}, line 1: the file is empty; write one object a line")
    rows, ids = [], set()
    for i, row in found:
        for key in ("problem", "answer"):
            value = row.get(key) if isinstance(row, dict) else None
            if value is None or not str(value).strip():
                fail(f'{path}, line {i}: "{key}" is missing or empty; remove the line or fill it in')
        row |= {"id": str(row.get("id", f"{path.stem}-{i}")), "answer": str(row["answer"])}
        if row["id"] in ids:  # they would be sampled with the same seeds
            fail(f'{path}, line {i}: a second "id" {row["id"]}; give each problem its own, or none')
        ids.add(row["id"])
        text = render(str(row["problem"]), tokenizer, args.template, args.enable_thinking)
        plain = args.template == "plain"  # a chat template has its own special tokens
        row["prompt_ids"] = tokenizer.encode(text, add_special_tokens=plain)
        length, limit = len(row["prompt_ids"]), args.max_prompt_len
        if length > limit:
            fail(f"{path}, line {i}: a prompt of {length} tokens; raise --max_prompt_len {limit} or remove it")
        rows.append(row)
    return rows


def load_tokenizer(args):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(find(args.model)))
    if args.template == "chat" and not tokenizer.chat_template:
        fail(f"--template chat: {args.model} has no chat template; give --template plain")
    if args.enable_thinking == "off" and "enable_thinking" not in str(tokenizer.chat_template):
        fail(f"--enable_thinking off: the chat template of {args.model} has no such switch; leave it out")
    return tokenizer


def data_files(args, flag, given):
    """-> the files that --data or --eval_data names; one that is not there is refused"""
    folder, names = ROOT / "data" / ("tiny" if args.scale == "laptop" else ""), given.split(",")
    paths = [find(name) if name.endswith(".jsonl") else folder / f"{name}.jsonl" for name in names]
    advice = "give a .jsonl file, a name there" + ", or make it with data/prepare.py" * (args.scale == "node")
    for name, path in zip(names, paths):
        if not path.is_file():
            fail(f"--{flag} {name}: there is no {path}; {advice}")
    return paths


def load_data(args, files, eval_files, tokenizer):
    """-> the Problems of --data, the rows of all of --eval_data, each with the `set` it is from"""
    rows = [row for file in files[:1] for row in load_problems(file, tokenizer, args)]
    if args.steps and len(rows) < args.prompts_per_step:
        have = f"--data {args.data} has {len(rows)} problems"
        fail(f"--prompts_per_step {args.prompts_per_step}: {have}; lower it")
    eval_rows = [
        row | {"set": file.stem.removeprefix("eval_")}
        for file in eval_files
        for row in load_problems(file, tokenizer, args)
    ]
    return Problems(rows, args.seed), eval_rows


class Problems:
    """The training problems, in an order that is a function of (seed, epoch): `cursor` is all there is to save."""

    def __init__(self, rows, seed):
        self.rows, self.seed, self.cursor = rows, seed, 0

    def take(self, n):
        """-> the next n problems, all different: what is left of an epoch is not used when it is fewer."""
        epoch, start = divmod(self.cursor, len(self.rows))
        if start + n > len(self.rows):
            epoch, start = epoch + 1, 0
        self.cursor = epoch * len(self.rows) + start + n
        order = random.Random(f"{self.seed} {epoch}").sample(range(len(self.rows)), len(self.rows))
        return [self.rows[i] for i in order[start : start + n]]
