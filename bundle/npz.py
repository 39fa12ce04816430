"""Arrays as the bytes of an .npz file that depend on the arrays alone."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt


def npz_of(arrays: Mapping[str, npt.NDArray[np.generic]]) -> bytes:
    """The file that `np.load` reads, with the arrays by name, in order, and without pickles.

    `np.savez` writes other bytes under Python 3.11.2 than under 3.11.7, and `savez_compressed` also
    depends on the zlib. So the entries are zipped here, uncompressed, each with zip's first date.
    """
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            entry = io.BytesIO()
            np.lib.format.write_array(entry, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), entry.getvalue())
    return file.getvalue()
