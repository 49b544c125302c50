"""What the paper claims, as differences between runs, and what the runs say of it."""

import math
from dataclasses import dataclass, field

import numpy as np

from launch import flags_of, panel
from table import LAST, SCORE, interval

ENOUGH = 5  # seeds for a verdict
SMALL = 0.02  # of an accuracy: less is no gain


@dataclass
class Claim:
    """A sentence of the paper as a difference: `better` minus `worse`, two values of a flag, all else being equal.

    where: which of the commands count, {flag: value}; of several panels the mean is taken in each seed.
    """

    text: str
    flag: str
    better: str
    worse: str
    where: dict = field(default_factory=dict)
    metric: str = SCORE
    count: int = LAST  # the mean of this many last values counts
    change: bool = False  # less the first ones
    takeaway: int = 0  # the paper's number; 9: its claim for Lite PPO
    expect: str = "more"  # or "no more", or "the same": what the paper says
    small: float = SMALL  # a difference below it is none

    def pairs(self, table):
        def rest(command):
            if self.flag == "script":  # on a node, their other flags put them on one bench
                return panel(command)
            same = {"kind": "model", "limit": "max_response_len"}.get(self.flag)  # what they follow from
            return {k: v for k, v in flags_of(command).items() if k not in (self.flag, same, f"eval_{same}")}

        chosen = [c for c in table.commands if all(flags_of(c)[k] == v for k, v in self.where.items())]
        sides = [[c for c in chosen if flags_of(c)[self.flag] == value] for value in (self.better, self.worse)]
        return [(a, b) for a in sides[0] for b in sides[1] if rest(a) == rest(b)]

    def differences(self, table):
        """-> one number a seed: the mean over the pairs that this seed has all of"""
        ends = [[table.last(c, self.metric, self.count, self.change) for c in pair] for pair in self.pairs(table)]
        seeds = set.intersection(*(a.keys() & b.keys() for a, b in ends)) if ends else ()
        return [float(np.mean([a[seed] - b[seed] for a, b in ends])) for seed in sorted(seeds)]

    def effect(self, table):
        values = self.differences(table)
        return (float(np.mean(values)) if values else math.nan, *interval(values), len(values))

    def verdict(self, table):
        """By the interval. more: seen above 0, opposite below. no more: seen below `small`, opposite above 0. the same: seen within
        `small` of 0, opposite where it does not hold 0. Open with few seeds.
        """
        _, low, high, n = self.effect(table)
        if n < ENOUGH:
            return "open"
        if self.expect == "more":
            return "seen" if low > 0 else "opposite" if high < 0 else "not seen"
        if self.expect == "no more":
            return "seen" if high < self.small else "opposite" if low > 0 else "not seen"
        return "seen" if max(-low, high) < self.small else "opposite" if low > 0 or high < 0 else "not seen"

    def sentence(self, table):
        mean, low, high, n = self.effect(table)
        if n < ENOUGH:
            return f"{self.text}: open, " + (f"{mean:+.3f} in {n} seed{'s' * (n > 1)}" if n else "no runs")
        return f"{self.text}: {self.verdict(table)}, {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
