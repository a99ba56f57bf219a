"""Score projections against what has happened since.

Both files are tables, in CSV (UTF-8, commas, a header) or in Parquet:

| file | columns |
| --- | --- |
| projections | `date`, `group`, `projection` and, where there are such, `probability` |
| results | `date`, `group`, `actual` and, where there are probabilities, `outcome` |

`date` is an ISO 8601 date or time (without an offset it is UTC), `projection` and `actual` are
numbers in one unit. `probability` (0 to 1) is how likely an event was thought to be, `outcome` is 1
where the event came about and 0 where it didn't; both may be empty. Date and group together stand
once in a file. A projection without a result has not happened yet and is not scored.
"""

import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import pyarrow
import pyarrow.parquet

PARQUET_MAGIC = b"PAR1"
Key = tuple[datetime, str]


class ProjectionsError(ValueError):
    """A projections or results file that is of no use; the message says where, why and the fix."""


@dataclass(frozen=True)
class Projection:
    """What was expected of a date and group.

    Attributes:
        value: the projection, in the results' unit.
        probability: of the event, 0 to 1; None where none is given.
    """

    value: float
    probability: float | None = None


@dataclass(frozen=True)
class Result:
    """What came of a date and group.

    Attributes:
        value: the result.
        outcome: whether the event came about, 1 or 0; None where it isn't known.
    """

    value: float
    outcome: float | None = None


@dataclass(frozen=True)
class Score:
    """How good the projections of one group were; mae, rmse and bias are in the results' unit.

    Attributes:
        group: name of the group.
        count: projections that have a result.
        pending: projections whose result is not known yet.
        mae: mean absolute error; None where nothing is scored.
        rmse: root mean squared error; None where nothing is scored.
        bias: mean of projection minus result, above 0 where projections are too high; or None.
        brier: mean squared difference of probability and outcome, 0 (certain and right) to
            1 (certain and wrong); None where no pair of the two is known.
        drift: bias divided by the mean absolute result, 0.1 where projections are 10 % too high;
            over the newest results only where `score_groups` is given a window. Infinite where
            all of those results are 0 and the bias isn't; None where nothing is scored.
    """

    group: str
    count: int
    pending: int
    mae: float | None = None
    rmse: float | None = None
    bias: float | None = None
    brier: float | None = None
    drift: float | None = None

    def drifts(self, threshold: float) -> bool:
        """Whether drift is further from 0 than the threshold."""
        return self.drift is not None and abs(self.drift) > threshold


def read_projections(content: bytes, name: str) -> dict[Key, Projection]:
    """Return the projections that a file holds; `name` is what messages call the file.

    Raises:
        ProjectionsError: the content is no table, has no rows, lacks a column or has one more, or
            a row has an empty or impossible cell or is there twice.
    """
    rows = _read_rows(content, name, "projection", "probability")
    return {
        key: Projection(
            _number(row["projection"], "projection", where),
            _fraction(row.get("probability", ""), where),
        )
        for key, row, where in rows
    }


def read_results(content: bytes, name: str) -> dict[Key, Result]:
    """Return the results that a file holds; see `read_projections`."""
    rows = _read_rows(content, name, "actual", "outcome")
    return {
        key: Result(
            _number(row["actual"], "actual", where), _outcome(row.get("outcome", ""), where)
        )
        for key, row, where in rows
    }


def _read_rows(
    content: bytes, name: str, value_column: str, optional_column: str
) -> Iterator[tuple[Key, dict[str, str], str]]:
    """Yield each row with its key and where it stands."""
    if not content.strip():
        raise ProjectionsError(f"{name}: is empty; write a header, date,group,{value_column} …")
    table = _read_parquet if content.startswith(PARQUET_MAGIC) else _read_csv
    needed = ("date", "group", value_column)
    first: dict[Key, str] = {}
    for row, place in table(content, name, lambda header: _check(header, needed, optional_column)):
        where = f"{name}, {place}"
        if not row["group"]:
            raise ProjectionsError(f"{where}: group is empty; write the name of a group")
        key = (_date(row["date"], where), row["group"])
        if key in first:
            raise ProjectionsError(
                f"{where}: a second row for date {row['date']} and group {row['group']}; "
                f"{first[key]} is the first; remove one of them"
            )
        first[key] = place
        yield key, row, where
    if not first:
        raise ProjectionsError(f"{name}: has no rows; write one for each date and group")


def _check(header: Sequence[str], needed: Sequence[str], optional: str) -> str | None:
    """Return what is wrong with the header."""
    found = f"found {', '.join(header) or 'nothing'}"
    if missing := [column for column in needed if column not in header]:
        columns = ", ".join(needed)
        return f"no column {', '.join(missing)}; write {columns} (separated by commas), {found}"
    if repeated := sorted({column for column in header if header.count(column) > 1}):
        return f"column {', '.join(repeated)} stands twice; remove one of them, {found}"
    if unknown := [column for column in header if column not in (*needed, optional)]:
        columns = ", ".join((*needed, optional))
        return (
            f"column {', '.join(map(repr, unknown))} is not known; "
            f"rename or remove it, the known ones are {columns}"
        )
    return None


def _read_csv(
    content: bytes, name: str, check: Callable[[Sequence[str]], str | None]
) -> Iterator[tuple[dict[str, str], str]]:
    try:
        text = content.decode("utf-8-sig")
        # A quote that is never closed would otherwise swallow the rest of the file in silence.
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = [cell.strip() for cell in next(reader, [])]
        if problem := check(header):
            raise ProjectionsError(f"{name}, line 1: {problem}")
        for cells in reader:
            place = f"line {reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise ProjectionsError(
                    f"{name}, {place}: {len(cells)} cells where the header has {len(header)}; "
                    "write a comma between cells, and a dot in numbers"
                )
            yield dict(zip(header, (cell.strip() for cell in cells), strict=True)), place
    except (UnicodeDecodeError, csv.Error) as error:
        raise ProjectionsError(
            f"{name}: not a CSV file in UTF-8 ({error}); save it as one, or as Parquet"
        ) from error


def _read_parquet(
    content: bytes, name: str, check: Callable[[Sequence[str]], str | None]
) -> Iterator[tuple[dict[str, str], str]]:
    try:
        with pyarrow.parquet.ParquetFile(io.BytesIO(content)) as file:
            header = file.schema_arrow.names
            rows = file.read().to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ProjectionsError(
            f"{name}: not a Parquet file that can be read ({error}); write it anew"
        ) from error
    if problem := check(header):
        raise ProjectionsError(f"{name}: {problem}")
    for number, row in enumerate(rows, start=1):
        yield {column: _cell(value) for column, value in row.items()}, f"row {number}"


def _cell(value: Any) -> str:
    """Return a typed cell as it would stand in CSV."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return value.isoformat() if isinstance(value, date) else str(value).strip()


def _date(text: str, where: str) -> datetime:
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        raise ProjectionsError(
            f"{where}: date is {text!r}; write an ISO 8601 date, for example 2026-01-31"
        ) from None
    return read.replace(tzinfo=UTC) if read.tzinfo is None else read.astimezone(UTC)


def _number(text: str, column: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ProjectionsError(
            f"{where}: {column} is {text!r}, which is not a number; write for example 3.5"
        )
    return value


def _fraction(text: str, where: str) -> float | None:
    if not text:
        return None
    value = _number(text, "probability", where)
    if not 0 <= value <= 1:
        raise ProjectionsError(
            f"{where}: probability is {text!r}; write a number from 0 to 1, 0.25 for 25 %"
        )
    return value


def _outcome(text: str, where: str) -> float | None:
    if not text:
        return None
    value = _number(text, "outcome", where)
    if value not in (0, 1):
        raise ProjectionsError(
            f"{where}: outcome is {text!r}; write 1 if the event came about, 0 if it didn't"
        )
    return value


def score_groups(
    projections: Mapping[Key, Projection], results: Mapping[Key, Result], window: int | None = None
) -> list[Score]:
    """Return the score of each group that has projections, sorted by group.

    Args:
        projections: by date and group.
        results: likewise; those without a projection are passed over.
        window: how many of a group's newest results count for its drift; None for all.
    """
    pairs: dict[str, list[tuple[Projection, Result]]] = {}
    pending: dict[str, int] = {}
    for key in sorted(projections):
        group_pairs = pairs.setdefault(key[1], [])
        if key in results:
            group_pairs.append((projections[key], results[key]))
        else:
            pending[key[1]] = pending.get(key[1], 0) + 1
    return [_score(group, pairs[group], pending.get(group, 0), window) for group in sorted(pairs)]


def _score(
    group: str, pairs: Sequence[tuple[Projection, Result]], pending: int, window: int | None
) -> Score:
    """Return the score of pairs that are in the order of their dates."""
    if not pairs:
        return Score(group, 0, pending)
    errors = [projection.value - result.value for projection, result in pairs]
    newest = slice(-window if window else None, None)
    return Score(
        group=group,
        count=len(pairs),
        pending=pending,
        mae=_mean(map(abs, errors)),
        rmse=math.sqrt(_mean(error**2 for error in errors)),
        bias=_mean(errors),
        brier=_brier(pairs),
        drift=_drift(errors[newest], [result.value for _, result in pairs[newest]]),
    )


def _brier(pairs: Iterable[tuple[Projection, Result]]) -> float | None:
    squares = [
        (projection.probability - result.outcome) ** 2
        for projection, result in pairs
        if projection.probability is not None and result.outcome is not None
    ]
    return _mean(squares) if squares else None


def _drift(errors: Sequence[float], actuals: Sequence[float]) -> float:
    bias, level = _mean(errors), _mean(map(abs, actuals))
    if level:
        return bias / level
    return math.copysign(math.inf, bias) if bias else 0.0


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)
