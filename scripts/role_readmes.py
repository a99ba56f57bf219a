"""Write the tables of inputs into the roles' READMEs: `python scripts/role_readmes.py [--check]`.

They are made of meta/argument_specs.yml and defaults/ of each role, and stand between two marks in
roles/<role>/README.md; what stands around them is written by hand. A role that has no README gets
one.

    --check   write nothing; name the files that are not up to date

Exit status: 0 all are up to date (now), 1 some are not, or a README lacks the marks, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- Written by `make docs` from meta/argument_specs.yml and defaults/. -->"
END = "<!-- End of what `make docs` writes. -->"
_SHORT = 60  # characters of a default that are shown in a table
_NAME = re.compile(r"\{\{ ([a-z0-9_]+) \}\}")
_NEW = """# Role `{role}`

{description}

## Inputs

{begin}
{end}
"""


class ReadmeError(Exception):
    """A README that the tables have no place in; the text says which, and what to write."""


def read_defaults(role: Path) -> dict[str, Any]:
    """The values of a role's defaults, templates as their text."""
    found: dict[str, Any] = {}
    for path in sorted((role / "defaults").rglob("*.yml")):
        found |= yaml.safe_load(path.read_text()) or {}
    return found


def code(text: str) -> str:
    """Text as code in a cell of a Markdown table."""
    return f"`{text}`".replace("|", "\\|")


def describe_type(attributes: dict[str, Any]) -> str:
    """The type of an option, such as `list of str`, and whether it is a secret."""
    kind = attributes["type"]
    if attributes.get("elements", "raw") != "raw":
        kind += f" of {attributes['elements']}"
    if "choices" in attributes:
        kind += f": {', '.join(code(str(choice)) for choice in attributes['choices'])}"
    return f"{kind}, secret" if attributes.get("no_log") else kind


def describe_default(value: Any) -> str:
    """A default in few characters: itself, the one variable that it is, or where to read it."""
    if isinstance(value, str):
        text = " ".join(value.split())
        if match := _NAME.fullmatch(text):
            return code(match[1])
        if not text:
            return "empty"
    else:
        text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
        text = text.removesuffix("\n").removesuffix("\n...")
    return code(text) if len(text) <= _SHORT else "see [defaults](defaults/)"


def rows(
    options: dict[str, dict[str, Any]], defaults: dict[str, Any], prefix: str = ""
) -> Iterator[str]:
    """A line of the table for each option and for each of those below it."""
    for name, attributes in options.items():
        default = "none"
        if attributes.get("required"):
            default = "**required**"
        elif name in defaults and not prefix:
            default = describe_default(defaults[name])
        description = attributes["description"].replace("|", "\\|")
        yield f"| `{prefix}{name}` | {describe_type(attributes)} | {default} | {description} |"
        below = f"{prefix}{name}[]." if attributes["type"] == "list" else f"{prefix}{name}."
        yield from rows(attributes.get("options", {}), {}, below)


def render(role: Path) -> str:
    """The tables of a role, one for each entry point; an option stands in the first that has it."""
    specs = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]
    defaults = read_defaults(role)
    parts: list[str] = []
    shown: set[str] = set()
    for name, entry in specs.items():
        new = {key: value for key, value in entry["options"].items() if key not in shown}
        again = [code(key) for key in entry["options"] if key in shown]
        shown |= set(new)
        if len(specs) > 1:
            runs = f"`{name}`: " if (role / f"tasks/{name}.yml").exists() else ""
            parts.append(f"### {runs}{entry['short_description']}")
        if new:
            table = ["| variable | type | default | meaning |", "|---|---|---|---|"]
            parts.append("\n".join([*table, *rows(new, defaults)]))
        if again:
            parts.append(f"{'And' if new else 'It reads'} {', '.join(again)}, see above.")
    return "\n\n".join(parts)


def update(role: Path) -> tuple[Path, str]:
    """A role's README, and the text that it should have.

    Raises:
        ReadmeError: it has not exactly one place for the tables.
    """
    path = role / "README.md"
    if path.exists():
        text = path.read_text()
    else:
        meta = yaml.safe_load((role / "meta/main.yml").read_text())["galaxy_info"]
        text = _NEW.format(role=role.name, description=meta["description"], begin=BEGIN, end=END)
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ReadmeError(f"{path} needs these two lines, each once:\n{BEGIN}\n{END}")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return path, f"{before}{BEGIN}\n\n{render(role)}\n\n{END}{after}"


def main(arguments: list[str] | None = None, roles: Path = PROJECT / "roles") -> int:
    """Write what is not up to date, or only name it."""
    parser = argparse.ArgumentParser(prog="role_readmes.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(arguments).check
    status = 0
    for role in sorted(path.parent.parent for path in roles.glob("*/meta/argument_specs.yml")):
        try:
            path, text = update(role)
        except ReadmeError as error:
            print(f"role_readmes: {error}", file=sys.stderr)
            status = 1
            continue
        if path.exists() and path.read_text() == text:
            continue
        if check:
            print(f"role_readmes: {path} is not up to date; run: make docs", file=sys.stderr)
            status = 1
        else:
            path.write_text(text)
            print(path)
    return status


if __name__ == "__main__":
    sys.exit(main())
