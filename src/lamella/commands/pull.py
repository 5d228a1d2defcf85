"""Download zoo models and texts into the cache."""

from __future__ import annotations

from lamella.registry import command
from lamella.result import Evidence, Summary, Table
from lamella.results import Study
from lamella.zoo import ZOO
from lamella.zoo import pull as fetch
from lamella.zoo.pull import LICENCE


class Pulled(Study):
    """The contents of the zoo, or the folder of one of its entries."""

    kind = "pulled"
    writes = False

    @classmethod
    def summary(cls, evidence: Evidence) -> Summary:
        """Summarise the zoo in a table, or name the folder."""
        found = evidence.findings
        if "folder" in found:
            return Summary(f"{found['name']} is in {found['folder']}")
        rows = [list(each.values()) for each in found["zoo"]]
        return Summary("", [Table("The zoo", ["name", "kind", "download", "description"], rows)])


@command("pull", verb="pull", on="any")
def pull(name: str | None = None) -> Pulled:
    """Download a zoo model or text into the cache, once.

    The cache is ~/.cache/lamella; set LAMELLA_CACHE to move it.

    Example: lamella pull smollm2

    Args:
        name: name of the entry; if omitted, all entries are listed.

    Returns:
        The folder, or the list.

    Raises:
        DownloadError: for an unknown name, or if the download fails.
    """
    if name is None:
        rows = [
            {"name": each.name, "kind": each.kind, "download": f"{each.download} MB", "description": each.description}
            for each in ZOO.values()
        ]
        return Pulled(findings={"zoo": rows})
    folder, notice = fetch(name), ZOO[name].notice
    return Pulled(
        findings={"name": name, "folder": str(folder)},
        notes=[f"{notice} (a copy: {folder / LICENCE})"] if notice else [],
    )
