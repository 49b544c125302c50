"""The order of the problems and the seeds of the samples are functions of what they are for, and nothing else."""

from data.problems import Problems
from infra import engines


def ids(problems):
    return [p["id"] for p in problems]


def make(count=10, seed=1):
    return Problems([{"id": i} for i in range(count)], seed)


def test_an_epoch_takes_every_problem_once():
    problems = make()
    first, second = ([i for _ in range(2) for i in ids(problems.take(5))] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_what_is_left_of_an_epoch_is_not_used():
    problems = make()
    for _ in range(20):
        assert len(set(ids(problems.take(4)))) == 4  # never the same problem twice in a rollout
    problems = make()
    assert ids(problems.take(10)) != ids(problems.take(10))


def test_the_cursor_is_all_there_is():
    one, two = make(), make()
    for _ in range(4):
        one.take(3)
    two.cursor = one.cursor
    assert ids(one.take(3)) == ids(two.take(3))
    assert ids(make(seed=1).take(10)) != ids(make(seed=2).take(10))


def test_seeds():
    rollout = [engines.seed_of(1, 7, f"p{p}", sample) for p in range(128) for sample in range(8)]
    assert len(set(rollout)) == 1024 and all(0 <= seed < 2**31 for seed in rollout)
    assert engines.seed_of(1, 7, "p0", 0) == rollout[0]
    others = [engines.seed_of(*key, 0) for key in [(2, 7, "p0"), (1, 8, "p0"), (1, 7, "p1"), (1, "eval", "p0")]]
    assert len({rollout[0], *others}) == 5
