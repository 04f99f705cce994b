"""Export a trained model to Hugging Face transformers, with proof: launch/export.py runs/demo (--help teaches)."""

import sys

from lmtrain.export import main

if __name__ == "__main__":
    sys.exit(main())
