"""One HTML page that explains a run: curves, samples, experts, attention, attempts, settings.

    python launch/report.py runs/demo                      writes runs/demo/report.html
    python launch/report.py runs/demo out=/tmp/demo.html

The page is a single file that opens offline: no scripts, nothing loaded from elsewhere. What a run does not have is
left out. The attention pictures need the run's newest checkpoint, its tokenizer and, better, its held-out text.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from lmtrain.errors import EXIT_DONE, LmtrainError, UsageError, nearest
from lmtrain.pipe import ends_with_its_reader


def main(argv: list[str]) -> int:
    """Run the command line ``argv``; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        if not argv or {"--help", "-h", "help"} & set(argv):
            print((__doc__ or "").rstrip())
            return EXIT_DONE
        run_dir, out = parse(argv)
        from lmtrain.report.page import write_report  # imports the whole product

        print(write_report(run_dir, out))
    except LmtrainError as error:
        print(f"report: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


def parse(argv: list[str]) -> tuple[Path, Path | None]:
    """The run's folder, and where to write if that is said. Raises UsageError."""
    runs: list[str] = []
    out = None
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or Path(argument).exists():
            if argument.startswith("-"):
                raise UsageError(f"{argument}: unknown option; --help shows the two there are")
            runs.append(argument)
        elif key != "out":
            raise UsageError(f"{key}: unknown key{nearest(key, ['out'])}")
        elif not value:
            raise UsageError("out: expected a path, got nothing")
        else:
            out = Path(value)
    if len(runs) != 1:
        raise UsageError(f"expected one run folder, got {len(runs)}: {', '.join(runs) or 'none'}; --help shows how")
    return Path(runs[0]), out


if __name__ == "__main__":
    with ends_with_its_reader():
        code = main(sys.argv[1:])
    sys.exit(code)
