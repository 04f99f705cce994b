"""The console script: ``lmtrain <verb> ...`` runs the file of that name in the launch folder."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

from lmtrain import __version__, shipped
from lmtrain.errors import EXIT_DONE, EXIT_USAGE, nearest


def main(arguments: list[str] | None = None) -> int:
    """Run the verb ``arguments[0]``; its exit code is ours. Without a verb, list them."""
    arguments = sys.argv[1:] if arguments is None else arguments
    known = verbs()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, known), default=0)
        print("usage: lmtrain <verb> ...\n")
        for verb, path in known.items():
            print(f"  {verb:{width}}  {summary(path)}")
        return EXIT_DONE
    if arguments[0] == "--version":
        print(f"lmtrain {__version__}")
        return EXIT_DONE
    verb = arguments[0]
    if verb not in known:
        print(f"lmtrain: no verb {verb}{nearest(verb, known)}", file=sys.stderr)
        return EXIT_USAGE
    sys.argv = [str(known[verb]), *arguments[1:]]
    runpy.run_path(str(known[verb]), run_name="__main__")
    return EXIT_DONE


def verbs() -> dict[str, Path]:
    """Verb -> file, for every public file of the launch folder: in the wheel, or beside the package in a checkout."""
    files = sorted(shipped.folder("launch").glob("[!_]*.py"))
    return {path.stem: path for path in files}


def summary(path: Path) -> str:
    """First line of a file's docstring, read without importing it."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return docstring.splitlines()[0] if docstring else ""


if __name__ == "__main__":
    sys.exit(main())
