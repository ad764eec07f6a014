"""Processes that start in a moment: a server that has imported everything once forks them.

Special about it: Python's "forkserver". What is forked has run no parallel region yet, so its threads work, and it
shares nothing with the tests' own process.
"""

import faulthandler
import multiprocessing
import os

import torch

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["children", "distributed_worker", "deepseek_v3.cli", "deepseek_v3.training.train"])


def start(call, *args, log=os.devnull, **environment):
    """A process that calls `call(*args)`, a module's function, with its output in the file `log`."""
    names = {name: str(value) for name, value in environment.items()}
    child = context.Process(target=_call, args=(call, args, str(log), names, torch.get_num_threads()))
    child.start()
    return child


def run_ranks(call, *args, folder, ranks=2):
    """`call(*args)` in processes that find in their environment what torchrun would have put there."""
    files = [folder / f"output{rank}.txt" for rank in range(ranks)]
    store = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": _free_port()}
    threads = {"OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"}
    children = [
        start(call, *args, log=file, RANK=rank, LOCAL_RANK=rank, **store, **threads) for rank, file in enumerate(files)
    ]
    for child in children:
        child.join()
    output = "\n".join(file.read_text()[-3000:] for file in files)
    assert all(child.exitcode == 0 for child in children), output


def _free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def _call(call, args, log, names, threads):
    os.environ.update(names)
    torch.set_num_threads(int(names.get("OMP_NUM_THREADS", threads)))
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    call(*args)
