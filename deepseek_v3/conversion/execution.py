"""Runs planned work in worker processes: output files for a conversion, tensor pairs for a comparison.

Special about it: nobody outlives the command. Workers leave when their parent is gone (killed with SIGKILL, it can
tell nobody), and when one piece of work fails the others stop at their next band instead of finishing a shard.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any

from .errors import CheckpointError
from .writer import Stopped

_stop: Any = None


class WorkerDied(CheckpointError):
    """A worker process ended without a word, as one does that the system kills for lack of memory."""


def stopped() -> bool:
    """In a worker: whether the work is no longer needed."""
    return _stop is not None and _stop.is_set()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _start_worker(stop: Any, threads: int, needs_codec: bool) -> None:
    global _stop
    _stop = stop
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    # Ctrl-C reaches every process of the terminal; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if needs_codec:
        from .codec import prepare_worker

        prepare_worker(threads)


def default_workers() -> int:
    """One worker for each core this process may use, at most eight: beyond that a disk is the limit."""
    return max(1, min(8, len(os.sched_getaffinity(0))))


def _context(needs_codec: bool) -> Any:
    # A server that has all modules and no threads forks in milliseconds; forking this process would not be safe.
    context = multiprocessing.get_context("forkserver")
    modules = ["deepseek_v3.conversion.driver", "deepseek_v3.conversion.codec"]
    context.set_forkserver_preload(modules if needs_codec else modules[:1])
    return context


def run_all(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], *, workers: int, needs_codec: bool
) -> Iterator[tuple[int, Any]]:
    """Call `function(*calls[i])` for each i and yield (i, result) as they are done.

    Args:
        function: a module-level function.
        calls: its arguments.
        workers: processes; 0 works in this process, one call after the other.
        needs_codec: whether the calls encode or decode FP8.

    Raises:
        WorkerDied: a worker process was killed; else whatever a call raises.
    """
    if workers <= 0 or not calls:
        for index, arguments in enumerate(calls):
            yield index, function(*arguments)
        return
    workers = min(workers, len(calls))
    context = _context(needs_codec)
    stop = context.Event()
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    with ProcessPoolExecutor(workers, context, _start_worker, (stop, threads, needs_codec)) as pool:
        pending: dict[Future[Any], int] = {}
        try:
            for index, arguments in enumerate(calls):
                pending[pool.submit(function, *arguments)] = index
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                # The failure that started it all, not the stops that it caused.
                for future in sorted(done, key=lambda future: isinstance(future.exception(), Stopped)):
                    yield pending.pop(future), future.result()
        except BrokenProcessPool:
            problem = "a worker process died, perhaps for lack of memory"
            raise WorkerDied(problem, remedy="run the same command again with fewer --workers") from None
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
