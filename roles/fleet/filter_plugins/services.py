"""Who may reach which service, as the hosts' firewalls and as the tailnet's policy say it.

Both read one list, `fleet_services`: by the group whose hosts serve it, the `port` (a number, a
range as text, or a list of these) and whom it is `for`: groups of hosts, `all` of them, or
`people`, who are members of the tailnet but no hosts of the fleet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PEOPLE = "people"
FLEET_TAG = "tag:fleet"


def tag(group: str) -> str:
    """The tag of a group's hosts in the tailnet; tags have no underscores."""
    return FLEET_TAG if group == "all" else f"tag:{group.replace('_', '-')}"


def ports(entry: Mapping[str, Any]) -> list[str]:
    """The ports of an entry, whether it has one or several."""
    port = entry["port"]
    several = isinstance(port, Sequence) and not isinstance(port, str)
    return [str(one) for one in (port if several else [port])]


def fleet_let_in(
    services: Mapping[str, Sequence[Mapping[str, Any]]],
    own_groups: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    addresses: Mapping[str, str],
    in_tailnet: bool,
) -> list[dict[str, Any]]:
    """What the firewall of a host in `own_groups` lets in on the fleet's interface.

    `addresses` are the hosts' by their names. In a tailnet people can't be told by their addresses:
    what is for them is let in from every member (no `from`), and its policy says more. On a plain
    network it is for nobody.
    """
    entries = []
    for group, served in services.items():
        for entry in served if group in own_groups else ():
            let_in: dict[str, Any] = {"port": ports(entry)}
            if not (in_tailnet and PEOPLE in entry["for"]):
                names = {name for asking in entry["for"] for name in groups.get(asking, ())}
                let_in["from"] = sorted(addresses[name] for name in names)
            entries.append(let_in)
    return entries


def fleet_grants(services: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The same as grants of a tailnet's policy, whose hosts have their groups' tags."""
    return [
        {
            "src": ["autogroup:member" if who == PEOPLE else tag(who) for who in entry["for"]],
            "dst": [tag(group)],
            "ip": [f"tcp:{port}" for port in ports(entry)],
        }
        for group, served in services.items()
        for entry in served
    ]


def fleet_tags(groups: Sequence[str], known: Sequence[str]) -> list[str]:
    """Tags of a host in these groups, of which those count that the fleet knows."""
    return sorted({FLEET_TAG, *(tag(group) for group in groups if group in known)})


class FilterModule:
    """Ansible's entry point."""

    def filters(self) -> dict[str, Any]:
        """The filters of this file by name."""
        return {
            "fleet_grants": fleet_grants,
            "fleet_let_in": fleet_let_in,
            "fleet_tags": fleet_tags,
        }
