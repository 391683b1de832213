"""The program in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

ASKS = "import aif.__main__, os; aif.__main__.with_huge_pages(); print(os.getpid(), os.environ['GLIBC_TUNABLES'])"
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc reads its environment")


def started(tunables: str) -> tuple[int, list[str]]:
    """Process id of a child that asks for huge pages, and what it prints."""
    environment = {**os.environ, "GLIBC_TUNABLES": tunables}
    with subprocess.Popen([sys.executable, "-c", ASKS], env=environment, stdout=subprocess.PIPE, text=True) as child:
        return child.pid, child.communicate(timeout=60)[0].split()


@glibc
def test_large_arrays_get_huge_pages_in_the_same_process():
    pid, said = started("")
    assert said == [str(pid), "glibc.malloc.hugetlb=1"]


@glibc
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("glibc.malloc.check=0", "glibc.malloc.check=0:glibc.malloc.hugetlb=1"),
    ],
)
def test_what_the_user_set_stays(given, kept):
    assert started(given)[1][1] == kept


def test_the_program_and_its_status():
    done = subprocess.run(
        [sys.executable, "-m", "aif", "config", "check", "nowhere.yaml"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere.yaml")
