"""All organisation units of a DHIS2 server: read page by page, kept as Parquet, compared.

However many units there are, memory holds one page or one row group of them: between the server
and the file they are in a temporary SQLite database, which also finds doubles and changes.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from prefect_dhis2 import AsyncDhis2Client, Dhis2Error

RESOURCE = "organisationUnits"
FIELDS = "id,code,name,shortName,level,path,parent[id],openingDate,closedDate"
ROWS_PER_GROUP = 10_000
EXAMPLES = 10

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("code", pa.string()),
        pa.field("name", pa.string(), nullable=False),
        pa.field("short_name", pa.string()),
        pa.field("level", pa.int16(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("parent_id", pa.string()),
        pa.field("opening_date", pa.date32()),
        pa.field("closed_date", pa.date32()),
    ]
)

Uid = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9]{10}$")]


def _take_day(value: Any) -> Any:
    """DHIS2 states days as a time, such as 2000-01-01T00:00:00.000, in the server's own zone."""
    return value[:10] if isinstance(value, str) else value


Day = Annotated[date, BeforeValidator(_take_day)]


class _Reference(BaseModel):
    id: Uid


class OrganisationUnit(BaseModel):
    """One organisation unit, as DHIS2's Web API shows it."""

    id: Uid
    code: str | None = None
    name: str = Field(min_length=1)
    short_name: str | None = Field(default=None, alias="shortName")
    level: int = Field(ge=1, le=100)
    path: str
    parent: _Reference | None = None
    opening_date: Day | None = Field(default=None, alias="openingDate")
    closed_date: Day | None = Field(default=None, alias="closedDate")

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        steps = self.path.split("/")
        if steps[0] or steps[-1] != self.id:
            raise ValueError("path does not lead from / to the unit itself")
        if len(steps) - 1 != self.level:
            raise ValueError(f"level is {self.level}, but the path has {len(steps) - 1} steps")
        if self.parent and self.parent.id != steps[-2]:
            raise ValueError("the parent is not the one in the path")
        return self


class BadUnitsError(ValueError):
    """Organisation units that are not as DHIS2 defines them; the message names the first ones."""


@dataclass(frozen=True)
class Change:
    """How many units changed in one way, and the names of the first `EXAMPLES` of them."""

    count: int
    examples: list[str]


@dataclass(frozen=True)
class Faults:
    """How many units could not be used, and what is wrong with the first `EXAMPLES` of them."""

    count: int
    examples: list[str]

    def __str__(self) -> str:
        more = self.count - len(self.examples)
        return "; ".join(self.examples) + (f"; and {more} more" if more else "")


# How each kind of change is found; n is a unit now, p the same unit in the previous file.
_CHANGES = {
    "added": "SELECT n.name FROM units n LEFT JOIN previous p USING (id) WHERE p.id IS NULL",
    "removed": "SELECT p.name FROM previous p LEFT JOIN units n USING (id) WHERE n.id IS NULL",
    "renamed": (
        "SELECT p.name || ' → ' || n.name FROM units n JOIN previous p USING (id) "
        "WHERE n.name <> p.name"
    ),
    # Below a unit that moved every path is another one, but only the unit itself has moved.
    "moved": (
        "SELECT n.name FROM units n JOIN previous p USING (id) WHERE n.parent_id IS NOT p.parent_id"
    ),
}
_COLUMNS = ", ".join(SCHEMA.names)


class UnitTable:
    """Organisation units on disk, by their identifier. Use it with `with`.

    Args:
        folder: where its file is made; the caller removes it.
    """

    def __init__(self, folder: Path) -> None:
        self._database = sqlite3.connect(folder / "units.db", isolation_level=None)
        # What is in it is gone with the run anyhow.
        self._database.executescript(
            f"""
            PRAGMA journal_mode = OFF;
            PRAGMA synchronous = OFF;
            CREATE TABLE units ({_COLUMNS}, PRIMARY KEY (id)) WITHOUT ROWID;
            CREATE TABLE previous (id PRIMARY KEY, name, parent_id) WITHOUT ROWID;
            CREATE TABLE faults (id PRIMARY KEY, text) WITHOUT ROWID;
            BEGIN;
            """
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._database.close()

    def __len__(self) -> int:
        return self._count("units")

    @property
    def faults(self) -> Faults:
        """The units that were no units."""
        rows = self._database.execute("SELECT text FROM faults ORDER BY id LIMIT ?", (EXAMPLES,))
        return Faults(self._count("faults"), [text for (text,) in rows])

    def add(self, items: list[dict[str, Any]]) -> None:
        """Take the units of one page; one that is there already is replaced."""
        rows = []
        for item in items:
            try:
                rows.append(_as_row(OrganisationUnit.model_validate(item)))
            except ValidationError as error:
                self._add_fault(item, error)
        marks = ", ".join("?" * len(SCHEMA))
        self._database.executemany(f"INSERT OR REPLACE INTO units VALUES ({marks})", rows)  # noqa: S608 - marks only

    def _add_fault(self, item: dict[str, Any], error: ValidationError) -> None:
        # A unit without an identifier is told from others by what it is made of.
        uid = str(item.get("id") or json.dumps(item, sort_keys=True))
        called = f"{str(item.get('id'))[:20]} ({str(item.get('name'))[:80]})"
        reasons = ", ".join(map(_describe, error.errors()))
        self._database.execute(
            "INSERT OR REPLACE INTO faults VALUES (?, ?)", (uid, f"{called}: {reasons}")
        )

    def count_by_level(self) -> dict[str, int]:
        """Return how many units each level has, as JSON-friendly `{"1": 1, "2": 4}`."""
        rows = self._database.execute(
            "SELECT level, count(*) FROM units GROUP BY level ORDER BY level"
        )
        return {str(level): count for level, count in rows}

    def write_parquet(self, path: Path) -> None:
        """Write all units, sorted by identifier, so that the same units make the same bytes."""
        with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
            for rows in self._row_groups():
                writer.write_table(pa.Table.from_arrays(_as_arrays(rows), schema=SCHEMA))

    def _row_groups(self) -> Iterator[list[tuple[Any, ...]]]:
        query = f"SELECT {_COLUMNS} FROM units ORDER BY id"  # noqa: S608 - names of our own
        with closing(self._database.execute(query)) as cursor:
            while rows := cursor.fetchmany(ROWS_PER_GROUP):
                yield rows

    def compare(self, previous: Path) -> dict[str, Change]:
        """Return what changed since `previous`, a file of `write_parquet`, by kind of change.

        Raises:
            ValueError: it is no such file.
        """
        columns = ["id", "name", "parent_id"]
        try:
            with pq.ParquetFile(previous) as file:
                missing = set(columns) - set(file.schema_arrow.names)
                if missing:
                    raise ValueError(f"it has no column {', '.join(sorted(missing))}")
                for batch in file.iter_batches(batch_size=ROWS_PER_GROUP, columns=columns):
                    rows = zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
                    self._database.executemany(
                        "INSERT OR REPLACE INTO previous VALUES (?, ?, ?)", rows
                    )
        except (pa.ArrowException, OSError, sqlite3.Error) as error:
            raise ValueError(f"it can't be read: {error}") from error
        return {kind: self._find_change(query) for kind, query in _CHANGES.items()}

    def _find_change(self, query: str) -> Change:
        (count,) = self._database.execute(f"SELECT count(*) FROM ({query})").fetchone()  # noqa: S608
        examples = self._database.execute(f"{query} ORDER BY 1 LIMIT {EXAMPLES}")
        return Change(count, [name for (name,) in examples])

    def _count(self, table: str) -> int:
        (count,) = self._database.execute(f"SELECT count(*) FROM {table}").fetchone()  # noqa: S608
        return int(count)


async def read_units(client: AsyncDhis2Client, table: UnitTable, page_size: int) -> int:
    """Put every organisation unit of the server into `table` and return how many it says it has.

    Raises:
        Dhis2Error: no usable answer, no units at all, or fewer distinct units than the server says
            it has.
    """
    total = 0
    async for page in client.get_pages(RESOURCE, fields=FIELDS, page_size=page_size):
        table.add(page.items)
        total = page.total
    address = client.base_url.join(RESOURCE)
    if not total:
        raise Dhis2Error(f"{address}: lists no unit; does the user have any organisation unit?")
    read = len(table) + table.faults.count
    if read < total:
        raise Dhis2Error(
            f"{address}: read {read} distinct units of {total}; "
            "they changed while they were read, so run it again"
        )
    return total


def _describe(fault: Any) -> str:
    field = ".".join(map(str, fault["loc"]))
    message = fault["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" if field else message


def _as_row(unit: OrganisationUnit) -> tuple[Any, ...]:
    return (
        unit.id,
        unit.code,
        unit.name,
        unit.short_name,
        unit.level,
        unit.path,
        unit.parent.id if unit.parent else None,
        unit.opening_date.isoformat() if unit.opening_date else None,
        unit.closed_date.isoformat() if unit.closed_date else None,
    )


def _as_arrays(rows: list[tuple[Any, ...]]) -> list[pa.Array]:
    arrays = []
    for field, values in zip(SCHEMA, zip(*rows, strict=True), strict=True):
        if pa.types.is_date(field.type):
            arrays.append(pa.array(values, pa.string()).cast(field.type))
        else:
            arrays.append(pa.array(values, field.type))
    return arrays
