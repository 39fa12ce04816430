from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest

from evalmode.bundle.npz import npz_of

ARRAYS = {
    "a/ids": np.arange(6, dtype=np.int64).reshape(2, 3),
    "empty": np.zeros((0, 4), np.float32),
    "one": np.array(0.5),
}


def test_numpy_reads_what_was_written():
    with np.load(io.BytesIO(npz_of(ARRAYS)), allow_pickle=False) as read:
        assert read.files == list(ARRAYS)
        for name, array in ARRAYS.items():
            assert read[name].dtype == array.dtype
            assert read[name].shape == array.shape
            assert read[name].tobytes() == array.tobytes()


def test_the_bytes_depend_on_the_arrays_alone():
    digest = hashlib.sha256(npz_of(ARRAYS)).hexdigest()
    assert digest == "a7832518872599b65d3b6bec8e688bf34ab14a74a9a0320b58e7a13311f7dd2d"


def test_objects_are_refused():
    with pytest.raises(ValueError, match="allow_pickle=False"):
        npz_of({"x": np.array([{"code": 1}], dtype=object)})
