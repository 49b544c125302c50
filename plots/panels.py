"""What the figures' panels share: the look of a choice, curves with bands, final scores, titles."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from claims import ENOUGH
from launch import flags_of, panel
from table import SCORE, interval, iqm

STYLES = {  # value of a flag: label, colour, dashes, marker. Black is the study's baseline, or what takes its place
    "none": ("no normalization", "#E69F00", (0, (1, 1)), "^"),
    "batch_mean": ("batch mean, no std", "#882255", (0, (1, 1)), "D"),
    "batch_mean_batch_std": ("batch mean, batch std", "#56B4E9", (0, (4, 1.5)), "s"),
    "group_mean_group_std": ("group mean, group std", "black", "-", "o"),
    "group_mean_batch_std": ("group mean, batch std", "#D55E00", (0, (6, 1, 1, 1)), "v"),
    "seq_mean": ("sequence mean", "black", "-", "o"),
    "token_mean": ("token mean", "#0072B2", (0, (4, 1.5)), "s"),
    "keep": ("all responses", "black", "-", "o"),
    "filter": ("overlong filter", "#009E73", (0, (4, 1.5)), "s"),
    "0.2": ("upper clip 0.20", "black", "-", "o"),
    "0.24": ("upper clip 0.24", "#56B4E9", (0, (1, 1)), "^"),
    "0.28": ("upper clip 0.28", "#D55E00", (0, (4, 1.5)), "s"),
    "0.32": ("upper clip 0.32", "#E69F00", (0, (6, 1, 1, 1)), "v"),
    "low 0.1": ("lower clip 0.10", "#009E73", (0, (4, 1.5)), "^"),
    "low 0.3": ("lower clip 0.30", "#882255", (0, (6, 1, 1, 1)), "v"),
    "0": ("reward 1 / 0", "black", "-", "o"),
    "-1": ("reward 1 / -1", "#D55E00", (0, (4, 1.5)), "s"),
    "grpo": ("GRPO", "black", "-", "o"),
    "dapo": ("DAPO", "#56B4E9", (0, (4, 1.5)), "s"),
    "lite_ppo": ("Lite PPO", "#D55E00", (0, (6, 1, 1, 1)), "v"),
    "easy": ("easy", "#56B4E9", (0, (1, 1)), "^"),
    "medium": ("medium", "#D55E00", (0, (4, 1.5)), "s"),
    "hard": ("hard", "black", "-", "o"),
}
NAMES = {  # metric: the label of its axis
    "rollout/accuracy": "training accuracy",
    SCORE: "accuracy, mean of six sets",
    "rollout/response_len": "response length (tokens)",
    "rollout/entropy": "entropy (nats a token)",
    "reward/std": "std of the rewards of a batch",
    "rollout/truncated": "truncated responses (share)",
    "train/clip_high": "clipped by the upper bound (share)",
}


def style(value):
    return dict(zip(("label", "color", "linestyle", "marker"), STYLES[value]))


def line(ax, table, command, value, metric, smoothed=True):
    """Mean over seeds, and their standard deviation as a band"""
    steps, values = table.curves(command, metric, smoothed)
    if len(steps):
        mean, look = values.mean(0), style(value)
        ax.plot(steps, mean, lw=1.6, markersize=4, markevery=max(1, len(steps) // 4), **look)
        if len(values) > 1:
            sd = values.std(0, ddof=1)
            ax.fill_between(steps, mean - sd, mean + sd, color=look["color"], alpha=0.15, lw=0)


def finals(ax, table, series, names):
    """Final scores on each evaluation set: mean over seeds, with its 95 % interval where there are enough; the interquartile mean of all.

    series: [(command, value)]
    """
    for k, (command, value) in enumerate(series):
        _, colour, _, marker = STYLES[value]
        at = (k - (len(series) - 1) / 2) * 0.8 / len(series)
        every = []
        for x, name in enumerate(names):
            if scores := list(table.value(command, f"eval/{name}/accuracy").values()):
                ax.plot(x + at, np.mean(scores), marker, color=colour, markersize=4)
                if len(scores) >= ENOUGH:
                    ax.plot([x + at] * 2, interval(scores), color=colour, lw=1.2)
                every += scores
        if every:
            ax.plot(len(names) + at, iqm(every), marker, color=colour, markersize=4, markerfacecolor="white")
    look = {"rotation": 40, "ha": "right", "rotation_mode": "anchor", "fontsize": 8}
    ax.set_xticks(range(len(names) + 1), [*names, "IQM"], **look)


def grid(rows, columns, width=9.5, height=2.3):
    figure, axes = plt.subplots(rows, columns, figsize=(width, height * rows + 1), squeeze=False, layout="constrained")
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, axes


def entitle(figure, table, subject, claims, legend=True):
    """The title says what was found, the legend stands below."""
    lines = [subject, *(claim.sentence(table) for claim in claims)]
    figure.suptitle("\n".join(lines), fontsize=10, x=0.01, ha="left")
    found = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels())}
    if legend:
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncol=4, fontsize=9, frameon=False)


def evals(table):
    """The evaluation sets that are in a table, in its order"""
    metrics = dict.fromkeys(m for seeds in table.series.values() for one in seeds.values() for m in one)
    return [m.split("/")[1] for m in metrics if m.startswith("eval/") and m != SCORE]


def comparison(table, flag, metrics=("rollout/accuracy",), key=panel):
    """A row a panel: curves of the metrics, of the evaluations, and final scores; a line for each value of `flag`, or what it says"""
    panels, value_of = {}, flag if callable(flag) else lambda command: flags_of(command)[flag]
    for command in table.commands:
        panels.setdefault(key(command), []).append((command, value_of(command)))
    figure, axes = grid(len(panels), len(metrics) + 2)
    for row, (name, series) in zip(axes, panels.items()):
        for command, value in series:
            for ax, metric in zip(row, metrics):
                line(ax, table, command, value, metric)
            line(row[-2], table, command, value, SCORE, smoothed=False)
        finals(row[-1], table, series, evals(table))
        row[0].set_ylabel(name, fontsize=9)
    for ax, metric in zip(axes[0], [*metrics, SCORE]):
        ax.set_title(NAMES[metric], fontsize=9)
    enough = any(len(seeds) >= ENOUGH for seeds in table.series.values())
    axes[0, -1].set_title("final accuracy" + ", 95 % interval" * enough, fontsize=9)
    for ax in axes[-1, :-1]:
        ax.set_xlabel("training steps", fontsize=9)
    axes[-1, 0].set_xlabel("training steps\n(bands: ± s.d. over seeds)", fontsize=9)
    return figure
