"""PTX text, taken apart."""

from __future__ import annotations

import re
from typing import NamedTuple

# Registers by the first letters of their names, longest first, and their bits.
_DECLARED = re.compile(r"\.reg\s+\.(pred|b16|b32|b64|f32|f64)\s+(%?\w+?)(?:<(\d+)>)?;")
_PARAMETER = re.compile(r"\.param\s+\.(\w+)\s+(?:\.ptr\s[^,)]*?)?(\w+)\s*[,)\n]")
_TABLE = re.compile(r"(\$\w+):\s*\.branchtargets([^;]*);")
_LABEL = re.compile(r"^(\$?\w+):$")
CONTROL = frozenset(("bra", "brx", "bar", "ret"))
_BITS = {"pred": 1, "b16": 16, "b32": 32, "f32": 32, "b64": 64, "f64": 64}


class Address(NamedTuple):
    """``[base + offset]``; the base is a register, a parameter or a name in shared memory."""

    base: str
    offset: int


Operand = str | Address | tuple[str, ...]


class Instruction(NamedTuple):
    """``@predicate name.modifiers operands``; a predicate is a register and the value that it must have."""

    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: tuple[str, bool] | None
    text: str

    @property
    def collective(self) -> bool:
        """Whether all threads of a warp execute it together."""
        return "sync" in self.modifiers and self.name != "bar"


class Program(NamedTuple):
    """One kernel.

    Attributes:
        parameters: name and type, in order.
        registers: bits of each.
        instructions: in order of their text.
        labels: the number of the instruction that each stands before.
        tables: the labels that a branch by number may go to.
        starts: numbers of instructions that a thread may come to from elsewhere than the one before.
    """

    parameters: tuple[tuple[str, str], ...]
    registers: dict[str, int]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    tables: dict[str, list[str]]
    starts: frozenset[int]


def parse(text: str) -> Program:
    """The one kernel of a module."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    head, _, body = text.partition(".entry")[2].partition("\n{\n")
    tables = {name: [label.strip() for label in found.split(",")] for name, found in _TABLE.findall(body)}
    body = _TABLE.sub("", body)
    registers = {}
    for kind, name, count in _DECLARED.findall(body):
        registers |= {f"{name}{k}": _BITS[kind] for k in range(int(count))} if count else {name: _BITS[kind]}
    instructions, labels = [], {}
    for line in body.rpartition("}")[0].splitlines():
        # No statement begins with an operand: what opens or closes here is a scope of inline assembly.
        for statement in filter(None, (part.strip().lstrip("{} ") for part in line.split(";"))):
            if label := _LABEL.match(statement):
                labels[label[1]] = len(instructions)
            elif not statement.startswith("."):
                instructions.append(_instruction(statement))
    # Threads part at branches and meet again at labels; at a barrier a block's wait for each other, at ``.sync`` a warp's.
    behind = {k + 1 for k, i in enumerate(instructions) if i.name in CONTROL or i.collective}
    before = {k for k, i in enumerate(instructions) if i.collective}
    parameters = tuple((name, kind) for kind, name in _PARAMETER.findall(head))
    return Program(
        parameters, registers, tuple(instructions), labels, tables, frozenset(behind | before | set(labels.values()))
    )


def _instruction(text: str) -> Instruction:
    predicate, rest = None, text
    if text.startswith("@"):
        guard, rest = text.split(None, 1)
        predicate = (guard.lstrip("@!"), "!" not in guard)
    code, *operands = rest.split(None, 1)
    name, *modifiers = code.split(".")
    found = tuple(map(_operand, re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", operands[0]))) if operands else ()
    return Instruction(name, tuple(modifiers), found, predicate, text)


def _operand(text: str) -> Operand:
    text = text.strip()
    if text[0] == "{":
        return tuple(part.strip() for part in text[1:-1].split(","))
    if text[0] == "[":
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(base, int(offset or "0", 0))
    return tuple(text.split("|")) if "|" in text else text
