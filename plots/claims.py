"""What the paper claims, as differences between runs, and what the runs say of it."""

import math
from dataclasses import dataclass, field

import numpy as np

from launch import flags_of, panel
from table import SCORE, interval

ENOUGH = 5  # seeds for a verdict
SMALL = 0.02  # of an accuracy: less is no gain
FAMILY = 27  # claims with a takeaway: a verdict's intervals hold for all of them at once, Bonferroni


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
    measure: str = "area"  # of the metric's curve, table.MEASURES
    takeaway: int = 0  # the paper's number; 9: its claim for Lite PPO
    expect: str = "more"  # or "no more", or "the same": what the paper says
    small: float = SMALL  # a difference below it is none: of the paper's own effect a third, where that is known
    between: tuple = ()  # other values of the flag: the difference is that of a straight line through all

    def sides(self, table):
        """-> [[a command for each value of the flag], ...], all else being equal in each"""

        def rest(command):
            if self.flag == "script":  # on a node, their other flags put them on one bench
                return panel(command)
            same = {"kind": "model", "limit": "max_response_len"}.get(self.flag)  # what they follow from
            return {k: v for k, v in flags_of(command).items() if k not in (self.flag, same, f"eval_{same}")}

        chosen = [c for c in table.commands if all(flags_of(c)[k] == v for k, v in self.where.items())]
        values = self.better, *self.between, self.worse
        first, *others = [[c for c in chosen if flags_of(c)[self.flag] == value] for value in values]
        found = [[a, *(b for side in others for b in side if rest(a) == rest(b))] for a in first]
        return [commands for commands in found if len(commands) == len(values)]

    def weights(self):
        """-> of each value of the flag its share in the difference"""
        if not self.between:
            return np.array([1.0, -1.0])
        x = np.array([float(value) for value in (self.better, *self.between, self.worse)])
        x = x - x.mean()
        return x / (x**2).sum() * (x[0] - x[-1])

    def differences(self, table):
        """-> one number a seed: the mean over the panels that this seed has all of"""
        ends = [[table.value(c, self.metric, self.measure) for c in commands] for commands in self.sides(table)]
        seeds = set.intersection(*(set.intersection(*map(set, one)) for one in ends)) if ends else ()
        w = self.weights()
        return [float(np.mean([w @ [end[seed] for end in one] for one in ends])) for seed in sorted(seeds)]

    def effect(self, table, level=0.95):
        values = self.differences(table)
        return (float(np.mean(values)) if values else math.nan, *interval(values, level), len(values))

    def verdict(self, table):
        """By the interval that holds for all claims at once. more: seen above 0, opposite below. no more: seen below `small`,
        opposite above 0. the same: seen within `small` of 0, opposite where it does not hold 0. What is claimed to be more is
        excluded where the 95 % interval ends below `small`. Open with few seeds.
        """
        _, low, high, n = self.effect(table, 1 - 0.05 / FAMILY)
        if n < ENOUGH:
            return "open"
        if self.expect == "more":
            excluded = self.effect(table)[2] < self.small
            return "seen" if low > 0 else "opposite" if high < 0 else "excluded" if excluded else "not seen"
        if self.expect == "no more":
            return "seen" if high < self.small else "opposite" if low > 0 else "not seen"
        return "seen" if max(-low, high) < self.small else "opposite" if low > 0 or high < 0 else "not seen"

    def sentence(self, table):
        mean, low, high, n = self.effect(table)
        if n < ENOUGH:
            return f"{self.text}: open, " + (f"{mean:+.3f} in {n} seed{'s' * (n > 1)}" if n else "no runs")
        verdict = self.verdict(table)
        bound = max(-low, high) if self.expect == "the same" else high
        verdict += f" (less than {bound:.3f})" if verdict in ("excluded", "not seen") else ""
        return f"{self.text}: {verdict}, {mean:+.3f} [{low:+.3f}, {high:+.3f}]" + f" of {n} seeds" * (n > ENOUGH)
