"""Score projections against what has happened since.

Both files are CSV with a header: projections have `date,group,projection`, results have
`date,group,actual`. A projection without a result has not happened yet and is not scored.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class ProjectionsError(ValueError):
    """A projections or results file that can't be read; the message says where and why."""


@dataclass(frozen=True)
class Score:
    """How far the projections of one group were from the results, in the results' own unit.

    Attributes:
        group: name of the group.
        count: projections that have a result.
        pending: projections whose result is not known yet.
        mae: mean absolute error; None where nothing is scored.
        rmse: root mean squared error; None where nothing is scored.
        bias: mean of projection minus result, above 0 where projections are too high; or None.
    """

    group: str
    count: int
    pending: int
    mae: float | None
    rmse: float | None
    bias: float | None


def read_values(path: Path, value_column: str) -> dict[tuple[str, str], float]:
    """Return the file's values by (date, group).

    Raises:
        ProjectionsError: no such file, a column is missing, or a row is empty, not a number or
            there twice; the message names file and line.
    """
    columns = ("date", "group", value_column)
    values: dict[tuple[str, str], float] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            found = reader.fieldnames or []
            missing = [column for column in columns if column not in found]
            if missing:
                raise ProjectionsError(
                    f"{path}: no column {', '.join(missing)}; the header must have "
                    f"{', '.join(columns)}, found {', '.join(found) or 'nothing'}"
                )
            for row in reader:
                key = (row["date"], row["group"])
                where = f"{path}, line {reader.line_num}"
                if not all(key):
                    raise ProjectionsError(f"{where}: date or group is empty")
                if key in values:
                    raise ProjectionsError(f"{where}: a second value for {' '.join(key)}")
                values[key] = _parse_value(row[value_column], value_column, where)
    except OSError as error:
        raise ProjectionsError(f"{path}: can't be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ProjectionsError(f"{path}: not a CSV file in UTF-8: {error}") from error
    return values


def _parse_value(text: str | None, column: str, where: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ProjectionsError(f"{where}: {column} is {text!r}, which is not a number")
    return value


def score_groups(
    projections: dict[tuple[str, str], float], results: dict[tuple[str, str], float]
) -> list[Score]:
    """Return the score of each group that has projections, sorted by group."""
    errors: dict[str, list[float]] = {}
    pending: dict[str, int] = {}
    for (date, group), projection in projections.items():
        group_errors = errors.setdefault(group, [])
        actual = results.get((date, group))
        if actual is None:
            pending[group] = pending.get(group, 0) + 1
        else:
            group_errors.append(projection - actual)
    return [_score(group, errors[group], pending.get(group, 0)) for group in sorted(errors)]


def _score(group: str, errors: Sequence[float], pending: int) -> Score:
    if not errors:
        return Score(group, 0, pending, None, None, None)
    count = len(errors)
    return Score(
        group=group,
        count=count,
        pending=pending,
        mae=sum(abs(error) for error in errors) / count,
        rmse=math.sqrt(sum(error**2 for error in errors) / count),
        bias=sum(errors) / count,
    )
