"""The tables of the loss on existing logits: bandwidth beside that of a copy."""

from collections.abc import Sequence

from benchmarks.tables import Row, best_ms, by_case, error, markdown, measured, number, ours_of, ratio_to


def rows_table(rows: Sequence[Row]) -> str:
    """A table per case, with a heading if there are several: GB/s of all reads and writes, and GB/s of a copy."""
    cases = by_case(measured(rows))
    if len(cases) == 1:
        return _table(*cases.values())
    return "\n\n".join(f"### {case}\n\n{_table(group)}" for case, group in cases.items())


def _table(group: Sequence[Row]) -> str:
    ours = ours_of(group)
    lines = [
        [
            row["contender"],
            number(best_ms(row)),
            ratio_to(ours, row),
            number(bandwidth(row)),
            number(copy_bandwidth(row)),
            error(row["errors"]["gradient"]),
        ]
        for row in group
    ]
    return markdown(["", "best ms", "ours / theirs", "GB/s", "GB/s of a copy", "error of the gradient"], lines)


def bandwidth(row: Row) -> float:
    """GB/s of the loss on existing logits: by default two reads and one write of all logits."""
    return 1e-6 * float(row.get("moved_bytes", 3 * row["num_bytes"])) / best_ms(row)


def copy_bandwidth(row: Row) -> float:
    """GB/s of the copy in the same rounds."""
    return 2e-6 * float(row["num_bytes"]) / min(row["floor_ms"])
