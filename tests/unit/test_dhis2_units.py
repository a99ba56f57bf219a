"""Organisation units: reading them all, the Parquet file, and what changed."""

import asyncio
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lab.dhis2_standin import Units
from prefect_dhis2 import AsyncDhis2Client, Dhis2Credentials, Dhis2Error
from prefect_examples import organisation_units
from prefect_examples.organisation_units import SCHEMA, OrganisationUnit, UnitTable, read_units
from tests.unit.shared import DHIS2_PASSWORD, DHIS2_UNITS, DHIS2_USERNAME


@pytest.fixture
def table(tmp_path: Path) -> Iterator[UnitTable]:
    with UnitTable(tmp_path) as table:
        yield table


def fill(table: UnitTable, client: AsyncDhis2Client, page_size: int = 50) -> int:
    async def read() -> int:
        async with client:
            return await read_units(client, table, page_size)

    return asyncio.run(read())


def pages(*contents: list[dict[str, Any]], total: int) -> AsyncDhis2Client:
    """A client of a server that answers these pages."""

    def answer(request: httpx.Request) -> httpx.Response:
        number = int(request.url.params["page"])
        pager = {"page": number, "pageCount": len(contents), "total": total}
        return httpx.Response(200, json={"pager": pager, "organisationUnits": contents[number - 1]})

    return AsyncDhis2Client(transport=httpx.MockTransport(answer), base_url="https://x.org/api/")


@pytest.mark.parametrize("page_size", [1000, 50, 7])
def test_every_unit_is_written_once(dhis2: str, table, tmp_path: Path, page_size: int):
    block = Dhis2Credentials(base_url=dhis2, username=DHIS2_USERNAME, password=DHIS2_PASSWORD)
    assert fill(table, block.get_client(), page_size) == len(table) == DHIS2_UNITS
    assert table.count_by_level() == {"1": 1, "2": 4, "3": 20, "4": DHIS2_UNITS - 25}
    table.write_parquet(tmp_path / "units.parquet")
    written = pq.read_table(tmp_path / "units.parquet")
    assert written.schema.equals(SCHEMA)
    rows = {row["id"]: row for row in written.to_pylist()}
    assert list(rows) == sorted(rows)
    for unit in Units(DHIS2_UNITS):
        assert rows[unit["id"]] == {
            "id": unit["id"],
            "code": unit["code"],
            "name": unit["name"],
            "short_name": unit["shortName"],
            "level": unit["level"],
            "path": unit["path"],
            "parent_id": unit.get("parent", {}).get("id"),
            "opening_date": date(2000, 1, 1),
            "closed_date": None,
        }


def test_the_file_has_a_row_group_for_so_many_rows_and_is_the_same_for_the_same_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(organisation_units, "ROWS_PER_GROUP", 50)
    units = list(Units(DHIS2_UNITS))
    for name, order in (("a", units), ("b", units[::-1])):
        (tmp_path / name).mkdir()
        with UnitTable(tmp_path / name) as table:
            table.add(order)
            table.write_parquet(tmp_path / f"{name}.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    metadata = pq.ParquetFile(tmp_path / "a.parquet").metadata
    assert [metadata.row_group(number).num_rows for number in range(3)] == [50, 50, 23]


def test_each_page_is_on_disk_before_the_next_is_asked_for(table):
    """What keeps memory flat; benchmarks/organisation_units measures it."""
    on_disk: list[int] = []

    def answer(request: httpx.Request) -> httpx.Response:
        on_disk.append(len(table))
        start = (int(request.url.params["page"]) - 1) * 100
        body = {
            "pager": {"pageCount": 1000, "total": 100_000},
            "organisationUnits": [] if start > 400 else Units(100_000)[start : start + 100],
        }
        return httpx.Response(200, json=body)

    transport = httpx.MockTransport(answer)
    client = AsyncDhis2Client(transport=transport, base_url="https://x.org/api/")
    with pytest.raises(Dhis2Error, match="read 500 distinct units of 100000"):
        fill(table, client)
    assert on_disk[:6] == [0, 100, 200, 300, 400, 500]


def test_units_that_get_lost_between_pages_are_noticed(table):
    units = Units(2)[:]
    with pytest.raises(Dhis2Error, match="read 2 distinct units of 4; they changed while"):
        fill(table, pages(units, units, total=4))


def test_units_on_two_pages_count_once_and_the_later_one_counts(table):
    first, second = Units(2)
    assert fill(table, pages([first, second], [second | {"name": "Later"}], total=2)) == 2
    assert len(table) == 2
    assert table._database.execute("SELECT name FROM units WHERE level = 2").fetchone() == (
        "Later",
    )


def test_a_server_without_units_is_an_error(table):
    with pytest.raises(Dhis2Error, match="does the user have any organisation unit"):
        fill(table, pages([], total=0))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": ""}, "name: String should have at least 1 character"),
        ({"name": None}, "name: Input should be a valid string"),
        ({"level": 0}, "level: Input should be greater than or equal to 1"),
        ({"level": 3}, "level is 3, but the path has 2 steps"),
        ({"path": "/x"}, "path does not lead from / to the unit itself"),
        ({"path": None}, "path: Input should be a valid string"),
        ({"parent": {"id": "aaaaaaaaaaa"}}, "the parent is not the one in the path"),
        ({"parent": {}}, "parent.id: Field required"),
        ({"openingDate": "soon"}, "openingDate: Input should be a valid date"),
    ],
)
def test_a_bad_unit_is_named_and_does_not_count(table, changed: dict[str, Any], said: str):
    first, second = Units(2)
    assert fill(table, pages([first, second | changed], total=2)) == 2
    faults = table.faults
    assert (len(table), faults.count) == (1, 1)
    assert str(faults).startswith(f"{second['id']} (")
    assert said in str(faults)


def test_of_many_bad_units_the_first_are_named(table):
    units = [unit | {"level": 9} for unit in Units(30)[:]] + [{"name": "no id"}, {"id": 5}]
    assert fill(table, pages(units, total=len(units))) == 32
    assert table.faults.count == 32
    assert len(table.faults.examples) == 10
    assert str(table.faults).endswith("; and 22 more")


def test_a_day_is_a_day_whatever_the_hour():
    unit = Units(1)[0] | {"closedDate": "2020-02-29T23:00:00.000+0000"}
    assert OrganisationUnit.model_validate(unit).closed_date == date(2020, 2, 29)


def test_changes_are_found(table, tmp_path: Path):
    units = Units(40)[:]
    (tmp_path / "before").mkdir()
    with UnitTable(tmp_path / "before") as before:
        before.add(units)
        before.write_parquet(tmp_path / "before.parquet")
    table.add(units)
    nothing = table.compare(tmp_path / "before.parquet")
    assert {kind: change.count for kind, change in nothing.items()} == {
        "added": 0,
        "removed": 0,
        "renamed": 0,
        "moved": 0,
    }
    # A district goes to another region: its facilities get another path and have not moved.
    districts = [unit for unit in units if unit["level"] == 3]
    regions = [unit for unit in units if unit["level"] == 2]
    district = districts[0]
    (region,) = (r for r in regions[:2] if r["id"] != district["parent"]["id"])
    moved = district | {
        "parent": region,
        "path": f"{region['path']}/{district['id']}",
    }
    changed = []
    for unit in units[:-1]:
        if unit is district:
            changed.append(moved)
        elif unit["path"].startswith(f"{district['path']}/"):
            changed.append(unit | {"path": f"{moved['path']}/{unit['id']}"})
        elif unit is units[30]:
            changed.append(unit | {"name": "Other"})
        else:
            changed.append(unit)
    changed += Units(60)[40:]
    (tmp_path / "after").mkdir()
    with UnitTable(tmp_path / "after") as after:
        after.add(changed)
        assert after.faults.count == 0
        found = after.compare(tmp_path / "before.parquet")
    counts = {kind: change.count for kind, change in found.items()}
    assert counts == {"added": 20, "removed": 1, "renamed": 1, "moved": 1}
    assert found["removed"].examples == [units[-1]["name"]]
    assert found["renamed"].examples == [f"{units[30]['name']} → Other"]
    assert found["moved"].examples == [district["name"]]
    assert len(found["added"].examples) == 10
    assert json.dumps(counts)


def test_a_previous_file_of_another_kind_is_said(table, tmp_path: Path):
    table.add(Units(3)[:])
    path = tmp_path / "previous.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="it can't be read: "):
        table.compare(path)
    pq.write_table(pa.table({"id": ["x"], "other": [1]}), path)
    with pytest.raises(ValueError, match="it has no column name, parent_id"):
        table.compare(path)
