"""Conversions that are killed, refused or run out of disk: what remains, and what the next run makes of it."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import killed_conversions
import pytest
from checkpoint_files import CONFIG, command, snapshot

from deepseek_v3.conversion import CheckpointError, convert, execution, target, write_checkpoint, writer
from deepseek_v3.conversion.writer import Stopped

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["deepseek_v3.conversion.codec", "deepseek_v3.conversion.driver"])
JOURNAL = ".conversion.json"


def in_a_child(function, *arguments):
    """Run a function in a fresh process: its exit code, negative for a signal."""
    process = CHILDREN.Process(target=function, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def report_of(function, *arguments):
    """What a function in a fresh process sends back."""
    receiver, sender = CHILDREN.Pipe(duplex=False)
    process = CHILDREN.Process(target=function, args=(*arguments, sender))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join(60)
    return result


def sealed(folder):
    """Names, sizes and times of a source, to see that nothing touched it."""
    return {p.name: (p.stat().st_size, p.stat().st_mtime_ns) for p in Path(folder).iterdir()}


@pytest.mark.parametrize(
    ("function", "source", "to", "options", "points"),
    [
        (killed_conversions.die_writing, "fp8", "bf16", {}, 200),
        (killed_conversions.die_writing, "bf16", "fp8", {"scale_fmt": "ue8m0"}, 200),
        (killed_conversions.die_writing, "bf16", "inference", {"model_parallel": 2, "keep_mtp": True}, 60),
        (killed_conversions.die_renaming, "fp8", "bf16", {}, 7),
    ],
)
def test_killed_at_any_point_the_same_command_finishes(made, tmp_path, function, source, to, options, points):
    """SIGKILL at random writes and after random renames; sometimes again on the way back."""
    convert(made / source, tmp_path / "whole", to, workers=0, **options)
    expected, before = snapshot(tmp_path / "whole"), sealed(made / source)
    chance = random.Random(points)
    killed = 0
    for trial in range(4):
        out = tmp_path / f"out{trial}"
        for point in sorted(chance.sample(range(points), 1 + trial % 2)):
            killed += in_a_child(function, made / source, out, to, point, options) == -signal.SIGKILL
        unfinished = out.exists() and JOURNAL in os.listdir(out)
        report = convert(made / source, out, to, workers=0, resume=trial % 2 == 0 or not unfinished, **options)
        assert snapshot(out) == expected
        assert report.resumed <= report.files
    assert killed >= 3 and sealed(made / source) == before


def running(group):
    """Processes of a process group that are alive."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, number = status.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        found += [status.parent.name] if int(number) == group and state != "Z" else []
    return found


def all_gone(group):
    """Whether every process of a group ends within twenty seconds."""
    deadline = time.monotonic() + 20
    while running(group) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not running(group)


def begin(out, *words):
    """The command in a process group of its own, once it has written its journal."""
    script = Path(sys.executable).with_name("deepseek-v3")
    process = subprocess.Popen(
        [script, *map(str, words), "--quiet"], start_new_session=True, stdout=subprocess.DEVNULL
    )
    while not (out / JOURNAL).exists() and process.poll() is None:
        time.sleep(0.001)
    return process


@pytest.mark.parametrize(("source", "kills"), [("fp8", 2), ("bf16", 5)])
def test_a_command_killed_at_random_moments_is_finished_by_the_next(tmp_path, source, kills):
    """SIGKILL to the whole group or to the parent alone, at any moment of what an uninterrupted run takes."""
    config = {**CONFIG, "n_routed_experts": 32}
    write_checkpoint(config, tmp_path / source, shards=16, quantized=source == "fp8")
    before, options = sealed(tmp_path / source), ("--to", "bf16", "--workers", 2, "--shard-size", "1MB")
    process = begin(tmp_path / "whole", "convert", tmp_path / source, tmp_path / "whole", *options)
    started = time.monotonic()
    assert process.wait(60) == 0
    whole, duration = snapshot(tmp_path / "whole"), time.monotonic() - started
    chance, out, unfinished = random.Random(kills), tmp_path / "out", 0
    for kill in range(kills):
        # A run that gets to its end leaves nothing to resume; the next trial begins anew.
        if out.exists() and not (out / JOURNAL).exists():
            shutil.rmtree(out)
        process = begin(out, "convert", tmp_path / source, out, *options)
        time.sleep(chance.uniform(0, 0.8 * duration))
        os.kill(process.pid, signal.SIGKILL) if kill % 2 else os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert all_gone(process.pid)
        unfinished += (out / JOURNAL).exists()
    process = begin(out, "convert", tmp_path / source, out, *options, "--resume")
    assert process.wait(60) == 0 and unfinished and all_gone(process.pid)
    assert snapshot(out) == whole and sealed(tmp_path / source) == before


def test_resume_of_what_is_finished_and_of_what_is_not_ours(made, copy, tmp_path):
    out = tmp_path / "out"
    convert(made / "fp8", out, "bf16", workers=0)
    whole = snapshot(out)
    with pytest.raises(CheckpointError, match="not empty.*--overwrite"):
        convert(made / "fp8", out, "bf16", workers=0)
    assert convert(made / "fp8", out, "bf16", workers=0, resume=True).resumed == 4
    assert snapshot(out) == whole
    with pytest.raises(CheckpointError, match="result of another conversion"):
        convert(made / "ue8m0", out, "bf16", workers=0, resume=True)
    assert snapshot(out) == whole


def test_the_finished_result_of_another_source_or_option_is_not_taken_for_this_one(made, tmp_path):
    """Same names, shapes and files, as V3 and R1 have them: headers alone cannot tell them apart."""
    write_checkpoint(CONFIG, tmp_path / "relative", shards=4, seed=5)
    convert(made / "fp8", tmp_path / "a", "bf16", workers=0)
    convert(made / "bf16", tmp_path / "b", "fp8", workers=0)
    whole = [snapshot(tmp_path / name) for name in "ab"]
    with pytest.raises(CheckpointError, match="result of another conversion.*--overwrite"):
        convert(tmp_path / "relative", tmp_path / "a", "bf16", workers=0, resume=True)
    with pytest.raises(CheckpointError, match="result of another conversion"):
        convert(made / "bf16", tmp_path / "b", "fp8", scale_fmt="ue8m0", workers=0, resume=True)
    assert [snapshot(tmp_path / name) for name in "ab"] == whole


def test_a_changed_source_is_not_mixed_with_the_old_one(made, copy, tmp_path):
    source = copy("fp8")
    assert in_a_child(killed_conversions.die_renaming, source, tmp_path / "out", "bf16", 2, {}) == -signal.SIGKILL
    shard = sorted(source.glob("*.safetensors"))[-1]
    os.utime(shard, ns=(0, 0))
    before = snapshot(tmp_path / "out")
    for options in ({"resume": True}, {}):
        with pytest.raises(CheckpointError, match="source has changed"):
            convert(source, tmp_path / "out", "bf16", workers=0, **options)
    assert snapshot(tmp_path / "out") == before
    convert(source, tmp_path / "out", "bf16", workers=0, overwrite=True)
    assert snapshot(tmp_path / "out") == snapshot(made / "bf16")


def test_source_and_destination_must_lie_apart(copy, tmp_path):
    source = copy("fp8")
    (tmp_path / "alias").symlink_to(source)
    before = sealed(source)
    for place in (source, source / "bf16", tmp_path, tmp_path / "alias", tmp_path / "x" / ".." / "fp8"):
        for options in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(CheckpointError, match="is the source, lies in it or holds it"):
                convert(source, place, "bf16", workers=0, **options)
    with pytest.raises(CheckpointError, match="--like"):
        convert(tmp_path / "alias", tmp_path / "other", "fp8", like=tmp_path / "other", workers=0)
    assert sealed(source) == before


def test_a_folder_with_anything_in_it_is_left_alone(made, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    for options in ({}, {"resume": True}):
        with pytest.raises(CheckpointError, match="not empty"):
            convert(made / "fp8", tmp_path / "out", "bf16", workers=0, **options)
    assert snapshot(tmp_path / "out") == {"precious.txt": b"mine"}
    with pytest.raises(CheckpointError, match="no folder"):
        convert(made / "fp8", tmp_path / "out" / "precious.txt", "bf16", workers=0)


def test_overwrite_replaces_a_checkpoint_and_nothing_else(made, copy, tmp_path):
    out = copy("ue8m0")
    (out / "precious.txt").write_text("mine")
    (out / "stale-shard.safetensors").write_bytes(b"old")
    convert(made / "fp8", out, "bf16", workers=0, overwrite=True)
    assert snapshot(out) == snapshot(made / "bf16") | {"precious.txt": b"mine"}


def test_overwrite_given_again_after_a_kill_continues(made, copy, tmp_path):
    out, options = copy("ue8m0"), {"overwrite": True, "resume": False}
    died = in_a_child(killed_conversions.die_renaming, made / "fp8", out, "bf16", 2, options)
    assert died == -signal.SIGKILL
    report = convert(made / "fp8", out, "bf16", workers=0, overwrite=True)
    assert report.resumed == 2 and snapshot(out) == snapshot(made / "bf16")
    (out / JOURNAL).write_text("broken")
    assert convert(made / "fp8", out, "bf16", workers=0, overwrite=True).resumed == 0
    assert snapshot(out) == snapshot(made / "bf16")


def test_two_conversions_do_not_share_a_folder(made, tmp_path):
    (tmp_path / "out").mkdir()
    with target.locked(tmp_path / "out"):
        with pytest.raises(CheckpointError, match="another conversion"):
            convert(made / "fp8", tmp_path / "out", "bf16", workers=0)
    assert not os.listdir(tmp_path / "out")


def test_a_disk_that_is_too_small_is_seen_beforehand(made, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(CheckpointError, match="free, the result takes"):
        convert(made / "fp8", tmp_path / "out", "bf16", workers=0)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_leaves_only_whole_files(made, tmp_path):
    """A real write error in the middle: the second file is too large for the limit."""
    sizes = sorted(path.stat().st_size for path in (made / "bf16").glob("*.safetensors"))
    before = sealed(made / "fp8")
    text = report_of(killed_conversions.on_a_small_disk, made / "fp8", tmp_path / "out", "bf16", sizes[-1] - 1000)
    assert text is not None and "disk is full" in text and "--resume" in text and "\n" not in text
    left = set(os.listdir(tmp_path / "out"))
    assert JOURNAL in left and not any(name.endswith(".partial") for name in left)
    assert sealed(made / "fp8") == before
    convert(made / "fp8", tmp_path / "out", "bf16", workers=0, resume=True)
    assert snapshot(tmp_path / "out") == snapshot(made / "bf16")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_write_errors_of_every_kind(made, tmp_path, monkeypatch, code):
    real, writes = os.pwrite, iter(range(10_000))

    def pwrite(*args):
        if next(writes) == 30:
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(CheckpointError, match="disk is full|Input/output error"):
        convert(made / "fp8", tmp_path / "out", "bf16", workers=0)
    assert not any(name.endswith(".partial") for name in os.listdir(tmp_path / "out"))


def test_progress_that_nobody_reads_is_no_failed_write(made, tmp_path):
    def gone(file, done, total):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    with pytest.raises(BrokenPipeError):
        convert(made / "fp8", tmp_path / "out", "bf16", workers=0, progress=gone)
    convert(made / "fp8", tmp_path / "out", "bf16", workers=0)
    assert snapshot(tmp_path / "out") == snapshot(made / "bf16")


def test_a_disk_that_is_full_before_the_first_note_is_written(made, tmp_path, monkeypatch, capsys):
    """One line and exit code 2, and no empty folder that the next run would have to be told about."""
    before, real = sealed(made / "fp8"), os.pwrite

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    assert command("convert", made / "fp8", tmp_path / "out", "--to", "bf16", "--workers", 0) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "the source is untouched" in line
    assert f"{tmp_path / 'out'}: writing failed: the disk is full" in line
    assert not (tmp_path / "out").exists() and sealed(made / "fp8") == before
    # What was there before is still there.
    (tmp_path / "out").mkdir()
    assert command("convert", made / "fp8", tmp_path / "out", "--to", "bf16", "--workers", 0) == 2
    assert os.listdir(tmp_path / "out") == []
    monkeypatch.setattr(os, "pwrite", real)
    assert (
        command("convert", made / "fp8", tmp_path / "out", "--to", "bf16", "--workers", 0, "--quiet", "--resume") == 0
    )
    assert snapshot(tmp_path / "out") == snapshot(made / "bf16")


def test_a_destination_that_cannot_be_made(made, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert command("convert", made / "fp8", tmp_path / "file" / "out", "--to", "bf16", "--workers", 0) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "choose another destination" in line, line


def test_bad_values_found_late_leave_nothing_behind(copy, tmp_path):
    """NaN in the last file of a BF16 source: finished files go as well, for no second run would do better."""
    from safetensors.torch import load_file, save_file

    source = copy("bf16")
    path = sorted(source.glob("*.safetensors"))[-1]
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("experts.3.down_proj.weight"))
    tensors[name][5, 5] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    for workers in (0, 2):
        with pytest.raises(CheckpointError) as caught:
            convert(source, tmp_path / "out", "fp8", workers=workers)
        assert path.name in str(caught.value) and name in str(caught.value) and "NaN" in str(caught.value)
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError):
        convert(source, tmp_path / "out", "fp8", workers=0)
    assert os.listdir(tmp_path / "out") == []


def _die(path):
    os.kill(os.getpid(), signal.SIGKILL)


def _wait_or_fail(number):
    if number == 0:
        raise CheckpointError("the first fails")
    begin = time.monotonic()
    while not execution.stopped():
        assert time.monotonic() - begin < 30
        time.sleep(0.01)
    raise Stopped


def test_a_dead_worker_is_reported():
    with pytest.raises(execution.WorkerDied, match="--workers"):
        list(execution.run_all(_die, [(1,), (2,)], workers=2, needs_codec=False))


def test_one_failure_stops_the_others_and_is_the_one_reported():
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match="the first fails"):
        list(execution.run_all(_wait_or_fail, [(0,), (1,), (2,)], workers=2, needs_codec=False))
    assert time.monotonic() - begin < 25


@pytest.mark.parametrize(("source", "to"), [("fp8", "bf16"), ("bf16", "fp8"), ("fp8", "fused")])
def test_memory_is_a_band_not_a_file_or_a_stack(tmp_path, source, to):
    """One file of 75 to 150 MB, one stack of experts of 64 MiB in the fused result: the work takes less than 40."""
    sizes = {"hidden_size": 2048, "moe_intermediate_size": 4096, "num_nextn_predict_layers": 0, "n_routed_experts": 2}
    config = {**CONFIG, **sizes}
    write_checkpoint(config, tmp_path / source, quantized=source == "fp8", shards=1)
    before, after = report_of(killed_conversions.memory_of, tmp_path / source, tmp_path / "out", to, {})
    assert max(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) > 70 * 2**20
    assert after - before < 40 * 2**20, (after - before) / 2**20


def test_a_file_that_fails_leaves_no_trace(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(KeyboardInterrupt), writer.atomic_file(tmp_path / "x") as fd:
        writer.write_all(fd, b"new", 0)
        assert len(os.listdir(tmp_path)) == 2
        raise KeyboardInterrupt
    assert snapshot(tmp_path) == {"x": b"old"}


def test_copy_goes_on_where_the_kernel_cannot(made, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EXDEV, "cross-device")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    convert(made / "bf16", tmp_path / "fused", "fused", workers=0)
    assert snapshot(tmp_path / "fused") == snapshot(made / "fused")


def test_a_source_cut_short_while_it_is_copied(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(b"abc")
    with path.open("rb") as source, (tmp_path / "out").open("wb") as out:
        with pytest.raises(CheckpointError, match="shorter"):
            writer.copy_range(source.fileno(), out.fileno(), 0, 0, 10, lambda: False)


def test_the_journal_is_not_believed_blindly(made, tmp_path):
    out = tmp_path / "out"
    assert in_a_child(killed_conversions.die_renaming, made / "fp8", out, "bf16", 2, {}) == -signal.SIGKILL
    shard = sorted(out.glob("*.safetensors"))[0]
    # A file of the planned name that is not the planned file is written again.
    shard.write_bytes(shard.read_bytes()[:-1])
    report = convert(made / "fp8", out, "bf16", workers=0)
    assert report.resumed < 2 and snapshot(out) == snapshot(made / "bf16")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / JOURNAL).write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match=JOURNAL):
        convert(made / "fp8", tmp_path / "odd", "bf16", workers=0)
