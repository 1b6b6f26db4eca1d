"""Threads of the ranks on one host. Each rank would otherwise start as many as the host has cores.

The variables of the environment take precedence. Ranks that a launcher has bound to cores of their
own use these.
"""

import os
import platform
import sys
from collections.abc import Collection, MutableMapping, Sequence
from importlib import import_module

from portacnn.distributed.base import Communicator

OTHERS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def divide_threads(
    communicator: Communicator, environment: MutableMapping[str, str] = os.environ
) -> None:
    """Limit portacnn's threads, BLAS's and PyTorch's to this rank's share of its host's cores.

    A limit in the environment holds for what it is a limit of, ``OMP_NUM_THREADS`` also for
    portacnn. The variables that are not set are set, for libraries that load later.
    """
    ours = import_module("portacnn.backends.threads")  # knows cores and container limits
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    told = communicator.gather([platform.node(), cores])
    share = share_of(cores, [other for host, other in told if host == platform.node()])
    asked = next((environment[name] for name in OTHERS if environment.get(name)), "")
    if not environment.get(ours.VARIABLE):
        usable = ours.thread_count()
        if usable < len(cores):  # a quota, of all ranks together
            share = min(share, max(1, usable // communicator.local_size))
        environment[ours.VARIABLE] = asked if asked.isdecimal() else str(share)
        ours.thread_count.cache_clear()
    if not asked:
        count = ours.thread_count()
        for name in OTHERS:
            environment[name] = str(count)
        from threadpoolctl import threadpool_limits

        threadpool_limits(count)  # libraries that are loaded
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(count)


def share_of(cores: Collection[int], ranks: Sequence[Collection[int]]) -> int:
    """Return the threads of a rank that may use ``cores``; ``ranks`` are the cores of all ranks of
    its host, itself included. Ranks that share a core share all of theirs."""
    sharing = sum(1 for other in ranks if set(other) & set(cores))
    bound = len(cores) or os.cpu_count() or 1
    return max(1, bound // max(1, sharing if cores else len(ranks)))
