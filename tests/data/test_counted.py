"""Numbers in sentences."""

from lmtrain.data.counted import counted


def test_one_is_no_plural() -> None:
    said = [counted(number, "document") for number in (0, 1, 2, 12_345)]
    assert said == ["0 documents", "1 document", "2 documents", "12,345 documents"]
