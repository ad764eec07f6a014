"""Views against numpy: cutting and joining matrices without reading them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.conversion.header import TensorInfo
from deepseek_v3.conversion.views import Source, join, view_of, window

MANY = settings(max_examples=150, deadline=None)
DTYPES = {"U8": np.uint8, "BF16": np.uint16, "F32": np.uint32}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A file of random bytes in which any tensor can be declared."""
    path = tmp_path_factory.mktemp("views") / "data"
    path.write_bytes(np.random.default_rng(0).bytes(1 << 16))
    return path


def declare(path, dtype, rows, columns, offset):
    """A stored matrix and what numpy reads for it."""
    kind = np.dtype(DTYPES[dtype])
    raw = path.read_bytes()[offset : offset + rows * columns * kind.itemsize]
    return TensorInfo(dtype, (rows, columns), str(path), offset), np.frombuffer(raw, kind).reshape(rows, columns)


spans = st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted)


@MANY
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    parts=st.integers(1, 4),
    axis=st.integers(0, 1),
    offset=st.integers(0, 9000),
    cuts=st.lists(st.tuples(st.integers(0, 1), spans), max_size=3),
)
def test_windows_of_joined_tensors(stored, dtype, shape, parts, axis, offset, cuts):
    pairs = [declare(stored, dtype, *shape, offset + 4099 * part) for part in range(parts)]
    view, truth = join([view_of(info) for info, _ in pairs], axis), np.concatenate([a for _, a in pairs], axis)
    for direction, (begin, end) in cuts:
        end = min(end, truth.shape[direction])
        begin = min(begin, end)
        view = window(view, direction, begin, end)
        truth = truth[:, begin:end] if direction else truth[begin:end]
    assert view.shape == truth.shape and view.nbytes == truth.nbytes
    with Source() as source:
        assert np.array_equal(source.array(view), truth)
        middle = truth.shape[0] // 2
        assert np.array_equal(source.rows(view, middle, truth.shape[0]), truth[middle:])


def test_vectors_and_stacks_are_rows(stored):
    vector = view_of(TensorInfo("BF16", (6,), str(stored), 10))
    assert (vector.rows, vector.columns) == (6, 1) and window(vector, 0, 2, 5).shape == (3,)
    scalar = view_of(TensorInfo("F32", (), str(stored), 4))
    assert (scalar.rows, scalar.columns, scalar.nbytes) == (1, 1, 4)
    stack = view_of(TensorInfo("U8", (3, 4, 5), str(stored), 7))
    assert (stack.rows, stack.columns) == (12, 5)
    expert = window(stack, 0, 4, 8, (4, 5))
    truth = np.frombuffer(stored.read_bytes()[7 : 7 + 60], np.uint8).reshape(3, 4, 5)
    with Source() as source:
        assert np.array_equal(source.array(expert), truth[1])


def test_a_source_keeps_few_files_open_and_closes_them(stored, tmp_path):
    import os

    infos = []
    for number in range(40):
        path = tmp_path / str(number)
        path.write_bytes(bytes([number] * 4))
        infos.append(TensorInfo("U8", (4,), str(path), 0))
    before = len(os.listdir("/proc/self/fd"))
    with Source() as source:
        for number, info in enumerate(infos + infos[:3]):
            assert source.array(view_of(info))[0, 0] == number % 40
            assert len(os.listdir("/proc/self/fd")) <= before + 34
    assert len(os.listdir("/proc/self/fd")) == before
