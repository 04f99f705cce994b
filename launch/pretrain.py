"""Train a model from a recipe: launch/pretrain.py recipe=demo (torchrun for several processes; --help teaches)."""

import sys

from lmtrain.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
