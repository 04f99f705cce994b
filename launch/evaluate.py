"""Measure a trained model: bits per byte of its held-out text, questions in MMLU's layout, lm-eval tasks.

    python launch/evaluate.py runs/demo                                  held-out text, the newest checkpoint
    python launch/evaluate.py runs/demo mmlu=MMLU_FOLDER num_fewshot=3   questions that come with lmtrain
    python launch/evaluate.py runs/demo/checkpoints/step-00000500 heldout=true mmlu=data/mmlu limit=100
    python launch/evaluate.py runs/demo/export/llama mmlu=data/mmlu      an export, through transformers
    python launch/evaluate.py runs/demo tasks=mine,other include=tasks   lm-eval tasks of your own (YAML files)

mmlu= reads Hendrycks' folder as it is unpacked (dev/, test/; header-less CSV: question, A, B, C, D, answer). Nothing is
downloaded. The result is printed, and kept as evaluation.json with all that is needed to repeat it.
"""

import sys
from pathlib import Path

# lm-eval's `import evaluate` means a library, but a script's own folder, with this file in it, is searched first
sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != Path(__file__).resolve().parent]

from lmtrain.eval.command import main  # noqa: E402
from lmtrain.pipe import ends_with_its_reader  # noqa: E402

if __name__ == "__main__":
    with ends_with_its_reader():
        code = main(sys.argv[1:], __doc__ or "")
    sys.exit(code)
