"""Where a pool's zygotes find and keep their things."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Of one pool.

    Attributes:
        list: file of the release that lists modules to import beforehand.
        state: file in which a zygote notes what it has imported.
        learned: file in which it notes what runs imported besides.
        watch: more files and links that change with a release.
    """

    list: Path
    state: Path
    learned: Path
    watch: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return it as an argument."""
        paths = {"list": str(self.list), "state": str(self.state), "learned": str(self.learned)}
        return json.dumps({**paths, "watch": self.watch})

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        """Return what `to_json` was made from."""
        raw = json.loads(text)
        paths = (Path(raw[name]) for name in ("list", "state", "learned"))
        return cls(*paths, watch=tuple(raw["watch"]))
