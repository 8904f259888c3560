"""Reading reference answers. Outside `ttrl.evaluate` only `ttrl.setup` imports it, for the `gold` control."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ttrl.errors import ConfigError
from ttrl.evaluate.seal import reading_labels
from ttrl.prompts import read_rows


def read_labels(
    path: str, prompt_ids: Iterable[str], *, id_field: str = "id", answer_field: str = "answer"
) -> Mapping[str, str]:
    """id -> reference answer, for the prompts given; labels of other prompts are ignored.

    Raises ConfigError for broken rows, duplicate ids, and prompts without a label.
    """
    found: dict[str, str] = {}
    with reading_labels():
        rows = list(read_rows(path))
    for where, row in rows:
        if row.get(id_field) is None or row.get(answer_field) is None:
            raise ConfigError(f"{where}: a label needs {id_field!r} and {answer_field!r}")
        identifier = str(row[id_field])
        if identifier in found:
            raise ConfigError(f"{where}: duplicate label for id {identifier!r}")
        found[identifier] = str(row[answer_field])
    wanted = list(prompt_ids)
    missing = [identifier for identifier in wanted if identifier not in found]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ConfigError(
            f"{path}: no label for {len(missing)} of {len(wanted)} prompts ({shown}); ids must match those of the prompts file"
        )
    return {identifier: found[identifier] for identifier in wanted}
