"""What went wrong in a run, as far as its metrics tell: the first step at which one of these rules holds."""

import numpy as np

WINDOW = 5  # steps that are averaged; the first ones are what a run began with
RULES = [  # metric, does it hold for the mean of the last steps, given that of the first and the highest so far; what it means
    (
        "rollout/truncated",
        lambda x, first, top: x > 0.1 and x > 2 * first,
        "truncated responses have more than doubled",
    ),
    ("rollout/entropy", lambda x, first, top: x < first / 10, "the entropy is below a tenth of what it was"),
    ("rollout/accuracy", lambda x, first, top: x < top - 0.2, "training accuracy is 0.2 below its best"),
    ("reward/std", lambda x, first, top: x < 0.02, "nearly all rewards are equal, so that nothing is learned"),
    ("adv/zero", lambda x, first, top: x > 0.9, "nine of ten responses have no advantage"),
    ("reward/no_answer", lambda x, first, top: x > first + 0.2, "more and more responses have no box"),
    ("reward/grader_errors", lambda x, first, top: x > 0.05, "one of twenty answers or more cannot be graded"),
    ("rollout/logp_gap", lambda x, first, top: x > max(10 * first, 1e-4), "trainer and engine drift apart"),
    ("train/kl", lambda x, first, top: x > 1, "the policy is more than a nat a token away from the reference"),
    ("train/clip_high", lambda x, first, top: x > 0.1, "the upper bound clips one of ten tokens"),
    ("train/clip_low", lambda x, first, top: x > 0.1, "the lower bound clips one of ten tokens"),
]


def troubles(rows):
    """rows: of metrics.jsonl -> [(step, metric, value, what it means)], one for each rule that ever held, by step"""
    found = []
    for metric, holds, text in RULES:
        steps = [r["step"] for r in rows if r.get(metric) is not None]
        values = [r[metric] for r in rows if r.get(metric) is not None]
        means = [float(np.mean(values[max(0, i - WINDOW + 1) : i + 1])) for i in range(len(values))]
        top = -np.inf
        for step, mean in list(zip(steps, means))[WINDOW - 1 :]:
            top = max(top, mean)
            if holds(mean, means[WINDOW - 1], top):
                found.append((step, metric, mean, text))
                break
    nulls = {k: r["step"] for r in reversed(rows) for k, value in r.items() if value is None and k.startswith("train/")}
    found += [(step, metric, None, "it is no number") for metric, step in nulls.items()]
    return sorted(found, key=lambda x: x[0])
