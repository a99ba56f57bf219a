"""Each role's argument specs, held against its defaults and against what its files read."""

import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

from tests.unit.shared import REPOSITORY, load_by_path

readmes = load_by_path("scripts/role_readmes.py")

ROLES = sorted(path.name for path in (REPOSITORY / "roles").iterdir())
# Entry points that no tasks belong to: they describe inputs, and nothing is run for them.
DESCRIBED_ONLY = {
    ("fleet", "inputs"),
    ("fleet", "secrets"),
    ("fleet", "wiring"),
    ("prefect_deploy", "main"),
}
# Their literal defaults are pages long: the specs say in which file they stand.
ELSEWHERE = ("fleet_artifacts", "fleet_sandbox")
SECRET = re.compile(
    r"_(password|secret|key|token)$|_(auth_string|database_url|dhis2_servers|previous_secrets)$"
)
_IDENTIFIER = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)+")
_EXPRESSIONS = {"when", "until", "that", "changed_when", "failed_when", "var"}
# What playbooks set for role `fleet` with set_fact.
PUBLISHED = {"fleet_found_artifacts", "fleet_packed_release"}
_TEMPLATES = jinja2.Environment()
_GAP = re.compile(r"\{\{.*?\}\}")
_TEMPLATE_NAME = re.compile(r"'([^' ]+\.j2)'")


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@cache
def defaults(role: str) -> dict[str, Any]:
    """The variables of a role's defaults."""
    found: dict[str, Any] = {}
    folder = REPOSITORY / "roles" / role / "defaults"
    for path in sorted(folder.rglob("*.yml")):
        found |= read_yaml(path) or {}
    return found


@cache
def entry_points(role: str) -> dict[str, dict[str, Any]]:
    """A role's argument specs by entry point."""
    return read_yaml(REPOSITORY / "roles" / role / "meta/argument_specs.yml")["argument_specs"]


@cache
def options(role: str) -> dict[str, dict[str, Any]]:
    """The options of all entry points of a role; one that stands in several is the same in each."""
    merged: dict[str, dict[str, Any]] = {}
    for name, entry in entry_points(role).items():
        for option, attributes in entry["options"].items():
            assert merged.setdefault(option, attributes) == attributes, (role, name, option)
    return merged


def all_options(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Options with those below them, by name."""
    for name, attributes in found.items():
        yield name, attributes
        yield from all_options(attributes.get("options", {}))


def owner(name: str) -> str | None:
    """The role whose variable this is by its name: the longest one that it begins with."""
    return max(
        (role for role in ROLES if name.removeprefix("__").startswith(f"{role}_")),
        key=len,
        default=None,
    )


def has_template(value: Any) -> bool:
    """Whether there is a template anywhere in a value."""
    return "{{" in str(value) or "{%" in str(value)


def texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All text of a YAML value, each with the key below which it stands."""
    if isinstance(value, dict):
        for name, below in value.items():
            yield from texts(below, name)
    elif isinstance(value, list):
        for below in value:
            yield from texts(below, key)
    elif isinstance(value, str):
        yield key, value


def names_in(template: str) -> set[str]:
    """What a template reads by name: variables, and constants as in `hostvars[host]['name']`."""
    tree = _TEMPLATES.parse(template)
    names = {node.name for node in tree.find_all(jinja2.nodes.Name) if node.ctx == "load"}
    names |= {str(node.value) for node in tree.find_all(jinja2.nodes.Const)}
    return {name for name in names if _IDENTIFIER.fullmatch(name.removeprefix("__"))}


def names_read(path: Path) -> set[str]:
    """What a file of tasks, variables or a template reads by name."""
    if path.suffix == ".j2":
        return names_in(path.read_text())
    names = set()
    for key, text in texts(read_yaml(path)):
        if key in _EXPRESSIONS and not has_template(text):
            text = "{{ " + text + " }}"
        names |= names_in(text)
    return names


def files_of(role: str, *folders: str) -> list[Path]:
    return [
        path
        for folder in folders
        for path in sorted((REPOSITORY / "roles" / role / folder).rglob("*"))
        if path.is_file()
    ]


def read_by(role: str, file: str) -> set[str]:
    """What an entry point reads: its tasks, what they include, their templates and the role's own
    private variables."""
    folder = REPOSITORY / "roles" / role
    path = folder / "tasks" / file
    names = names_read(path)
    for key, text in texts(read_yaml(path)):
        if key in ("ansible.builtin.include_tasks", "ansible.builtin.import_tasks", "file"):
            for included in (folder / "tasks").glob(_GAP.sub("*", text)):
                names |= read_by(role, included.name) if included != path else set()
        elif key == "template" and text.endswith(".j2"):
            names |= names_read(folder / "templates" / text)
    private = read_yaml(folder / "vars/main.yml") if (folder / "vars/main.yml").exists() else {}
    while (
        more := {
            name
            for used in names & set(private)
            for _, text in texts(private[used])
            for name in names_in(text).union(
                *(names_read(folder / "templates" / file) for file in _TEMPLATE_NAME.findall(text))
            )
        }
        - names
    ):
        names |= more
    return names


def uses_of_roles() -> Iterator[tuple[str, str]]:
    """Each role and entry point that a playbook or another role runs."""
    for path in [
        *(REPOSITORY / "playbooks").glob("*.yml"),
        *(REPOSITORY / "molecule").rglob("*.yml"),
        *(REPOSITORY / "roles").glob("*/tasks/*.yml"),
    ]:
        yield from _uses(read_yaml(path))


def _uses(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, list):
        for entry in value:
            yield from _uses(entry)
    if not isinstance(value, dict):
        return
    for key, below in value.items():
        if key in ("ansible.builtin.import_role", "ansible.builtin.include_role"):
            yield below["name"], below.get("tasks_from", "main").removesuffix(".yml")
        elif key == "roles":
            for role in below:
                yield (role if isinstance(role, str) else role["role"]), "main"
        yield from _uses(below)


@pytest.mark.parametrize("role", ROLES)
def test_specs_and_defaults_name_the_same_variables(role: str):
    specified = options(role)
    required = {name for name, attributes in specified.items() if attributes.get("required")}
    assert set(specified) - required == set(defaults(role))
    assert not required & set(defaults(role))
    assert {name for name in specified if owner(name) != role} == set()


@pytest.mark.parametrize("role", ROLES)
def test_specs_and_defaults_have_the_same_values(role: str):
    specified = {
        name: attributes["default"]
        for name, attributes in options(role).items()
        if "default" in attributes
    }
    # What a template makes is described in words, see the next test.
    literal = {name: value for name, value in defaults(role).items() if not has_template(value)}
    for name in ELSEWHERE:
        literal.pop(name, None)
    assert specified == literal


@pytest.mark.parametrize("role", ROLES)
def test_no_spec_holds_a_template(role: str):
    """Ansible fills them in: a failed check would show a default's secret, or stumble over it."""
    assert not has_template(entry_points(role))


@pytest.mark.parametrize("role", ROLES)
def test_defaults_pass_their_own_specs(role: str):
    literal = {name: value for name, value in defaults(role).items() if not has_template(value)}
    known = {name: attributes for name, attributes in options(role).items() if name in literal}
    assert ArgumentSpecValidator(known).validate(literal).error_messages == []


@pytest.mark.parametrize("role", ROLES)
def test_each_option_has_a_type_and_a_sentence(role: str):
    for entry in entry_points(role).values():
        assert entry["short_description"]
        assert not entry["short_description"].endswith(".")
        for name, attributes in all_options(entry["options"]):
            assert attributes["description"].endswith("."), name
            assert "type" in attributes, name
            assert (attributes["type"] == "list") == ("elements" in attributes), name


@pytest.mark.parametrize("role", ROLES)
def test_secrets_are_marked_as_such(role: str):
    for name, attributes in all_options(options(role)):
        assert attributes.get("no_log", False) == bool(SECRET.search(f"_{name}")), name


@pytest.mark.parametrize("role", ROLES)
def test_entry_points_are_those_that_are_run(role: str):
    described = {(role, name) for name in entry_points(role)} - DESCRIBED_ONLY
    run = {use for use in uses_of_roles() if use[0] == role} - {("fleet", "main")}
    assert described == run
    for _, name in described:
        assert (REPOSITORY / f"roles/{role}/tasks/{name}.yml").exists()


@pytest.mark.parametrize("role", ROLES)
def test_an_entry_point_specifies_what_it_reads(role: str):
    for name, entry in entry_points(role).items():
        if (role, name) not in DESCRIBED_ONLY:
            public = read_by(role, f"{name}.yml") & set(defaults(role))
            assert public == set(entry["options"]), name


@pytest.mark.parametrize("role", ROLES)
def test_tasks_and_templates_read_their_own_role_only(role: str):
    for path in files_of(role, "tasks", "handlers", "templates", "vars"):
        for name in names_read(path) - set(ROLES):
            if owner(name) not in (None, role):
                pytest.fail(f"{path.relative_to(REPOSITORY)} reads {name} of another role")
            if owner(name) == role and not name.startswith("__"):
                assert name in defaults(role), f"{path.relative_to(REPOSITORY)} reads {name}"


@pytest.mark.parametrize("role", ROLES)
def test_defaults_read_their_own_role_and_fleet_only(role: str):
    for path in files_of(role, "defaults"):
        for name in names_read(path) - set(ROLES):
            assert owner(name) in (None, role, "fleet"), f"{role}'s defaults read {name}"
            if owner(name):
                known = {**defaults(owner(name)), **options(owner(name))}
                assert name in known or name in PUBLISHED, f"{role}'s defaults read {name}"


@pytest.mark.parametrize("role", ROLES)
def test_the_readme_has_the_inputs_of_today(role: str):
    path, text = readmes.update(REPOSITORY / "roles" / role)
    assert path.exists(), "run: make docs"
    assert path.read_text() == text, "run: make docs"


@pytest.mark.parametrize("role", ROLES)
def test_the_example_is_a_play_that_the_role_takes(role: str):
    """Its variables are the role's own and pass the specs; what is secret comes as a template."""
    readme = (REPOSITORY / "roles" / role / "README.md").read_text()
    plays = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)]
    assert plays
    assert role in {used for play in plays for used, _ in _uses(play)}
    given = dict(variables_in(plays))
    assert {name for name in given if owner(name) != role} == set()
    assert set(given) <= set(options(role))
    validator = ArgumentSpecValidator({name: options(role)[name] for name in given})
    assert validator.validate(given).error_messages == []


def variables_in(value: Any) -> Iterator[tuple[str, Any]]:
    """The variables that a play sets, for a role, an import or itself."""
    if isinstance(value, list):
        for entry in value:
            yield from variables_in(entry)
    elif isinstance(value, dict):
        for key, below in value.items():
            if owner(key) and isinstance(key, str):
                yield key, below
            else:
                yield from variables_in(below)


def role_copy(folder: Path, role: str = "base") -> Path:
    copy = folder / "roles" / role
    shutil.copytree(REPOSITORY / "roles" / role, copy)
    return copy


def test_what_is_out_of_date_is_named_then_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    role = role_copy(tmp_path)
    readme = role / "README.md"
    before = readme.read_text()
    assert readmes.main(["--check"], role.parent) == 0
    specs = role / "meta/argument_specs.yml"
    specs.write_text(specs.read_text().replace("counts as fresh.", "is | fresh."))
    assert readmes.main(["--check"], role.parent) == 1
    assert "make docs" in capsys.readouterr().err
    assert readme.read_text() == before
    assert readmes.main([], role.parent) == 0
    assert "is \\| fresh." in readme.read_text()
    assert readmes.main(["--check"], role.parent) == 0


def test_a_role_without_a_readme_gets_one_and_marks_are_insisted_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    role = role_copy(tmp_path)
    (role / "README.md").unlink()
    assert readmes.main([], role.parent) == 0
    assert "| `base_packages` | list of str |" in (role / "README.md").read_text()
    (role / "README.md").write_text("# By hand\n")
    assert readmes.main([], role.parent) == 1
    assert readmes.BEGIN in capsys.readouterr().err
    assert (role / "README.md").read_text() == "# By hand\n"


def test_each_role_is_linked_from_the_page_of_the_inventory():
    page = (REPOSITORY / "docs/inventory.md").read_text()
    assert [role for role in ROLES if f"(../roles/{role}/README.md)" not in page] == []
