from tapeline.table import text_table


def test_columns_are_aligned() -> None:
    lines = text_table(("name", "bytes"), [("a", "1"), ("longer", "1000")]).splitlines()
    assert lines == ["name    bytes", "------  -----", "a           1", "longer   1000"]
