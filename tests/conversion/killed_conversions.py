"""Conversions that are cut off, as functions that a child process can run."""

import os
import resource
import signal

from deepseek_v3.conversion import CheckpointError, convert


def _die_in(names, count, after):
    """Let call number `count` of the named functions of `os`, counted together, be the process's last."""
    done = 0

    def wrap(real):
        def call(*args):
            nonlocal done
            done += 1
            if done > count and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args)
            if done > count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in names:
        setattr(os, name, wrap(getattr(os, name)))


def die_writing(source, target, to, count, options):
    """Convert in this process and die by SIGKILL just before write number `count`."""
    _die_in(("pwrite", "copy_file_range"), count, after=False)
    convert(source, target, to, **{"workers": 0, "resume": True, **options})


def die_renaming(source, target, to, count, options):
    """Convert in this process and die by SIGKILL just after rename number `count`."""
    _die_in(("rename",), count, after=True)
    convert(source, target, to, **{"workers": 0, "resume": True, **options})


def on_a_small_disk(source, target, to, limit, connection):
    """Convert where no file may grow beyond `limit` bytes, and report the error's text."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        convert(source, target, to, workers=0)
        connection.send(None)
    except CheckpointError as error:
        connection.send(str(error))


def memory_of(source, target, to, options, connection):
    """Convert in this fresh process and report its peak resident memory in bytes, before and after."""
    import torch  # noqa: F401 -- the framework itself is not what is measured

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    convert(source, target, to, workers=0, **options)
    connection.send((before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
