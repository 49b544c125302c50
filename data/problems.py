"""Problems and prompts: what stands in a data file, and what a model is asked."""

import functools
import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from decimal import Decimal

from jinja2 import TemplateError

from infra.policy import find
from infra.processes import ROOT, fail, rank
from infra.runs import read_jsonl
from rewards import Task, extract_answer

SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."  # arXiv 2508.08221, appendix A.2
PROBLEM = ("problem", "question", "extra_info.question", "prompt")  # columns of data sets; the first that is there
ANSWER = ("gt_answer", "final_answer", "reward_model.ground_truth", "answer", "solution")
ELSEWHERE = r"reasoning_gym:\w+(:\d+){0,2}|[\w.-]+/[\w.-]+(:[\w.-]+){0,2}"  # what data/hub.py makes a file of
PLAIN = "{system}\n\nProblem: {problem}\n\nSolution:"  # --template plain


def render(problem, tokenizer, template="chat", enable_thinking="on"):
    """-> the text of a prompt. problem: a text, or the messages of a chat, [{"role", "content"}, ...]

    A chat template that does not know `enable_thinking` takes no notice of it; one that has no system role gets the
    system message in front of the user's."""
    if template == "plain":
        return PLAIN.format(system=SYSTEM, problem=text_of(problem))
    messages = [{"role": "user", "content": problem}] if isinstance(problem, str) else problem
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SYSTEM}, *messages]
    if system_role(tokenizer) == "refused":
        system, user, *rest = messages
        messages = [user | {"content": f"{system['content']}\n\n{user['content']}"}, *rest]
    how = dict(add_generation_prompt=True, tokenize=False, enable_thinking=enable_thinking == "on")
    return tokenizer.apply_chat_template(messages, **how)


@functools.cache
def system_role(tokenizer):
    """-> what its chat template makes of a system message: "said", "left out" or "refused" """
    turns = [{"role": role, "content": f"{role}'s"} for role in ("system", "user")]
    try:
        return "said" if "system's" in tokenizer.apply_chat_template(turns, tokenize=False) else "left out"
    except TemplateError:
        return "refused"


def text_of(problem):
    """-> what a problem asks: itself, or what the messages of a chat say but for the system's"""
    asked = problem if isinstance(problem, str) else [m["content"] for m in problem if m["role"] != "system"]
    return asked if isinstance(asked, str) else "\n\n".join(asked)


def read_problem(value):
    """-> a text or messages, or ValueError with the reason"""
    if isinstance(value, list):
        good = lambda m: isinstance(m, dict) and all(isinstance(m.get(key), str) for key in ("role", "content"))
        if not value or not all(map(good, value)) or value[-1]["role"] != "user":
            raise ValueError('"problem" is a list, but not of messages {"role", "content"} that end with the user\'s')
    elif not isinstance(value, str):
        raise ValueError(f'"problem" is a {type(value).__name__}, not a text')
    if not text_of(value).strip():
        raise ValueError('"problem" is missing or empty')
    text_of(value).encode()  # a lone surrogate is no text: UnicodeEncodeError, a ValueError
    return value


def read_answer(value):
    """-> the answer that a response is compared with, in LaTeX without a box, or ValueError with the reason

    Of a whole solution it is what stands after ####, or in the last box; dollars around it go."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f'"answer" is a {type(value).__name__}, not a text or a number')
    if not isinstance(value, str) and not math.isfinite(value):
        raise ValueError(f'"answer" is {value}')
    text = format(Decimal(repr(value)), "f") if isinstance(value, float) else str(value)  # not 1e-05
    text.encode()
    text = text.rsplit("####", 1)[-1].strip()
    boxed = extract_answer(text)
    text = text if boxed is None else boxed
    text = re.sub(r"^(\$+|\\\(|\\\[)([^$]*?)(\$+|\\\)|\\\])$", r"\2", text).strip()
    if not text:
        raise ValueError('"answer" is missing or empty')
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[a-zA-Z]+\s*(\{[^{}]*\})?", " ", text))
    if len(words) > 2 and (text.endswith(".") or "answer is" in text.lower()):
        raise ValueError(f'"answer" is a sentence: {text[:60]}')
    return text


def load_problems(path, tokenizer, args):
    """-> the rows of a .jsonl file, with `prompt_ids`. A row needs `problem` and `answer`; its `id` may be its line.

    args: max_prompt_len, template, enable_thinking"""
    found = read_jsonl(path, damaged=lambda i: fail(f"{path}, line {i}: not JSON; write one object a line"))
    if not found:
        fail(f"{path}, line 1: the file is empty; write one object a line")
    rows, ids, wrong = [], set(), []
    for i, row in found:
        try:
            if not isinstance(row, dict) or None in (row.get("problem"), row.get("answer")):
                raise ValueError('"problem" or "answer" is missing or empty')
            asked = read_problem(row["problem"])
            row["id"] = f"{path.stem}-{i}" if row.get("id") is None else str(row["id"])
            row["answer"] = Task(row) if "task" in row else read_answer(row["answer"])
            text, row["problem"] = render(asked, tokenizer, args.template, args.enable_thinking), text_of(asked)
        except (ValueError, TemplateError) as error:  # the latter: of messages that the template refuses
            wrong.append(f"line {i}: {error}")
            continue
        if row["id"] in ids:  # they would be sampled with the same seeds
            fail(f'{path}, line {i}: a second "id" {row["id"]}; give each problem its own, or none')
        ids.add(row["id"])
        plain = args.template == "plain"  # a chat template has its own special tokens
        row["prompt_ids"] = tokenizer.encode(text, add_special_tokens=plain)
        length, limit = len(row["prompt_ids"]), args.max_prompt_len
        if length > limit:
            fail(f"{path}, line {i}: a prompt of {length} tokens; raise --max_prompt_len {limit} or remove it")
        rows.append(row)
    if wrong:
        fail(f"{path}, {'; '.join(wrong[:3])}; {len(wrong)} such of {len(found)} lines: mend or remove them")
    return rows


def load_tokenizer(args):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(find(args.model)))
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):  # transformers makes one of nothing
        fail(f"--model {args.model}: its tokenizer has no vocabulary; are its files there?")
    if args.template == "chat" and not tokenizer.chat_template:
        fail(f"--template chat: {args.model} has no chat template; give --template plain")
    if args.enable_thinking == "off" and "enable_thinking" not in str(tokenizer.chat_template):
        fail(f"--enable_thinking off: the chat template of {args.model} has no such switch; leave it out")
    if "12345" not in render("12345", tokenizer, args.template):  # it may fail at all; `refused` says so
        fail(f"--model {args.model}: its chat template leaves out what the user says")
    if args.template == "chat" and system_role(tokenizer) != "said" and rank() == 0:
        where = {"left out": "is left out", "refused": "stands in front of the user's"}[system_role(tokenizer)]
        print(f"{args.model}: its chat template has no system role; that message {where}")
    return tokenizer


def data_files(args, flag, given):
    """-> the files that --data or --eval_data names; one that is not there is refused"""
    folder, names = ROOT / "data" / ("tiny" if args.scale == "laptop" else ""), given.split(",")
    paths = [find(name) if name.endswith(".jsonl") else folder / f"{name}.jsonl" for name in names]
    for i, name in enumerate(names):
        if not paths[i].is_file() and not name.endswith(".jsonl") and re.fullmatch(ELSEWHERE, name):
            paths[i] = from_elsewhere(flag, name, args.columns)
    advice = "give a .jsonl file, a name there" + ", or make it with data/prepare.py" * (args.scale == "node")
    for name, path in zip(names, paths):
        if not path.is_file():
            fail(f"--{flag} {name}: there is no {path}; {advice}")
    return paths


def column(row, names):
    """The value of the first of these columns that the row has; "a.b" is column b of column a"""
    for name in names:
        value = row
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return value


def hub_file(name, columns):
    return ROOT / "data" / "hub" / f"{re.sub(r'[^.a-zA-Z0-9=_-]+', '-', f'{name} {columns}'.strip())}.jsonl"


def from_elsewhere(flag, name, columns):
    """-> the file that data/hub.py makes, in a process of its own, as one at this scale may keep to what is here"""
    path = hub_file(name, columns)
    if rank() == 0 and not path.is_file():
        environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        command = [sys.executable, ROOT / "data" / "hub.py", name, *(["--columns", columns] if columns else [])]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            fail(f"--{flag} {(done.stderr.splitlines() or [name])[-1].removeprefix('hub.py: ')}", everywhere=True)
    while not path.is_file():  # the first process makes it
        time.sleep(1)
    return path


def load_data(args, files, eval_files, tokenizer):
    """-> the Problems of --data, the rows of all of --eval_data, each with the `set` it is from"""
    rows = [row for file in files for row in load_problems(file, tokenizer, args)]
    if twice := next((name for name, n in Counter(row["id"] for row in rows).items() if n > 1), None):
        fail(f'--data {args.data}: two problems have the "id" {twice}, and would be sampled with the same seeds')
    if args.steps and len(rows) < args.prompts_per_step:
        have = f"--data {args.data} has {len(rows)} problems"
        fail(f"--prompts_per_step {args.prompts_per_step}: {have}; lower it")
    names = [file.stem.removeprefix("eval_") for file in eval_files]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        fail(f"--eval_data {args.eval_data}: two sets are called {twice}; leave one out, or rename its file")
    if "mean" in names:
        fail(f"--eval_data {args.eval_data}: a set may not be called mean, as the mean over sets is; rename its file")
    eval_rows = [
        row | {"set": name} for name, file in zip(names, eval_files) for row in load_problems(file, tokenizer, args)
    ]
    asked = {tuple(row["prompt_ids"]) for row in rows}
    if (both := sum(tuple(row["prompt_ids"]) in asked for row in eval_rows)) and rank() == 0:
        print(f"--eval_data {args.eval_data}: {both} of its {len(eval_rows)} problems are in --data {args.data} too")
    return Problems(rows, args.seed, eval_rows), eval_rows


class Problems:
    """The training problems, in an order that is a function of (seed, epoch): `cursor` is all there is to save."""

    def __init__(self, rows, seed, eval_rows=()):
        self.rows, self.seed, self.cursor = rows, seed, 0
        told = [[row.get(key) for key in ("id", "prompt_ids", "answer")] for row in [*rows, *eval_rows]]
        self.digest = hashlib.sha256(
            json.dumps(told).encode()
        ).hexdigest()  # a run goes on with the same problems alone

    def take(self, n):
        """-> the next n problems, all different: what is left of an epoch is not used when it is fewer."""
        epoch, start = divmod(self.cursor, len(self.rows))
        if start + n > len(self.rows):
            epoch, start = epoch + 1, 0
        self.cursor = epoch * len(self.rows) + start + n
        order = random.Random(f"{self.seed} {epoch}").sample(range(len(self.rows)), len(self.rows))
        return [self.rows[i] for i in order[start : start + n]]
