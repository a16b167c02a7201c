"""Where this machine's apt fetches Debian from; the repository names no mirror."""

from pathlib import Path

SOURCES = Path("/etc/apt")


def uris(sources: Path = SOURCES) -> list[str]:
    """Every archive URI of the machine's apt sources, in order, without the security archive."""
    found: list[str] = []
    for path in [sources / "sources.list", *sorted((sources / "sources.list.d").glob("*"))]:
        if not path.is_file():
            continue
        if path.suffix == ".sources":
            found += _deb822(path.read_text())
        elif path.suffix == ".list":
            found += _one_line(path.read_text())
    return list(dict.fromkeys(found))


def debian(sources: Path = SOURCES) -> str:
    """The machine's Debian mirror.

    Raises LookupError when apt knows none. Third parties have archives of their own beside Debian's; by custom a mirror
    of Debian itself has a path that ends in "debian".
    """
    for uri in uris(sources):
        if uri.rstrip("/").rsplit("/", 1)[-1] == "debian":
            return uri
    raise LookupError(f"no Debian mirror in {sources}")


def _deb822(text: str) -> list[str]:
    found = []
    for stanza in text.split("\n\n"):
        fields: dict[str, str] = {}
        key = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace():
                fields[key] = fields.get(key, "") + " " + line.strip()
            elif ":" in line:
                key, value = line.split(":", 1)
                key = key.strip().lower()
                fields[key] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        if all(suite.endswith("-security") for suite in fields.get("suites", "").split()):
            continue
        found += fields.get("uris", "").split()
    return found


def _one_line(text: str) -> list[str]:
    found = []
    for line in text.splitlines():
        words = line.split("#")[0].split()
        if not words or words[0] != "deb":
            continue
        rest = words[1:]
        if rest and rest[0].startswith("["):
            while rest and not rest[0].endswith("]"):
                rest = rest[1:]
            rest = rest[1:]
        if len(rest) >= 2 and not rest[1].endswith("-security"):
            found.append(rest[0])
    return found
