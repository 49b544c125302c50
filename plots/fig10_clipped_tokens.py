"""Figure 10: which words does the clip cut?

Question: which tokens are cut most often by an upper clip of 0.20 and of 0.28, aligned model, and where in a response do they stand?
Paper: under 0.20 connectives at the start of sentences (therefore, if, but); under 0.28 far fewer, and function words (is, the) (takeaway 5).
(The clip figures take 16 updates a rollout at twice the learning rate; see figure 8. Counts are over all steps and seeds.)

Here: not run yet.

Runs, each once a seed (--seed 1 and so on); --run starts them, --scale node shows the paper's:

    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data medium --clip_high 0.2 --minibatches 16 --lr 2e-4 --steps 40 --eval_every 10
    accelerate launch lite_ppo.py --norm group_mean_group_std --loss_agg seq_mean --model data/tiny/aligned --data medium --clip_high 0.28 --minibatches 16 --lr 2e-4 --steps 40 --eval_every 10
"""

import json
import sys
from collections import Counter

import runs

SIZES = ("4B", "8B")
CONNECTIVES = "after and but if next now so then therefore thus wait".split()
FUNCTION = "is it of that the this we , . :".split()
CLAIMS = [
    runs.Claim("under 0.28 fewer cuts (per 1,000 tokens)", "clip_high", "0.2", "0.28", {}, "cuts", 1, takeaway=5),
    runs.Claim(
        "connectives are a larger share of them under 0.20",
        "clip_high",
        "0.2",
        "0.28",
        {},
        "connectives",
        1,
        takeaway=5,
    ),
]
TOP = 20
COLOURS = {"low": "#56B4E9", "high": "#D55E00", "": "white"}  # of a token by the bound that cut it


def collect(found):
    """-> rows of three kinds: of a run the cuts and the share of connectives in those of the upper bound; of a bound and a
    token how often it was cut; of the response with most cuts a token, with its ratio. found: [(command, seed, folder)]
    """
    metrics = runs.table_of(found, ["train/clip_high"])
    rows = []
    for command, seed, run in found:
        shares = [r["train/clip_high"] for r in metrics if (r["command"], r["seed"]) == (command, seed)]
        shares = [s for s in shares if s is not None]
        if not shares:
            continue
        counts = {"low": Counter(), "high": Counter()}
        for step in map(json.loads, (run / "clipped.jsonl").read_text().splitlines()):
            for bound, count in counts.items():
                count.update({token.strip(): n for token, _, n in step[bound]})
        row = dict.fromkeys(("command", "seed", "step", "cuts", "connectives", "kind", "token", "count", "ratio"))
        row |= {"command": command, "seed": seed, "step": 0}
        cut = counts["high"].total()
        share = sum(counts["high"][word] for word in CONNECTIVES) / cut if cut else None
        rows.append(row | {"cuts": 1000 * sum(shares) / len(shares), "connectives": share, "kind": "run"})
        rows += [row | {"kind": b, "token": t, "count": n} for b, count in counts.items() for t, n in count.items()]
        if seed == 1:
            responses = [json.loads(line) for line in (run / "tokens.jsonl").read_text().splitlines()]
            best = max(responses, key=lambda r: len(r["low"]) + len(r["high"]))
            cuts = {i: bound for bound in ("low", "high") for i in best[bound]}
            shown = enumerate(zip(best["tokens"], best["ratio"]))
            rows += [row | {"kind": "shown " + cuts.get(i, ""), "token": t, "ratio": x} for i, (t, x) in shown]
    return rows


def draw(rows):
    table = runs.Table([r for r in rows if r["kind"] == "run"])
    named = [c for c in table.commands if runs.flags(c)["size"] == runs.flags(table.commands[0])["size"]]
    figure, axes = runs.grid(2, len(named), height=3)
    for column, command in zip(axes.T, named):
        mine = [r for r in rows if r["command"] == command]
        top(column[0], mine)
        show(column[1], [r for r in mine if r["kind"].startswith("shown")])
        column[0].set_title(runs.STYLES[runs.flags(command)["clip_high"]][0], fontsize=9)
    runs.entitle(figure, table, "Which tokens the bounds cut, aligned model", CLAIMS)
    return figure


def top(ax, rows):
    """The tokens that the upper bound cut most often, with what the lower one cut of them behind"""
    counts = Counter()
    for r in rows:
        if r["kind"] == "high":
            counts[str(r["token"])] += r["count"]
    names, values = zip(*counts.most_common(TOP)) if counts else ((), ())
    colours = ["#D55E00" if n in CONNECTIVES else "#56B4E9" if n in FUNCTION else "#999999" for n in names]
    ax.bar(range(len(names)), values, color=colours)
    ax.set_xticks(range(len(names)), names, rotation=90)
    ax.set_ylabel("cut by the upper bound", fontsize=9)


def show(ax, rows):
    """A response, token by token; what a bound cut is coloured, with its ratio below"""
    ax.axis("off")
    x = y = 0.0
    for r in rows:
        text = str(r["token"])
        width = 0.017 * (len(text.strip()) + 1)
        if x + width > 1:
            x, y = 0.0, y - 0.22
        bound = r["kind"].removeprefix("shown ")
        ax.text(
            x,
            0.95 + y,
            text.strip(),
            fontsize=8,
            va="top",
            bbox={"fc": COLOURS[bound], "ec": "none", "pad": 1, "alpha": 0.7},
        )
        if bound:
            ax.text(x, 0.84 + y, f"{r['ratio']:.2f}", fontsize=6, va="top")
        x += width


if __name__ == "__main__":
    runs.main(sys.modules[__name__])
