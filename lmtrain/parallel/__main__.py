"""``python -m lmtrain.parallel``: which combinations of settings work, as a Markdown table."""

from lmtrain.parallel.supported import table

if __name__ == "__main__":
    print(table())
