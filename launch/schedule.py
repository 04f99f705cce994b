"""The mixture of a run over its tokens: show it, and change it while the run trains or stands.

    python launch/schedule.py show runs/x                              every event, in words
    python launch/schedule.py plot runs/x                              shares over the run
    python launch/schedule.py set runs/x code=0.3                      30 % of the blocks; others keep their proportions
    python launch/schedule.py set runs/x code=0.3 at=+20M reason="..." 20 million tokens from now (at=2e9: in all)
    python launch/schedule.py set runs/x code=0                        remove a source
    python launch/schedule.py skip runs/x tokens=2e6                   pass over what comes next
    python launch/schedule.py add runs/x news=data/news/news share=0.1      a new source, made by launch/prepare.py
    python launch/schedule.py add runs/x recall=lmtrain.eval.probes.mqar:mqar arguments.pairs=4 arguments.length=64 \\
        arguments.num_keys=32 arguments.num_values=32 share=0.05       one that is a function (docs/data.md)

A source called at, reason or share is weights.NAME= for set and add.NAME= for add.

A run that trains finds the request in its control folder and answers after its next step; of one that does not, the log
is changed. Either way it is an event in schedule.jsonl: the run resumes with it, at any number of ranks.
"""

from __future__ import annotations

import sys

from lmtrain.pipe import ends_with_its_reader
from lmtrain.pretrain.schedule_command import main

if __name__ == "__main__":
    with ends_with_its_reader():
        code = main(sys.argv[1:], __doc__ or "")
    sys.exit(code)
