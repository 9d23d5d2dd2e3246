"""The file that a run writes after each item, and that another goes on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..vae.run_folder import write_json
from . import environment

SCHEMA = 2


class RecordError(RuntimeError):
    """A record cannot be gone on with; the message says why and what to do."""


class Record:
    """What has been measured so far: ``content`` as ``fused_elbo.bench`` describes it.

    Args:
        path: where it is written; None keeps it in memory alone.
        facts: the environment.
        resume: take over what the file holds, if it was measured in such an environment.

    Raises:
        RecordError: ``resume``, and the file is not there, not a record, or one of another environment.
    """

    def __init__(self, path: Path | None, facts: dict[str, Any], *, resume: bool) -> None:
        self.path = path
        self.content: dict[str, Any] = {"schema": SCHEMA, "environment": facts, "conditions": [], "copy": None, "items": []}
        if resume:
            self._take_over(facts)

    def has(self, name: str, dtype: str) -> bool:
        return any((item["name"], item["dtype"]) == (name, dtype) for item in self.content["items"])

    def add(self, item: dict[str, Any]) -> None:
        self.content["items"].append(item)
        self.save()

    def save(self) -> None:
        if self.path:
            write_json(self.path, self.content)

    def _take_over(self, facts: dict[str, Any]) -> None:
        if self.path is None:
            raise RecordError("--resume: takes --json PATH, the file to go on with")
        try:
            stored = json.loads(self.path.read_text())
        except OSError as error:
            raise RecordError(f"--resume: cannot read {self.path}: {error.strerror}") from error
        except ValueError as error:
            raise RecordError(f"--resume: {self.path} is no record: {error}") from error
        if not isinstance(stored, dict) or stored.get("schema") != SCHEMA:
            raise RecordError(f"--resume: {self.path} is no record of this version: measure anew without --resume")
        if found := environment.differences(stored["environment"], facts):
            raise RecordError(f"--resume: {self.path} was measured with {'; '.join(found)}: measure anew without --resume")
        # What was skipped may have its turn now.
        items = [item for item in stored["items"] if "skipped" not in item]
        self.content |= {"environment": stored["environment"], "conditions": stored["conditions"], "copy": stored["copy"]}
        self.content["items"] = items
