"""Arrays on disk as numpy writes them."""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray


def write_array(file: BinaryIO, array: NDArray[Any]) -> None:
    """What ``numpy.save`` writes; but where that tells bytes "requested and written", the OSError of the disk."""
    array = np.ascontiguousarray(array)
    npy.write_array_header_1_0(file, npy.header_data_from_array_1_0(array))
    file.write(array.data)
