"""Export a trained model to Hugging Face transformers, with proof: launch/export.py runs/demo (--help teaches)."""

import sys

from lmtrain.export import main
from lmtrain.pipe import ends_with_its_reader

if __name__ == "__main__":
    with ends_with_its_reader():
        code = main()
    sys.exit(code)
