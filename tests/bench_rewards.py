"""How long it takes to grade a rollout: `python tests/bench_rewards.py` (1,024 responses of 4,000 characters, three times).

A quarter of the answers are plain numbers, the others go to math-verify: fractions, roots, polynomials, intervals, each
response another one, so that nothing is remembered from one round to the next.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from rewards import GradePool

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


def rollout(seed, responses=1024, length=4000):
    pairs = []
    for i in range(responses):
        answer, box = (form.format(n=2 + i + seed * responses) for form in FORMS[i % len(FORMS)])
        pairs.append(
            (f"so {i} and then \\frac{{1}}{{2}} "[:24].ljust(24) * (length // 24) + rf"\boxed{{{box}}}", answer)
        )
    return pairs


if __name__ == "__main__":
    pool = GradePool()
    pool.grade([(r"\boxed{1+x}", "x+1")])  # the workers are there
    seconds = []
    for seed in range(3):
        pairs, before = rollout(seed), time.perf_counter()
        grades = pool.grade(pairs)
        seconds.append(time.perf_counter() - before)
        right, errors = sum(g.correct for g in grades), sum(bool(g.error) for g in grades)
        print(f"{seconds[-1]:.2f} s, {right} of {len(pairs)} right, {errors} errors")
    print(f"median {statistics.median(seconds):.2f} s with {pool.count} workers")
    pool.close()
