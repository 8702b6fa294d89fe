"""The files that results go to: CSVs that grow and resume, and the table of claims."""

import math

import pytest

from examples.smith_le_2018.claims import Claim, above, contains, insert_table, write_claims
from examples.smith_le_2018.results import Table

COLUMNS = {"seed": int, "rate": float, "accuracy": float}


def table(path):
    return Table(path / "deep" / "runs.csv", COLUMNS, ["seed", "rate"])


def test_rows_come_back_the_same(tmp_path):
    row = {"seed": 3, "rate": 0.1, "accuracy": 1 / 3}
    infinite = {"seed": 4, "rate": 1e-17, "accuracy": math.inf}
    first = table(tmp_path)
    first.append(row)
    first.append(infinite)
    again = table(tmp_path)
    assert again.rows == [row, infinite]
    assert again.find({"seed": 3, "rate": 0.1, "other": None}) == row
    assert again.find({"seed": 3, "rate": 0.2}) is None


def test_a_row_is_written_once(tmp_path):
    one = table(tmp_path)
    for _ in range(2):
        one.append({"seed": 0, "rate": 0.5, "accuracy": 0.25})
    assert one.path.read_text() == "seed,rate,accuracy\n0,0.5,0.25\n"


@pytest.mark.parametrize("torn", ["1,0.5", "1,0.5,0.", ""])
def test_a_line_that_was_cut_off_is_dropped(tmp_path, torn):
    table(tmp_path).append({"seed": 0, "rate": 0.5, "accuracy": 0.25})
    path = tmp_path / "deep" / "runs.csv"
    path.write_text(path.read_text() + torn)
    resumed = table(tmp_path)
    resumed.append({"seed": 1, "rate": 0.5, "accuracy": 0.75})
    assert [row["seed"] for row in table(tmp_path).rows] == [0, 1]


def test_who_only_reads_leaves_the_file_alone(tmp_path):
    """Another process may be in the middle of a line."""
    table(tmp_path).append({"seed": 0, "rate": 0.5, "accuracy": 0.25})
    path = tmp_path / "deep" / "runs.csv"
    text = path.read_text() + "1,0.5,0."
    path.write_text(text)
    assert len(table(tmp_path).rows) == 1
    assert path.read_text() == text


@pytest.mark.parametrize("torn", ["", "seed,ra"])
def test_a_file_that_was_cut_off_in_its_header_begins_anew(tmp_path, torn):
    path = tmp_path / "deep" / "runs.csv"
    path.parent.mkdir()
    path.write_text(torn)
    table(tmp_path).append({"seed": 0, "rate": 0.5, "accuracy": 0.25})
    assert path.read_text() == "seed,rate,accuracy\n0,0.5,0.25\n"


@pytest.mark.parametrize("line", ["1,0.5", "1,0.5,0.25,7", "1,half,0.25"])
def test_a_line_of_another_kind_is_named(tmp_path, line):
    path = tmp_path / "deep" / "runs.csv"
    path.parent.mkdir()
    path.write_text(f"seed,rate,accuracy\n0,0.5,0.25\n{line}\n")
    with pytest.raises(ValueError, match=r"Expected line 3 of .* Delete the line"):
        table(tmp_path)


def test_other_columns_are_refused(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "runs.csv").write_text("seed,accuracy\n")
    with pytest.raises(
        ValueError, match=r"columns \['seed', 'rate', 'accuracy'\], but got \['seed', 'accuracy'\]"
    ):
        table(tmp_path)


def claim(figure, estimate=0.5):
    return Claim(figure, "a claim", "a | quantity", estimate, 0.1, math.inf, "> 0", "holds")


def test_claims_of_other_figures_stay_and_order_is_kept(tmp_path):
    order = ["fig3", "fig4", "fig5"]
    write_claims(tmp_path, [claim("fig5"), claim("fig3")], order)
    path = write_claims(tmp_path, [claim("fig4"), claim("fig5", -1234.5)], order)
    rows = path.read_text().splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| fig3", "| fig4", "| fig5"]
    assert "a \\| quantity" in rows[0]
    assert "−1,234" in rows[2]


def test_table_is_put_into_a_page(tmp_path):
    page, table = tmp_path / "README.md", tmp_path / "claims.md"
    page.write_text("a\n<!-- claims: quick -->\nold\n<!-- end of claims: quick -->\nb\n")
    table.write_text("| new |\n")
    for _ in range(2):
        insert_table(page, "quick", table)
        insert_table(page, "paper", table)
    expected = "a\n<!-- claims: quick -->\n\n| new |\n\n<!-- end of claims: quick -->\nb\n"
    assert page.read_text() == expected


def test_verdicts():
    assert contains(1.0, 0.9, 1.1, 0.5, 1.5) == "holds"
    assert contains(1.0, 0.9, 0.99, 0.5, 1.5) == "does not hold"
    assert contains(1.0, -math.inf, math.inf, 0.5, 1.5) == "not resolved"
    # An interval that holds 0 as well does not say "proportional".
    assert contains(1.0, -0.1, 1.2, 0.5, 1.5) == "not resolved"
    assert [above(0.0, *ends) for ends in ((0.1, 1), (-0.1, 1), (-1, -0.1))] == [
        "holds",
        "not resolved",
        "does not hold",
    ]
