"""Two minutes to see it learn: corpus, tokenizer, two processes, stop and resume, held-out bits per byte."""

import sys

from lmtrain.demo import main

if __name__ == "__main__":
    sys.exit(main())
