"""The museum of silent bugs: every patch in bugs/ changes one line, as somebody once did, and a test turns red.

The head of a patch says what went wrong and names the test. A patch that no longer applies, or a test that stays green,
fails here.
"""

import concurrent.futures
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, copy_project

PATCHES = sorted((ROOT / "tests" / "bugs").glob("*.patch"))


def head(path, field):
    return re.search(rf"^{field}: (.+)$", path.read_text(), re.M)[1]


def run_tests(folder, patch, *tests):
    """-> exit status and output of these tests in a copy of the project that has this bug"""
    copy_project(folder, patch)
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # two at a time; waiting threads would take the other's core
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """What comes of each patch, and, under None, of a copy without any."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        named = sorted({head(path, "Test") for path in PATCHES})
        jobs = {None: pool.submit(run_tests, tmp_path_factory.mktemp("healthy"), None, *named)}
        for path in PATCHES:
            jobs[path] = pool.submit(run_tests, tmp_path_factory.mktemp(path.stem), path, head(path, "Test"))
        yield jobs


def test_the_museum_is_open(tried):
    assert len(PATCHES) >= 20
    status, said = tried[None].result()
    assert status == 0, said  # without a bug all these tests are green


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_a_bug_turns_its_test_red(path, tried):
    changed = re.findall(r"^([+-])(?![+-]{2} )", path.read_text(), re.M)
    assert changed.count("+") <= 1 and changed.count("-") <= 1, "more than one line"
    status, said = tried[path].result()
    assert status == 1, said  # 1: a test failed; 2 to 5: pytest found no such test, or could not start
