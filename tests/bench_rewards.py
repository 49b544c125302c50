"""How long it takes to grade a rollout, and how often the grader is right.

    python tests/bench_rewards.py                   1,024 responses of 4,000 characters, three times
    python tests/bench_rewards.py --cases FILE      rows {"gold", "completion", "expected", "group"}: agreement with math-verify's beside it
    python tests/bench_rewards.py --golds FILE ...  the answers of data sets, rewritten in harmless and in harmful ways: what is graded right

Of the rollout a quarter of the answers are plain numbers, the others go to math-verify: fractions, roots, polynomials,
intervals, each response another one, so that nothing is remembered from one round to the next.
"""

import argparse
import collections
import json
import re
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from rewards import GradePool, math_reward

FORMS = [  # answer, box
    ("{n}", "{n}"),
    (r"\frac{{{n}}}{{7}}", r"{n}/7"),
    (r"\sqrt{{{n}}}", r"\sqrt{{4*{n}}}/2"),
    (r"x^2+{n}", r"{n}+x^2"),
    (r"[{n},\infty)", r"[{n},\infty )"),
    (r"{n}\pi", r"{n} \cdot \pi"),
    (r"\frac{{1}}{{{n}}}", r"\frac{{2}}{{2*{n}}}"),
    ("{n}", "{n}.0"),
]


HARMLESS = {
    "as it stands": lambda a: a,
    "without spaces": lambda a: re.sub(r"(?<![a-zA-Z\\]) +| +(?![a-zA-Z])", "", a),
    r"\dfrac": lambda a: a.replace(r"\frac", r"\dfrac"),
    r"\left( \right)": lambda a: a if r"\left" in a else a.replace("(", r"\left(").replace(")", r"\right)"),
    "in dollars": lambda a: f"${a}$",
    "with a full stop": lambda a: f"{a}.",
    "thousands": lambda a: f"{int(a):,}" if re.fullmatch(r"\d{4,12}", a) else a,
    r"\frac{a}{b} as a/b": lambda a: re.sub(r"^(-?)\\d?frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", a),
}
HARMFUL = {
    "its last number + 1": lambda a: re.sub(r"\d+(?=\D*$)", lambda m: str(int(m[0]) + 1), a),
    "one more element": lambda a: f"{a}, 1234567",
    "or another": lambda a: rf"{a} \text{{ or }} 1234567",
    "its square": lambda a: f"({a})^2",
    "its half": lambda a: rf"\frac{{1}}{{2}} \cdot ({a})",
}


def rollout(seed, responses=1024, length=4000):
    pairs = []
    for i in range(responses):
        answer, box = (form.format(n=2 + i + seed * responses) for form in FORMS[i % len(FORMS)])
        pairs.append(
            (f"so {i} and then \\frac{{1}}{{2}} "[:24].ljust(24) * (length // 24) + rf"\boxed{{{box}}}", answer)
        )
    return pairs


def time_rollouts():
    pool = GradePool()
    pool.grade(rollout(9))  # the workers are there
    seconds = []
    for seed in range(3):
        pairs, before = rollout(seed), time.perf_counter()
        grades = pool.grade(pairs)
        seconds.append(time.perf_counter() - before)
        right, errors = sum(g.correct for g in grades), sum(bool(g.error) for g in grades)
        print(f"{seconds[-1]:.2f} s, {right} of {len(pairs)} right, {errors} errors")
    print(f"median {statistics.median(seconds):.2f} s with {pool.count} workers")
    pool.close()


def math_verify_alone(text, answer):
    """As its README has it, the answer in a box"""
    from math_verify import parse, verify

    return verify(parse(rf"\boxed{{{answer}}}"), parse(text))


def compare_graders(file):
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    rows = [row for row in rows if r"\boxed" in row["completion"]]
    found = collections.defaultdict(lambda: [0] * 5)  # cases; false positives and negatives of ours, of math-verify
    worst = 0
    for row in rows:
        before = time.perf_counter()
        grade, expected = math_reward(row["completion"], row["gold"]), bool(row["expected"])
        worst = max(worst, time.perf_counter() - before)
        theirs = math_verify_alone(row["completion"], row["gold"])
        for group in (row.get("group", ""), "all"):
            for i, wrong in enumerate([True, grade > expected, grade < expected, theirs > expected, theirs < expected]):
                found[group][i] += wrong
    print(f"{'cases':>6s}{'ours':>9s}{'FP':>6s}{'FN':>7s}{'math-verify':>13s}{'FP':>6s}{'FN':>7s}")
    for group, (n, a, b, c, d) in sorted(found.items(), key=lambda item: item[1][0]):
        print(f"{n:6d}{1 - (a + b) / n:9.1%}{a:6d}{b:7d}{1 - (c + d) / n:13.1%}{c:6d}{d:7d}  {group}")
    print(f"the longest took {worst:.2f} s")


def rewrite(files):
    rows = [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
    answers, pool = dict.fromkeys(row["answer"] for row in rows), GradePool()
    for title, ways in (("harmless: all should be right", HARMLESS), ("harmful: none should be", HARMFUL)):
        print(f"{len(answers)} answers, {title}")
        for name, way in ways.items():
            pairs = [(rf"\boxed{{{way(a)}}}", a) for a in answers if way(a) != a or name == "as it stands"]
            right = [pair for pair, g in zip(pairs, pool.grade(pairs)) if g.correct]
            some = "; ".join(f"{text[7:-1]} for {a}" for text, a in right[:3]) if ways is HARMFUL else ""
            print(f"  {name:22s}{len(right):6d} of {len(pairs):6d} right   {some}")
    pool.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", metavar="FILE", help="a .jsonl file of labelled cases")
    parser.add_argument("--golds", metavar="FILE", nargs="+", help=".jsonl files with answers")
    args = parser.parse_args()
    if args.cases:
        compare_graders(args.cases)
    elif args.golds:
        rewrite(args.golds)
    else:
        time_rollouts()
