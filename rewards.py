r"""Text in, number out: what a response is worth. No torch, no model.

    extract_answer(text)        what stands in the last \boxed{...}
    math_reward(text, answer)   1.0 if that is equal to the answer, else 0.0
    repeats(token_ids)          does a truncated response say the same thing over and over at its end?

The answer of a problem is wrapped in a box before it is parsed: bare, `2\sqrt{3}` would be read as 2.
"""

import logging
import re
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

logging.getLogger("math_verify").setLevel(
    logging.CRITICAL
)  # failures are counted in `Grade.error`, not printed one by one
logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)

LONGEST_ANSWER = 600  # characters; longer boxes are no answers, and symbolic algebra on them can take minutes
DEEPEST_ANSWER = 12  # braces within braces; the parser's cost grows steeply with them
SECONDS = 2  # for parsing, and again for comparing

REPEATS = 3  # a block said three times in a row is a loop; twice can be emphasis
REPEAT_SPAN = 24  # tokens the loop must fill: three short sentences. Repeated digits and dots are shorter than that


@dataclass(frozen=True)
class Grade:
    correct: bool
    error: str = (
        ""  # why the grader failed to compare ("" where it did compare); such an answer earns nothing, and is counted
    )


def extract_answer(text: str) -> str | None:
    r"""The inside of the last \boxed{...} that is closed, stripped; None where there is none. One pass over the text."""
    answer, last, stack = None, -1, []
    for m in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if m[0] == "}":
            is_box, start = stack.pop() if stack else (False, 0)
            if is_box and start > last:
                answer, last = text[start : m.start()].strip(), start
        elif m[0][-1] == "{" and m[0] != r"\{":
            stack.append((m[0] != "{", m.end()))
    return answer


def normalise(answer: str) -> str:
    """Marks that never change a value go: dollars, spaces, a full stop at the end, commas between thousands."""
    answer = re.sub(r"\\[!,;: ]|[$\s]|\{,\}(?=\d{3})", "", answer).rstrip(".")
    return answer.replace(",", "") if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", answer) else answer


def is_number(answer: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", answer, re.ASCII) is not None


def too_hard(answer: str) -> bool:
    """What may keep symbolic algebra busy for minutes: long, deep, huge literals, towers of powers, large or nested factorials."""
    depth = deepest = 0
    for character in answer:
        depth += (character == "{") - (character == "}")
        deepest = max(deepest, depth)
    return (
        len(answer) > LONGEST_ANSWER
        or deepest > DEEPEST_ANSWER
        or re.search(r"\d{60}|\*\*|\^\{?-?\d{5}|\^[^+\-=,]*\^|\d{3}!|!\)?!", answer) is not None
    )


def grade(text: str, answer: str) -> Grade:
    r"""Is the last box of `text` equal to `answer` (LaTeX without a box)? Never raises, whatever the strings.

    Equal strings and plain numbers are decided here; the rest by math-verify, the answer first, as it is not symmetric.
    """
    boxed = extract_answer(text)
    if boxed is None or boxed == "":
        return Grade(False)
    ours, theirs = normalise(boxed), normalise(answer)
    if ours == theirs:
        return Grade(True)
    if is_number(ours) and is_number(theirs):
        return Grade(Decimal(ours) == Decimal(theirs))
    if too_hard(ours):
        return Grade(False)
    return compare(theirs, ours)


def compare(answer: str, boxed: str) -> Grade:
    from math_verify import parse, verify  # 1 s to import, and only needed for answers that are no plain numbers
    from math_verify.errors import TimeoutException  # no Exception: `except Exception` would let it through

    try:
        gold, given = (parse(rf"\boxed{{{a}}}", parsing_timeout=SECONDS, raise_on_error=True) for a in (answer, boxed))
        return Grade(bool(verify(gold, given, timeout_seconds=SECONDS, raise_on_error=True)))
    except TimeoutException:
        return Grade(False, "timeout")
    except Exception as error:  # whatever the parser or the algebra stumbles over; counted by the caller
        return Grade(False, type(error).__name__)


def math_reward(text: str, answer: str) -> float:
    return float(grade(text, answer).correct)


def repeats(token_ids) -> bool:
    """Does the sequence end in a block said at least REPEATS times in a row, over at least REPEAT_SPAN tokens?

    Walks back from the cut, as in appendix B.1 of arXiv 2508.08221 (which gives no threshold; these are ours). The last copy
    may be cut short. Meant for truncated responses: a response that ends by itself has stopped repeating.
    """
    backwards = np.asarray(token_ids)[::-1]
    for period in range(1, len(backwards) // REPEATS + 1):
        same = backwards[period:] == backwards[:-period]
        run = period + (len(same) if same.all() else int(same.argmin()))  # tokens at the end that have this period
        if run >= max(REPEATS * period, REPEAT_SPAN):
            return True
    return False
