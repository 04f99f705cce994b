"""The mixture of a run over its tokens: show it, and change it while the run trains or stands.

    python launch/schedule.py show runs/x                              every event, in words
    python launch/schedule.py plot runs/x                              shares over the run
    python launch/schedule.py set runs/x code=0.3                      30 % of the blocks; others keep their proportions
    python launch/schedule.py set runs/x code=0.3 at=+20M reason="..." 20 million tokens from now (at=2e9: in all)
    python launch/schedule.py set runs/x code=0                        remove a source
    python launch/schedule.py skip runs/x tokens=2e6                   pass over what comes next
    python launch/schedule.py add runs/x news=data/news/news share=0.1      a new source, made by launch/prepare.py

A source called at, reason or share is weights.NAME= for set and add.NAME= for add.

A run that trains finds the request in its control folder and answers after its next step; of one that does not, the log
is changed. Either way it is an event in schedule.jsonl: the run resumes with it, at any number of ranks.
"""

from __future__ import annotations

import sys

from lmtrain.pretrain.schedule_command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__ or ""))
