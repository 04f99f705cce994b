"""``python -m lmtrain.ops``: which backend every op uses on this machine, and the compiled library behind it."""

import torch

import lmtrain.ops  # noqa: F401  (registers the ops)
from lmtrain.ops import library


def main() -> None:
    """Print one line per device and dtype that training uses."""
    missing = library.load()
    print(f"library: {missing or library.library_path()}")
    if missing is None:
        print(f"cpu unit: {torch.ops.lmtrain.cpu_unit()}")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype in (torch.float32, torch.bfloat16):
            choices = ", ".join(f"{op}={name}" for op, name in library.chosen(device, dtype).items())
            print(f"{device} {str(dtype).removeprefix('torch.')}: {choices}")


if __name__ == "__main__":
    main()
