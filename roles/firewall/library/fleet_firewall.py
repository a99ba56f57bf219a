#!/usr/bin/python
"""Load the rules of the fleet's firewall without locking anybody out.

New rules are tried first: before they are loaded, a timer is set on the host that takes them back.
Whoever loaded them then comes again over a new connection, stops the timer and keeps the rules. If
nobody comes, for the rules keep them out or the converge was interrupted, the host goes back by
itself.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: fleet_firewall
short_description: Try, confirm or remove the table inet prefect_fleet of nftables
description:
  - C(tried) compares the table in the kernel with what the file I(wanted) makes of an empty
    network namespace, so whoever changed it, and when, makes no difference. If they differ, it
    saves the table that is loaded, sets a timer that loads that again, and loads I(wanted).
  - C(confirmed) stops the timer and copies I(wanted) to I(confirmed), which I(unit) loads at boot.
    It fails if the timer was faster.
  - C(absent) removes the table, I(unit), its I(additions) to other units and the files.
options:
  state: {description: What to do., choices: [tried, confirmed, absent], required: true}
  wanted: {description: The rules., type: path, required: true}
  confirmed: {description: The rules that are loaded at boot., type: path, required: true}
  unit: {description: The unit that loads them, with its suffix., type: str, required: true}
  additions: {description: Files to remove with the unit., type: list, elements: path, default: []}
  seconds: {description: How long the timer waits., type: int, default: 60}
author: [prefect-fleet]
"""

RETURN = r"""
why:
  description: What was different from what is wanted; empty when nothing was.
  returned: always
  type: list
  elements: str
"""

TABLE = ("inet", "prefect_fleet")
GUARD = "prefect-firewall-guard"
_RUN = Path("/run/prefect-firewall")
_SAVED = _RUN / "before.nft"
_NFT = "/usr/sbin/nft"
_LIST = (_NFT, "--stateless", "list", "table", *TABLE)


def restoring(listing: str) -> str:
    """Rules that bring back a table as `nft list table` told of it, or its absence if empty.

    >>> print(restoring(""))
    add table inet prefect_fleet
    delete table inet prefect_fleet
    <BLANKLINE>
    """
    table = " ".join(TABLE)
    return f"add table {table}\ndelete table {table}\n{listing}"


class Firewall:
    """The table in the kernel, the files and the unit."""

    def __init__(self, module: AnsibleModule) -> None:
        self._module = module
        self.wanted = Path(module.params["wanted"])
        self.confirmed = Path(module.params["confirmed"])
        self.unit: str = module.params["unit"]
        self.check_mode: bool = module.check_mode

    def run(self, *argv: str) -> str:
        """What a command prints; ends the module with what it said when it fails."""
        code, out, err = self._module.run_command(list(argv))
        if code != 0:
            self._module.fail_json(msg=f"{' '.join(argv)}: {err.strip() or out.strip()}")
        return out

    def loaded(self) -> str:
        """The table in the kernel, empty if there is none."""
        code, out, _ = self._module.run_command(list(_LIST))
        return out if code == 0 else ""

    def meant(self) -> str:
        """What the wanted rules look like once the kernel has them."""
        script = f'{_NFT} -f "$0" && exec {" ".join(_LIST)}'
        return self.run("unshare", "--net", "sh", "-c", script, str(self.wanted))

    def differences(self) -> list[str]:
        """Everything that is not as wanted, in words."""
        if not (shutil.which(_NFT) and self.wanted.exists()):
            return ["the firewall is not installed"]  # only seen in a dry run
        why = []
        loaded = self.loaded()
        if not loaded:
            why.append("no rules were loaded")
        elif loaded != self.meant():
            why.append("other rules were loaded")
        if not self.confirmed.exists() or self.confirmed.read_bytes() != self.wanted.read_bytes():
            why.append(f"{self.confirmed} has other rules")
        # Additions to nftables.service are read by no start of ours. No change by itself.
        asked = ("systemctl", "show", "--value", "--property=NeedDaemonReload")
        if "yes" in self.run(*asked, self.unit, "nftables.service") and not self.check_mode:
            self.run("systemctl", "daemon-reload")
        asked = ("systemctl", "show", "--value", "--property=UnitFileState,ActiveState", self.unit)
        if sorted(self.run(*asked).split()) != ["active", "enabled"]:
            why.append(f"{self.unit} is not enabled and active")
        return why

    def guarded(self) -> bool:
        """Whether rules were loaded that nobody has confirmed yet."""
        code, _, _ = self._module.run_command(
            ["systemctl", "is-active", "--quiet", f"{GUARD}.timer"]
        )
        return code == 0

    def try_wanted(self, seconds: int) -> None:
        """Load the wanted rules for so many seconds."""
        if self.guarded():
            # What is loaded comes from a converge that was interrupted: not what to go back to.
            self.run("systemctl", "stop", f"{GUARD}.timer")
        else:
            _RUN.mkdir(mode=0o700, exist_ok=True)
            _SAVED.write_text(restoring(self.loaded()))
        self.run(
            "systemd-run", "--quiet", "--collect", f"--unit={GUARD}", f"--on-active={seconds}",
            "--timer-property=AccuracySec=100ms", "--property=DefaultDependencies=no",
            _NFT, "-f", str(_SAVED),
        )  # fmt: skip
        self.run(_NFT, "-f", str(self.wanted))

    def confirm(self, seconds: int) -> None:
        """Stop the timer and keep the rules."""
        for suffix in ("timer", "service"):  # one that is gone, or never was, cannot be stopped
            self._module.run_command(["systemctl", "stop", f"{GUARD}.{suffix}"])
        if self.guarded() or self.loaded() != self.meant():
            self._module.fail_json(
                msg=f"The new rules were not confirmed within {seconds} s, so this host took them "
                "back. ssh works with them: run the same command again, or give it more time with "
                "firewall_confirm_seconds."
            )
        new = self.confirmed.with_suffix(".new")
        shutil.copyfile(self.wanted, new)
        new.replace(self.confirmed)
        self.run("systemctl", "daemon-reload")
        self.run("systemctl", "enable", "--now", self.unit)

    def remove(self) -> bool:
        """Take everything away; says whether there was anything, and only looks in check mode."""
        unit = Path("/etc/systemd/system") / self.unit
        if not (unit.exists() or self.wanted.exists()):
            return False
        if not self.check_mode:
            self._module.run_command(["systemctl", "stop", f"{GUARD}.timer"])
            self._module.run_command(["systemctl", "disable", "--now", self.unit])
            self._module.run_command([_NFT, "destroy", "table", *TABLE])
            additions = map(Path, self._module.params["additions"])
            for path in (unit, *additions, self.wanted, self.confirmed):
                path.unlink(missing_ok=True)
            self.run("systemctl", "daemon-reload")
        return True


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"choices": ["tried", "confirmed", "absent"], "required": True},
            "wanted": {"type": "path", "required": True},
            "confirmed": {"type": "path", "required": True},
            "unit": {"type": "str", "required": True},
            "additions": {"type": "list", "elements": "path", "default": []},
            "seconds": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    state, seconds = module.params["state"], module.params["seconds"]
    firewall = Firewall(module)
    if state == "absent":
        module.exit_json(changed=firewall.remove(), why=[])
    if state == "tried":
        why = firewall.differences()
        if why and not module.check_mode:
            firewall.try_wanted(seconds)
        module.exit_json(changed=bool(why), why=why)
    if not module.check_mode:
        firewall.confirm(seconds)
    module.exit_json(changed=True, why=[])


if __name__ == "__main__":
    main()
