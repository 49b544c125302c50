"""One page of one run, to read and to send: curves, evaluations, where the time went, responses token by token, settings.

    python plots/report.py runs/lite_ppo__s1            writes runs/lite_ppo__s1/report.html

The page is a single file without a reference to any other: it opens without a network. Tokens are coloured by the importance ratio
of the last mini-batch, by entropy or by advantage, and what was clipped is underlined.
"""

import argparse
import base64
import html
import io
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from panels import grid
from table import SCORE, read_metrics, read_rows
from trouble import WINDOW, troubles

PANELS = {  # title: metrics of one panel
    "reward of the batch": ["reward/mean", "reward/std"],
    "training accuracy": ["rollout/accuracy"],
    "entropy (nats)": ["rollout/entropy", "train/entropy"],
    "response length (tokens)": ["rollout/response_len"],
    "truncated, and loops of them": ["rollout/truncated", "rollout/repeat_ratio"],
    "clipped tokens (share)": ["train/clip_low", "train/clip_high"],
    "norm of the gradient": ["train/grad_norm"],
    "trainer against engine (nats)": ["rollout/logp_gap"],
}
PHASES = "wake", "sync", "generate", "idle", "reward", "old_logp", "update", "save", "eval"
RESPONSES = 24  # of the token-by-token ones, the first and the last of the run
LONGEST = 2000  # tokens of one of them
SAMPLED = "samples", "eval_samples"  # files: some of each evaluation, all of the last
SAMPLES = 1500  # responses of evaluations to page through, and characters of one

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { max-width: 100% } h1 { font-size: 1.3rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; font-size: 14px } td, th { padding: .1rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child, .text td, .text th { text-align: left; vertical-align: top }
.response { font-family: ui-monospace, monospace; font-size: 13px; white-space: pre-wrap; border: 1px solid #ddd; padding: .5rem; margin: .3rem 0 1rem }
.clipped { text-decoration: underline 2px; font-weight: bold } pre { white-space: pre-wrap; font-size: 13px }
"""
SCRIPT = """
const scales = {
  ratio: t => [t.ratio > 1 ? '213,94,0' : '0,114,178', Math.min(1, Math.abs(Math.log(Math.max(t.ratio, 1e-3))) / 0.5)],
  entropy: t => ['0,158,115', Math.min(1, t.entropy / 1.5)],
  advantage: (t, adv) => [adv > 0 ? '213,94,0' : '0,114,178', Math.min(0.8, Math.abs(adv) / 2)],
};
function paint(by) {
  document.querySelectorAll('.response').forEach((box, i) => box.querySelectorAll('span').forEach((span, j) => {
    const r = DATA[i], [colour, weight] = scales[by]({ratio: r.ratio[j], entropy: r.entropy[j]}, r.adv);
    span.style.background = `rgba(${colour},${weight.toFixed(2)})`;
  }));
}
DATA.forEach((r, i) => {
  const box = document.getElementById('r' + i), clipped = new Map();
  r.low.forEach(j => clipped.set(j, 'lower')); r.high.forEach(j => clipped.set(j, 'upper'));
  r.tokens.forEach((text, j) => {
    const span = document.createElement('span');
    span.textContent = text;
    span.title = `ratio ${r.ratio[j]}, entropy ${r.entropy[j]}, advantage ${r.adv.toFixed(3)}` + (clipped.has(j) ? `, clipped by the ${clipped.get(j)} bound` : '');
    if (clipped.has(j)) span.className = 'clipped';
    box.append(span);
  });
});
document.querySelectorAll('input[name=by]').forEach(input => input.onchange = () => paint(input.value));
paint('ratio');
const chosen = name => document.querySelector(`select[name=${name}]`).value;
let at = 0;
function page(move) {
  const some = SAMPLES.filter(s => ['set', 'step', 'grade'].every(name => ['', String(s[name])].includes(chosen(name))));
  at = move ? Math.min(Math.max(at + move, 0), Math.max(some.length - 1, 0)) : 0;
  const s = some[at] || {problem: '', response: '', answer: ''};
  document.getElementById('place').textContent = some.length ? `${at + 1} of ${some.length}: ${s.set}, step ${s.step}, ${s.grade}` : 'none';
  for (const name of ['problem', 'response', 'answer']) document.getElementById(name).textContent = s[name];
}
document.querySelectorAll('select').forEach(select => select.onchange = () => page(0));
page(0);
"""


def picture(figure):
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    plt.close(figure)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def curves(rows):
    figure, axes = grid(2, 4, width=12)
    for ax, (title, metrics) in zip(axes.flat, PANELS.items()):
        for metric, look in zip(metrics, ({"color": "black"}, {"color": "#D55E00", "linestyle": "--"})):
            points = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
            if points:
                ax.plot(*zip(*points), lw=1, label=metric, **look)
        ax.set_title(title, fontsize=9)
        if len(metrics) > 1:
            ax.legend(fontsize=7, frameon=False)
    for ax in axes[-1]:
        ax.set_xlabel("training steps", fontsize=9)
    return picture(figure)


def evaluations(rows):
    """-> a picture of the accuracy of each set, and a table of the first and the last evaluation"""
    rows = [row for row in rows if SCORE in row]
    if not rows:
        return "<p>none</p>"
    sets = [k.split("/")[1] for k in rows[-1] if k.startswith("eval/") and k.endswith("/accuracy")]
    figure, axes = grid(1, 1, width=8, height=2.2)
    for k, name in enumerate(sets):
        look = {"color": plt.cm.viridis(k / len(sets)), "marker": "osv^Dx*"[k % 7], "markersize": 4}
        look = {"color": "black", "lw": 2.5} if name == "mean" else look
        axes[0, 0].plot([r["step"] for r in rows], [r.get(f"eval/{name}/accuracy") for r in rows], label=name, **look)
    axes[0, 0].set_ylabel("accuracy")
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    body = [[name, *(score(row, name) for row in (rows[0], rows[-1]))] for name in sets]
    return picture(figure) + table(["set", f"after {rows[0]['step']}", f"after {rows[-1]['step']} steps"], body)


def score(row, name):
    value, error = row.get(f"eval/{name}/accuracy"), row.get(f"eval/{name}/accuracy_se")
    return "-" if value is None else f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def time_split(rows):
    total = {p: sum(row.get(f"time/{p}", 0) for row in rows) for p in PHASES}
    whole = sum(total.values()) or 1
    body = [[p, f"{seconds:.1f}", f"{100 * seconds / whole:.1f}"] for p, seconds in total.items()]
    return table(["phase", "seconds", "%"], [*body, ["in all", f"{whole:.1f}", "100.0"]])


def table(head, body):
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in body)}</table>"


def responses(rows):
    """-> the boxes that the page's script fills with tokens, and its data"""
    half = RESPONSES // 2
    rows = rows if len(rows) <= RESPONSES else rows[:half] + rows[-half:]
    boxes = []
    for i, row in enumerate(rows):
        left = len(row["tokens"]) - LONGEST
        note = f" (the first {LONGEST} tokens; {left} more)" if left > 0 else ""
        head = f"step {row['step']}, advantage {row['adv']:+.3f}, answer {row['answer']}{note}"
        boxes.append(
            f'<div><b>{html.escape(head)}</b><br>{html.escape(str(row["problem"]))}</div><div class="response" id="r{i}"></div>'
        )
        for name in ("tokens", "ratio", "entropy"):
            row[name] = row[name][:LONGEST]
        for name in ("low", "high"):
            row[name] = [j for j in row[name] if j < LONGEST]
    data = [{k: row[k] for k in ("tokens", "ratio", "entropy", "adv", "low", "high")} for row in rows]
    return "".join(boxes) or "<p>none were logged</p>", script_data(data)


def samples(run):
    """-> what chooses among the responses of all evaluations, of the last one all, and the data that the page's script shows"""
    found = {(r["step"], r["set"], r["id"], r["sample"]): r for f in SAMPLED for r in read_rows(run / f"{f}.jsonl")}
    rows = [
        {"grade": "right" if r["correct"] else "wrong"}
        | {name: r[name] for name in ("step", "set")}
        | {name: str(r[name])[:SAMPLES] for name in ("problem", "response", "answer")}
        for _, r in sorted(found.items(), key=lambda x: x[0][0])[-SAMPLES:]
    ]
    choices = {name: dict.fromkeys(row[name] for row in rows) for name in ("set", "step", "grade")}
    selects = "".join(
        f'<select name="{name}"><option value="">all {name}s</option>'
        + "".join(f"<option>{html.escape(str(value))}</option>" for value in values)
        + "</select> "
        for name, values in choices.items()
    )
    buttons = (
        '<button onclick="page(-1)">before</button> <button onclick="page(1)">next</button> <span id="place"></span>'
    )
    parts = "".join(
        f'<p><b>{name}</b></p><div class="response" id="{name}"></div>' for name in ("problem", "response", "answer")
    )
    return f"<p>{selects}{buttons}</p>{parts}", script_data(rows)


def script_data(rows):
    return json.dumps(rows).replace("</", "<\\/")


def went_wrong(rows):
    """-> what went wrong, with step and metric"""
    found = troubles(rows)
    body = [[step, metric, "-" if value is None else f"{value:.3g}", text] for step, metric, value, text in found]
    return (
        table(["step", "metric", f"mean of {WINDOW} steps", "what it says"], body)
        if found
        else "<p>nothing that the rules of plots/trouble.py know</p>"
    )


def page(run):
    """-> the HTML of a run folder"""
    rows = read_metrics(run)
    if not rows:
        raise SystemExit(f"{run}: nothing to show")
    boxes, data = responses(read_rows(run / "tokens.jsonl"))
    chooser, shown = samples(run)
    settings = {
        name: json.loads((run / f"{name}.json").read_text())
        for name in ("args", "versions")
        if (run / f"{name}.json").is_file()
    }
    by = "".join(
        f'<label><input type="radio" name="by" value="{name}"{" checked" * (name == "ratio")}> {text}</label> '
        for name, text in (
            ("ratio", "ratio: blue fell, orange rose"),
            ("entropy", "entropy"),
            ("advantage", "advantage: blue bad, orange good"),
        )
    )
    return f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(run.name)}</title><style>{STYLE}</style>
<h1>{html.escape(run.name)}</h1>
<h2>What went wrong</h2>{went_wrong(rows)}
<h2>Curves</h2>{curves(rows)}
<h2>Evaluations</h2>{evaluations(rows)}
<h2>Time</h2>{time_split(rows)}
<h2>Responses, token by token</h2>
<p>Of the last mini-batch of a step the first response and the one with most clipped tokens. A clipped token is underlined; hover for numbers. Colour by {by}</p>
{boxes}
<h2>Responses of the evaluations</h2>{chooser}
<h2>Settings</h2><pre>{html.escape(json.dumps(settings, indent=1))}</pre>
<script>const DATA = {data}, SAMPLES = {shown};{SCRIPT}</script></html>
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, help="the page [RUN/report.html]")
    args = parser.parse_args()
    out = args.out or args.run / "report.html"
    out.write_text(page(args.run))
    print(out)
