"""The program `aif`, also `python -m aif`: the command line in a process of its own."""

from __future__ import annotations

import os
import platform
import sys


def with_huge_pages() -> None:
    """Start this program again with large arrays in huge pages; it keeps its process id and its arguments.

    A train step of a 135M model takes gigabytes from the system and gives them back, in pages of 4 KiB a third of a
    million faults each time. glibc asks for pages of 2 MiB only where its environment says so, and reads that once, at
    the start. Other systems and C libraries go on as they are, and so does a user's own setting.
    """
    name, wish = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
    set_already = os.environ.get(name, "")
    if platform.libc_ver()[0] != "glibc" or wish in set_already:
        return
    os.environ[name] = ":".join(filter(None, (set_already, f"{wish}=1")))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def start() -> None:
    """The program from its beginning."""
    with_huge_pages()
    from aif.cli import main  # not before: the process may start again

    main()


if __name__ == "__main__":
    start()
