"""Two minutes to see it learn: corpus, tokenizer, two processes, stop and resume, held-out bits per byte."""

import sys

from lmtrain.demo import main
from lmtrain.pipe import ends_with_its_reader

if __name__ == "__main__":
    with ends_with_its_reader():
        code = main()
    sys.exit(code)
