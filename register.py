"""Names on the command line → classes. A class enters a table with the `register` decorator."""

from collections.abc import Callable

TRAINERS: dict[str, type] = {}
NETWORKS: dict[str, type] = {}


def register(table: dict[str, type], name: str) -> Callable[[type], type]:
    """Class decorator: file a class in `table` under `name`, the spelling shown to the user.

    Raises ValueError if the name, without regard to case, is taken already.
    """

    def file_under_name(cls: type) -> type:
        if name.lower() in map(str.lower, table):
            raise ValueError(f"{name!r} is registered already")
        table[name] = cls
        return cls

    return file_under_name


def canonical_name(table: dict[str, type], name: str) -> str:
    """The registered spelling of `name`, found without regard to case.

    Raises ValueError, listing the registered names, if there is none.
    """
    for known in table:
        if known.lower() == name.lower():
            return known
    raise ValueError(f"unknown name {name!r}: choose from {', '.join(table)}")
