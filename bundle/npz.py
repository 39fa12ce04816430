"""Arrays as the bytes of an .npz file, which depend on the arrays alone."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt


def npz_of(arrays: Mapping[str, npt.NDArray[np.generic]]) -> bytes:
    """The bytes of a file that `np.load` reads, with the arrays by name and in order.

    Raises ValueError for an array of objects, which would have to be pickled.

    >>> np.load(io.BytesIO(npz_of({"ids": np.arange(3)})))["ids"]
    array([0, 1, 2])
    """
    # np.savez writes other bytes under Python 3.11.2 than under 3.11.7, and np.savez_compressed
    # depends on the zlib as well. So the archive is written here: uncompressed, and with the first
    # date of the format, 1980, for every entry.
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            entry = io.BytesIO()
            np.lib.format.write_array(entry, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), entry.getvalue())
    return file.getvalue()
