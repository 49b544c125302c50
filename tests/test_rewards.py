import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rewards
from rewards import REPEAT_SPAN, REPEATS, GradePool, extract_answer, grade, math_reward, repeats


@pytest.mark.parametrize(
    "text, box",
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{4}, no, \boxed{5}.", "5"),  # the last one rules
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{ 7 }", "7"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),  # escaped braces do not count
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{4} and \boxed{5", "4"),  # the last that is closed
        (r"\boxed{1 \boxed{2}", "2"),
        (r"} \boxed{3}", "3"),
        (r"<think>\boxed{4}</think> so \boxed{5}", "5"),
        (r"so \boxed{5} <think>\boxed{4}</think>", None),  # after a </think> only what follows it
        (r"\boxed{1} or \boxed{2}, \boxed{3}", "1, 2, 3"),  # several candidates are a list
        (r"\boxed{2}, \boxed{2}", "2"),
        (r"\boxed{1}, so it is not \boxed{2}", "2"),
        ("the answer is 5", None),
        (r"\boxed{5", None),
        (r"\boxed{}", ""),
        ("", None),
    ],
)
def test_extract_answer(text, box):
    assert extract_answer(text) == box


@pytest.mark.parametrize(
    "box, answer",
    [
        ("5", "5"),
        ("05", "5"),
        ("5.0", "5"),
        ("-3", "-3"),
        ("1,000", "1000"),
        ("$12$", "12"),
        ("106.", "106"),
        (r"\frac{1}{2}", "0.5"),
        (r"0.5", r"\frac{1}{2}"),
        (r"2\sqrt{3}", r"\sqrt{12}"),
        (r"x+1", "1+x"),
        (r"\dfrac{3}{4}", r"\frac34"),
        (r"10\%", "10"),  # needs antlr 4.13
        ("28 percent", r"28\%"),
        ("15 400", "15400"),
        (r"15\,400", "15400"),
        ("870000000", "8.7e8"),
        (r"8.7 \times 10^{8}", "8.7e8"),
        (r"8.7\cdot10^8 \text{ kg}", "8.7e8"),
        (r"5.9049 \times 10^{4}", "59049"),
        ("−3", "-3"),
        ("√3", r"\sqrt{3}"),
        (r"60\degree", r"60^\circ"),
        (r"\varnothing", r"\emptyset"),
        (r"\bigl(1, 2\bigr)", "(1, 2)"),
        (r"\text{\$}22.21", "22.21"),
        (r"\mathbf{M} = \begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
        (r"I_{\max} = \frac{q}{2}", r"I_{\max } = \frac{q}{2}"),
        (r"2 \pi x", r"2x\pi"),  # the space after \pi is no space like others
        ("1010_2", "1010_{2}"),
        ("2^{-99}", r"\frac{1}{2^{99}}"),
        (r"\pi^2 n^2", r"n^2 \pi^2"),  # two powers, no tower
        (r"3^2 \cdot 2^3", r"2^3 \cdot 3^2"),
        (r"e^{x^2} + 1", r"1 + e^{x^2}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\left( \tfrac{1}{2}, 3 \right)", r"(\dfrac12, 3)"),
        ("{(3, 4]}", "(3,4]"),
        ("yes", r"\text{Yes}"),
        (r"\mathrm{A, B}", r"\text{A,B}"),
        (r"x \approx 11", "11"),
        ("2ab", "2ab"),
        (r"6 \text{ m}", "6"),
        ("12cm", "12"),
        (r"0.56 = 56\%", "0.56"),
        (r"\left[\begin{array}{cc} 1 & 2 \end{array}\right]", r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
    ],
)
def test_equal(box, answer):
    assert math_reward(rf"thus \boxed{{{box}}}", answer) == 1.0


@pytest.mark.parametrize(
    "box, answer",
    [
        ("6", "5"),
        ("50", "5"),
        ("19441", "19440"),
        ("2", r"2\sqrt{3}"),  # a bare answer would be parsed as 2
        ("7", r"7\pi"),
        ("1, 2", "2"),
        ("1 2", "12"),
        ("1 2", "2"),
        ("41 = 42", "42"),
        ("510_8", "510"),  # nobody asked for that base
        ("776_9", "776_8"),
        ("2^{-98}", "2^{-99}"),  # equal to 15 decimals
        (r"\int_0^1 x dx", r"\frac{1}{2}"),  # left to the grader
        ("--5", "5"),
        ("y = 5", "x = 5"),
        ("0.0000003", "0.00000012"),
        (r"5 \times 10^{3}", "5e4"),
        ("2", "2ab"),  # math-verify takes the letters for a unit
        (r"\gcd(n, p-2)", r"\gcd(n, p-1)"),  # and sees 1 in both
        (r"\frac{1}{3} E_{1} + \frac{1}{3} E_{2}", r"\frac{1}{3} E_{1} + \frac{2}{3} E_{2}"),
        (r"\frac{1}{m}", r"\frac{1}{m} t"),
        (r"-(\frac{1}{2}, 3)", r"(\frac{1}{2}, 3)"),
        (r"\frac{1}{2} \cdot (\frac{1}{2}, 3)", r"(\frac{1}{2}, 3)"),
        (r"(\frac{1}{2}, 3)^2", r"(\frac{1}{2}, 3)"),
        ("-37_9", "-37_8"),
        (r"[4, \infty]", r"[4, \infty)"),
        (r"1.56 = 56\%", r"0.56"),
        (r"x^{2^{3^{4}}}", "x"),
        ("9^9^9^9", "5"),
        ("", "5"),
        ("five", "5"),
        ("5" * 5000, "5"),
        ("9" * 100, "9" * 99),
        ("{" * 2000 + "5" + "}" * 2000, "5"),
        (r"\frac{1}{" * 2000 + "1" + "}" * 2000, "1"),
        (r"9^{9^{9^{9}}}", "5"),
        ("10^{10000000}", "5"),
        ("99999!", "5"),
        ("٥", "5"),  # an Arabic-Indic digit
        ("\x00", "5"),
        ("\ud800", "5"),
    ],
)
def test_not_equal_and_quick(box, answer):
    assert math_reward(rf"thus \boxed{{{box}}}", answer) == 0.0


def test_no_box_is_wrong():
    assert math_reward("the answer is 5", "5") == 0.0


def test_a_failed_comparison_is_counted(monkeypatch):
    import math_verify

    monkeypatch.setattr(math_verify, "verify", lambda *_, **__: 1 / 0)
    assert grade(r"\boxed{x+1}", "1+x").error == "ZeroDivisionError"


@pytest.fixture(scope="module")
def pool():
    pool = GradePool(workers=2)
    yield pool
    pool.close()


def box(answer):
    return rf"so \boxed{{{answer}}}"


LATEX = st.sampled_from(
    r"\boxed{ \frac{ \sqrt{ \left( \right) \text{ \binom{ \begin{pmatrix} \end{pmatrix} \int \sum \infty \pi \in \cup ^ ^{ _ _{ { }"
    r" ( ) [ ] , ; = < > + - * / ! % | & \\ $ . 0 1 2 9 99999 1e9 x y n e i \sin \log \ldots or and = \{ \}".split(" ")
)
FUZZ = st.one_of(st.text(max_size=200), st.lists(LATEX, max_size=30).map("".join), st.lists(LATEX).map(" ".join))


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(text=FUZZ, inside=FUZZ, answer=FUZZ)
def test_any_text_any_answer(pool, text, inside, answer):
    """0 or 1, no exception, no longer than a killed worker takes, and the pool lives on"""
    before = time.monotonic()
    grades = pool.grade([(text, answer), (rf"{text}\boxed{{{inside}}}", answer), (box(inside), inside)])
    assert time.monotonic() - before < 3 * (rewards.WALL_SECONDS + 2)
    assert [float(g.correct) in (0.0, 1.0) for g in grades] == [True] * 3
    assert pool.grade([(box("x+1"), "1+x")])[0].correct


# ---------------------------------------------------------------------------------------------------------------- pool


HARD = [(box(rf"\frac{{{i}}}{{7}}"), rf"{i}/7") for i in range(1, 40)]  # for math-verify: neither strings nor numbers


def test_the_pool_keeps_the_order(pool):
    pairs = [pair for i, pair in enumerate(HARD) for pair in (pair, (box("5"), str(5 + i % 2)), (box(r"\pi"), f"{i}"))]
    grades = pool.grade(pairs)
    assert [g.correct for g in grades] == [c for i in range(len(HARD)) for c in (True, i % 2 == 0, False)]
    assert pool.grade([]) == []


def test_the_pool_agrees_with_one_pair(pool):
    pairs = [(box(r"2\sqrt{3}"), r"\sqrt{12}"), (box("2"), r"2\sqrt{3}"), ("no box", "5"), (box("1+x"), "x+1")]
    assert pool.grade(pairs) == [grade(*pair) for pair in pairs]


def test_what_was_compared_is_remembered(pool, monkeypatch):
    pool.grade(HARD)
    monkeypatch.setattr(rewards, "start_worker", lambda: pytest.fail("a worker was started"))
    monkeypatch.setattr(pool, "workers", [])
    before = time.monotonic()
    assert all(g.correct for g in pool.grade([*HARD, *HARD][:39]))
    assert time.monotonic() - before < 1


def test_many_open_files(tmp_path):
    """A process of a GPU has more than 1,024 file descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    files, pool = [open(tmp_path / "file", "w") for _ in range(1100)], GradePool(workers=1)
    try:
        assert pool.grade([(r"\boxed{x+1}", "1+x")])[0].correct
    finally:
        pool.close()
        for file in files:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_worker_that_dies_is_replaced(pool):
    pool.grade([(box("x+1"), "1+x+0")])
    os.kill(pool.workers[0].pid, signal.SIGSTOP)  # it never answers: a hang that no alarm within it can end
    pool.seconds, before = 1.0, time.monotonic()
    try:
        grades = pool.grade([(box(rf"x+{i}"), f"{i}+x") for i in range(20)])
    finally:
        pool.seconds = rewards.WALL_SECONDS
    assert [g.error for g in grades].count("timeout") == 1 and sum(g.correct for g in grades) == 19
    assert time.monotonic() - before < 15  # one second, and a new worker's start

    for worker in pool.workers:
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
    assert all(g.correct for g in pool.grade([(box(rf"y+{i}"), f"{i}+y") for i in range(20)]))


def test_what_was_remembered_may_be_forgotten(pool, monkeypatch):
    """The memory is full while an answer of the same call is still to come from it."""
    pool.known = {}
    pool.grade(HARD[:2])
    monkeypatch.setattr(rewards, "REMEMBERED", 1)
    assert [g.correct for g in pool.grade(HARD[:4])] == [True] * 4 and pool.known == {}
    assert [g.correct for g in pool.grade(HARD[:2])] == [True] * 2


def test_workers_that_never_start(monkeypatch):
    """They are waited for, for a while; each costs the answer it was given."""
    monkeypatch.setattr(rewards, "START_SECONDS", 0.3)
    silent = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    monkeypatch.setattr(rewards, "start_worker", lambda: subprocess.Popen(["sleep", "60"], **silent))
    pool = GradePool(workers=2)
    assert [g.error for g in pool.grade([(box("p+1"), "1+p"), (box("p+2"), "2+p"), (box("7"), "7")])] == [
        "timeout"
    ] * 2 + [""]
    pool.close()


def test_a_worker_that_dies_at_work_costs_one_answer(pool):
    pool.grade([(box("v+1"), "1+v")])
    worker = pool.workers[0]
    os.kill(worker.pid, signal.SIGSTOP)  # so that it surely has its work when it dies
    threading.Timer(0.5, os.kill, (worker.pid, signal.SIGKILL)).start()
    grades = pool.grade([(box(rf"w+{i}"), f"{i}+w") for i in range(20)])
    assert [g.error for g in grades].count("died") == 1 and sum(g.correct for g in grades) == 19


def test_nothing_is_left_behind(tmp_path):
    """A worker starts with work for it; all end with the process that started them, however it ends."""
    code = "import os, rewards; p = rewards.GradePool(2); box = lambda i: (chr(92) + f'boxed{{{i}+x}}', f'x+{i}'); "
    code += "p.grade([box(1)]); assert len(p.workers) == 1; p.grade([box(2), box(3), box(4)]); "
    code += "print(*[w.pid for w in p.workers], flush=True); os.kill(os.getpid(), 9)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=os.path.dirname(rewards.__file__)
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") and open(f"/proc/{pid}/stat").read().split()[2] != "Z" for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_hundred_right_answers_after_ten_hostile_ones(pool):
    hostile = [rf"\binom{{10^{{{i}}}}}{{10^{{{i - 1}}}}}" for i in range(5, 10)] + [
        rf"\sin(\cos(\sin({i}!!!)))" for i in range(5)
    ]
    grades = pool.grade([(box(h), r"\frac{1}{3}") for h in hostile] + HARD[:50] + [(box("7"), "7.0")] * 61)
    assert not any(g.correct for g in grades[:10]) and all(g.correct for g in grades[10:])


def test_repeats():
    start = list(range(100, 150))
    assert not repeats(start)
    assert repeats(start + [1, 2, 3, 4, 5, 6, 7, 8] * REPEATS)
    assert repeats(start + [1, 2, 3, 4, 5, 6, 7, 8] * REPEATS + [1, 2, 3])  # the last copy cut short
    assert repeats(start + [7] * REPEAT_SPAN)


def test_does_not_repeat():
    start = list(range(100, 150))
    assert not repeats([])
    assert not repeats([7] * (REPEAT_SPAN - 1))  # too short: a number with many equal digits
    assert not repeats(start + [1, 2, 3, 4, 5, 6, 7, 8] * (REPEATS - 1))  # said twice
    assert not repeats([1, 2, 3, 4, 5, 6, 7, 8] * 5 + start)  # it got out of the loop
