r"""What a response is worth: text in, number out; and whether it ends in a loop: token ids in. No torch, no model.

    extract_answer(text)        what stands in the last \boxed{...}
    math_reward(text, answer)   1.0 if that is equal to the answer, else 0.0
    GradePool().grade(pairs)    the same for many, in processes that can be killed
    repeats(token_ids)          does a truncated response say the same thing over and over at its end?

The answer of a problem is wrapped in a box before it is parsed: bare, `2\sqrt{3}` would be read as 2.
"""

import contextlib
import json
import logging
import os
import re
import resource
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from decimal import Context, Decimal
from pathlib import Path

import numpy as np

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # failures are counted in `Grade.error`, not printed
logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)

LONGEST_ANSWER = 600  # characters; longer boxes are no answers, and symbolic algebra on them can take minutes
DEEPEST_ANSWER = 12  # braces within braces; the parser's cost grows steeply with them
BETWEEN = 40  # characters between two boxes of a list, at most
WORKERS = 4  # processes that compare, for each process that trains
SECONDS = 2  # to parse and compare one answer
START_SECONDS = 60  # for a worker to start; a second or two where the machine is idle
WALL_SECONDS = 2.4  # after that a worker is killed; its own alarm comes first, where the interpreter gets to it
MEMORY = 2 << 30  # bytes a worker may use
REMEMBERED = 100_000  # comparisons

REPEATS = 3  # a block said three times in a row is a loop; twice can be emphasis
REPEAT_SPAN = 24  # tokens the loop must fill: three short sentences. Repeated digits and dots are shorter than that


@dataclass(frozen=True)
class Grade:
    correct: bool
    error: str = ""  # why the grader failed to compare, where it did; such an answer counts as wrong, and is counted


def extract_answer(text: str) -> str | None:
    r"""The inside of the last \boxed{...} that is closed, stripped; None where there is none. One pass over the text.

    After a </think> only what follows it counts. Boxes that follow each other with nothing but commas, "and", "or" or
    space between them are one answer, a list: several candidates are not the right one.
    """
    text = text[text.rfind("</think>") + 1 :]
    boxes, stack = [], []  # (start, end) of each box that is closed
    for m in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if m[0] == "}":
            is_box, start = stack.pop() if stack else (False, 0)
            if is_box:
                boxes.append((start, m.start()))
        elif m[0][-1] == "{" and m[0] != r"\{":
            stack.append((m[0] != "{", m.end()))
    if not boxes:
        return None
    start, end = max(boxes)
    listed, first = [text[start:end].strip()], start
    for start, end in sorted(boxes, reverse=True)[1:]:
        if end > first:  # the box around it
            continue
        if first - end > BETWEEN or not re.fullmatch(r"\}[\s,;$]*(and|or)?[\s,;$]*\\boxed\s*\{", text[end:first]):
            break
        listed, first = [text[start:end].strip(), *listed], start
    return ", ".join(listed) if len(set(listed)) > 1 else listed[0]


SAME = {  # the same mark in other letters, and marks that say nothing
    "−": "-", "×": r"\times ", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ",
    "°": r"^\circ ", r"\degree": r"^\circ ", "∅": r"\emptyset ", r"\varnothing": r"\emptyset ",
    r"\displaystyle": "", r"\text{\$}": "", r"\$": "", r"\dfrac": r"\frac", r"\tfrac": r"\frac",
    r"\mbox": r"\text", r"\textbf": r"\text", r"\textrm": r"\text", r"\textnormal": r"\text",
}  # fmt: skip
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
SYMBOL = r"(?:\\?[a-zA-Z]+|\\math\w+\{\w+\})(?:_\{?[\\\w]+\}?|\(\w\))?"  # x, \theta, \mathbf{M}, I_{\max}, f(x)


NO_LETTERS = r"\\(?:text|mathrm|mathbb|operatorname|begin|end)\*?\{[^}]*\}(?:\{[|lcr]*\})?|\\[a-zA-Z]+"
SCALED = r"(?:[-+*/\d}]|\\cdot|\\times)\(+(?=[^()]*,)|(?<=,)[^(),]*\)+\^"  # a sign, factor or power at a tuple: -(1,2), (1,2)^2


def normalise(answer: str) -> str:
    """One form for what is written in several ways and never changes a value: other letters for a sign, dollars, spaces,
    sizes of brackets, a full stop at the end, marks between thousands, percent in words, 4.5e33 for 4.5 x 10^33."""
    for mark, other in SAME.items():
        answer = answer.replace(mark, other)
    answer = re.sub(r"\\(?:[bB]igg?[lrm]?|(?:left|right)(?=\s*[()\[\]|\\]))(?![a-zA-Z])", "", answer)
    answer = re.sub(r"√\{?(\w+)\}?", r"\\sqrt{\1}", answer)
    answer = re.sub(r"\s*(percentage|percent)\b", r"\\%", answer)
    answer = re.sub(r"(?<!\\)\\[!,;: ]|\{,\}", lambda m: "," if m[0] == "{,}" else " ", answer.replace("$", ""))
    answer = re.sub(r"(?<=\d)\s(?=\d{3}(?!\d))", "", answer)  # 15 400
    answer = re.sub(r"(\\[a-zA-Z]+|\d)?\s+(?=(\w)?)", keep_apart, answer).rstrip(".")
    answer = re.sub(rf"(?<![\w.])({NUMBER})[eE]([+-]?\d+)(?!\w)", r"\1\\times10^{\2}", answer, flags=re.ASCII)
    answer = re.sub(r"([_^])\{(\w)\}", r"\1\2", answer)
    whole = re.fullmatch(r"(?:\\text|\\mathrm)?\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}", answer)
    answer = whole[1].strip() if whole else answer
    if re.fullmatch(r"[a-zA-Z]{2,}", answer):  # a word, such as Yes
        return answer.lower()
    return answer.replace(",", "") if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", answer, re.ASCII) else answer


def keep_apart(m: re.Match) -> str:
    r"""Space goes, except where it ends a name such as \pi before a letter, and between two digits."""
    before, after = m[1] or "", m[2] or ""
    return before + " " * (after.isalpha() if before.startswith("\\") else before.isdigit() and after.isdigit())


def value(answer: str) -> Decimal | None:
    """Of a plain number, also times a power of ten; None of anything else."""
    m = re.fullmatch(rf"({NUMBER})(?:\\(?:times|cdot)10\^\{{?([+-]?\d{{1,4}})\}}?)?", answer, re.ASCII)
    return m and Decimal(m[1]).scaleb(int(m[2] or 0), Context(prec=len(m[1]) + 1))


def without_unit(answer: str, other: str) -> str:
    """The number before a unit in words, where `other` has none."""
    m = re.fullmatch(r"(.*\d\}?)\\(?:text|mathrm)\{[^}]*\}", answer)
    return m[1] if m and r"\text" not in other and r"\mathrm" not in other else answer


def right_side(answer: str, other: str) -> str:
    """What x is, where `answer` says "x = ..." and `other` names no letter, or the same."""
    m, n = (re.fullmatch(rf"({SYMBOL})(?:=|\\approx)([^=<>]+)", side) for side in (answer, other))
    return m[2] if m and (n[1] == m[1] if n else "=" not in other) else answer


def nonsense(ours: str, theirs: str) -> bool:
    """What symbolic algebra would let pass: 41 = 42, a base nobody asked for, a computation left to the grader, --5, -(1,2)
    for (1,2), (0,\\infty] for (0,\\infty)."""
    sides = {value(side.replace(r"\%", r"\times10^{-2}")) for side in ours.split("=")}
    base = re.fullmatch(r"[+-]?\w+_\{?\d+\}?", ours, re.ASCII)
    work = [name for name in (r"\int", r"\sum", r"\prod", r"\lim") if name in ours and name not in theirs]
    return (
        ("=" in ours and None not in sides and len(sides) > 1)
        or (base is not None and re.sub("[{}]", "", ours) != re.sub("[{}]", "", theirs))
        or bool(work)
        or re.search(r"[+-]{2}", ours) is not None
        or re.findall(SCALED, ours) != re.findall(SCALED, theirs)
        or (r"\infty]" in ours and r"\infty]" not in theirs)
    )


def too_hard(answer: str) -> bool:
    """What may keep symbolic algebra busy for minutes: long, deep, huge literals, towers of powers, large or nested factorials."""
    depth = deepest = 0
    for character in answer:
        depth += (character == "{") - (character == "}")
        deepest = max(deepest, depth)
    return (
        len(answer) > LONGEST_ANSWER
        or deepest > DEEPEST_ANSWER
        or re.search(r"\d{60}|\*\*|\^\{?-?\d{5}|\^\w\^|\d{3}!|!\)?!", answer) is not None
        or any(re.search(r"\d[)}]*\^[({]*\d", exponent) for exponent in exponents(answer))  # a power in an exponent
    )


def exponents(answer: str) -> list[str]:
    """What stands in brackets after each ^"""
    found = []
    for m in re.finditer(r"\^\s*[{(]", answer):
        depth, end = 1, m.end()
        while depth and end < len(answer):
            depth += (answer[end] in "{(") - (answer[end] in "})")
            end += 1
        found.append(answer[m.end() : end])
    return found


def decide(text: str, answer: str) -> Grade | tuple[str, str]:
    """What strings and numbers can decide; else what math-verify has to compare, the answer first: it is not symmetric."""
    boxed = extract_answer(text)
    if isinstance(answer, Task):
        return answer.grade(boxed)
    if boxed is None or boxed == "":
        return Grade(False)
    if max(len(boxed), len(answer)) > LONGEST_ANSWER:
        return Grade(boxed == answer)
    ours, theirs = normalise(boxed), normalise(answer)
    ours, theirs = right_side(ours, theirs), right_side(theirs, ours)
    ours, theirs = without_unit(ours, theirs), without_unit(theirs, ours)
    if ours == theirs:
        return Grade(True)
    if (a := value(ours)) is not None and (b := value(theirs)) is not None:
        return Grade(a == b)
    if too_hard(ours) or nonsense(ours, theirs):
        return Grade(False)
    return theirs, ours


class Task(str):
    """The answer to a task of reasoning-gym, which knows how a response is scored. row: its name, `task`, its `entry`"""

    def __new__(cls, row: dict):
        self = super().__new__(cls, row["answer"])
        self.task, self.entry = row["task"], row["entry"]
        return self

    def grade(self, boxed: str | None) -> Grade:
        import reasoning_gym

        def right():
            return reasoning_gym.get_score_answer_fn(self.task)(answer=boxed, entry=self.entry) > 0.99

        return Grade(False) if boxed is None else in_time(right)


def grade(text: str, answer: str) -> Grade:
    r"""Is the last box of `text` equal to `answer` (LaTeX without a box)? Never raises, whatever the strings.

    For one pair, in the main thread of this process; many are for a `GradePool`.
    """
    decided = decide(text, answer)
    return decided if isinstance(decided, Grade) else compare(*decided)


def compare(answer: str, boxed: str) -> Grade:
    from math_verify import parse, verify  # 1 s to import, and only needed for answers that are no plain numbers

    def equal():
        gold, given = (parse(rf"\boxed{{{a}}}", parsing_timeout=None, raise_on_error=True) for a in (answer, boxed))
        return (
            gold
            and given
            and understood(answer, gold[0])
            and understood(boxed, given[0], unit=True)
            and verify(gold, given, timeout_seconds=None, raise_on_error=True)
            and not far_apart(gold[0], given[0])
        )

    return in_time(equal)


class TimeIsUp(BaseException):  # no Exception: `except Exception` would let it through
    pass


def in_time(right) -> Grade:
    """What `right` says, unless it takes longer than SECONDS or stumbles."""

    def time_is_up(*_):
        raise TimeIsUp

    try:
        before = signal.signal(signal.SIGALRM, time_is_up)
        signal.setitimer(signal.ITIMER_REAL, SECONDS, 0.5)  # and again and again: the algebra may swallow one
        try:
            return Grade(bool(right()))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    except TimeIsUp:
        return Grade(False, "timeout")
    except Exception as error:  # whatever the parser or the algebra stumbles over; counted by the caller
        return Grade(False, type(error).__name__)


def understood(answer, parsed, unit=False) -> bool:
    r"""Does what was parsed hold every letter of the answer? Of 2ab and \gcd(n, p-1) math-verify sees 2 and 1. With `unit`,
    letters after a number may be lost. And what it leaves a string, `decide` has compared as one."""
    from sympy import Symbol
    from sympy.core.function import AppliedUndef

    if isinstance(parsed, str):
        return False
    answer = re.sub(NO_LETTERS, " ", answer).lower()
    seen = "".join(map(str, parsed.atoms(Symbol, AppliedUndef))).lower() if hasattr(parsed, "atoms") else ""
    letters = re.findall(r"[a-cf-hj-z]|[dei](?=_)", answer)  # not d of d/dx, nor the constants e and i
    lost = set(letters) - set(seen)
    return not lost or (unit and re.fullmatch(r"[^a-z]*\d\}?[a-z^/\d]*", answer) is not None)


def far_apart(a, b) -> bool:
    """Two numbers so small that math-verify, which rounds to decimals, takes them for equal: 2^-98 and 2^-99"""
    if not all(getattr(x, "is_number", False) and getattr(x, "is_real", False) for x in (a, b)):
        return False
    a, b = a.evalf(20), b.evalf(20)
    return max(abs(a), abs(b)) < 1e-6 and abs(a - b) > 1e-6 * max(abs(a), abs(b))


def math_reward(text: str, answer: str) -> float:
    return float(grade(text, answer).correct)


def serve():
    """What a worker of the pool runs: a line of JSON in, a line out, until its input ends with the process that reads it."""
    out = os.dup(1)
    os.dup2(2, 1)  # whatever a library may print
    import math_verify  # noqa: F401  (so that the first answer does not wait for it)

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.write(out, b"ready\n")
    for line in sys.stdin:
        g = compare(*json.loads(line))
        os.write(out, json.dumps([g.correct, g.error]).encode() + b"\n")


class GradePool:
    """Grades many answers, in order. What `decide` cannot decide goes to worker processes, one comparison at a time each.

    A worker that takes longer than `seconds` of wall clock, or dies, is replaced; its answer counts as wrong and says why.
    A worker starts when there is work for one more, which takes seconds of a core, and ends with this process.
    """

    def __init__(self, workers: int = WORKERS, seconds: float = WALL_SECONDS):
        self.count, self.seconds, self.known = workers, seconds, {}
        self.workers, self.starting = [], set()  # those that start are given work, but its time does not run yet

    def grade(self, pairs: list[tuple[str, str]]) -> list[Grade]:
        """(text, answer) of each -> its Grade"""
        decided = [decide(*pair) for pair in pairs]
        hard = dict.fromkeys(d for d in decided if not isinstance(d, Grade) and d not in self.known)
        found = self.compare_all(list(hard))
        grades = [d if isinstance(d, Grade) else found.get(d) or self.known[d] for d in decided]
        self.known |= {pair: g for pair, g in found.items() if not g.error}
        if len(self.known) > REMEMBERED:
            self.known = {}
        return grades

    def compare_all(self, todo):
        busy, found = {}, {}  # worker -> (pair, when its time is up)
        for worker in [w for w in self.workers if w.poll() is not None]:  # died while it had nothing to do
            self.replace(worker)
        while len(self.workers) < min(self.count, len(todo)):
            self.start_one()
        while todo or busy:
            for worker in [w for w in self.workers if w not in busy][: len(todo)]:
                pair = todo.pop()
                with contextlib.suppress(BrokenPipeError):  # it dies just now: what is read below will say so
                    worker.stdin.write(json.dumps(pair).encode() + b"\n")
                limit = START_SECONDS if worker in self.starting else self.seconds
                busy[worker] = pair, time.monotonic() + limit
            wait = max(0, min(end for _, end in busy.values()) - time.monotonic())
            with selectors.DefaultSelector() as selector:  # select.select fails at a file descriptor above 1,023
                for worker in busy:
                    selector.register(worker.stdout, selectors.EVENT_READ)
                heard = [key.fileobj for key, _ in selector.select(wait)]
            for worker, (pair, end) in list(busy.items()):
                said = os.read(worker.stdout.fileno(), 4096) if worker.stdout in heard else None
                for line in (said or b"").splitlines():  # a worker writes whole lines
                    if line == b"ready":
                        self.starting.discard(worker)
                        busy[worker] = pair, time.monotonic() + self.seconds
                    else:
                        found[pair] = Grade(*json.loads(line))
                if said == b"" or (said is None and time.monotonic() > end):
                    found[pair] = Grade(False, "died" if said == b"" else "timeout")
                    self.replace(worker)
                if pair in found:
                    del busy[worker]
        return found

    def start_one(self):
        self.workers.append(start_worker())
        self.starting.add(self.workers[-1])

    def replace(self, worker):
        self.workers.remove(worker)
        self.starting.discard(worker)
        worker.kill()
        worker.wait()
        self.start_one()

    def close(self):
        for worker in self.workers:
            worker.kill()
            worker.wait()
        self.workers, self.starting = [], set()


def start_worker():
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", "import rewards; rewards.serve()"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
    return subprocess.Popen(command, cwd=Path(__file__).parent, env=env, **pipes)


def repeats(token_ids) -> bool:
    """Does the sequence end in a block said at least REPEATS times in a row, over at least REPEAT_SPAN tokens?

    Walks back from the end, as in appendix B.1 of arXiv 2508.08221 (which gives no threshold; these are ours). The last copy
    may be incomplete. Meant for truncated responses: a response that ends by itself has stopped repeating.
    """
    backwards = np.asarray(token_ids)[::-1]
    for period in range(1, len(backwards) // REPEATS + 1):
        same = backwards[period:] == backwards[:-period]
        run = period + (len(same) if same.all() else int(same.argmin()))  # tokens at the end that have this period
        if run >= max(REPEATS * period, REPEAT_SPAN):
            return True
    return False
