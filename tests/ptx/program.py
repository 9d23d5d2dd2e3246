"""PTX text, taken apart."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

_DECLARED = re.compile(r"\.reg\s+\.(pred|[bf]\d+)\s+([^;]+);")
# In a parameter's declaration its type, name and length stand, and for a pointer what it points to.
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[a-z](\d+)\s+(?:\.ptr\s.*?)?(\w+)(?:\[(\d+)\])?\s*,?\s*$", re.MULTILINE
)
_VARIABLE = re.compile(
    r"^\s*(?:\.(extern)\s+)?\.(shared|global)\s+\.align\s+(\d+)\s+\.[a-z](\d+)\s+(\w+)(?:\[(\d*)\])?;", re.MULTILINE
)
_TABLE = re.compile(r"(\$\w+):\s*\.branchtargets([^;]*);")
_LABEL = re.compile(r"^(\$?\w+):$")
CONTROL = frozenset(("bra", "brx", "bar", "ret"))


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
        parameters: where each begins, in bytes.
        parameter_bytes: of all.
        shared: where each variable in shared memory begins, in bytes; what a launch brings along begins at 0.
        shared_bytes: of those that are declared.
        variables: bytes of each in global memory.
        registers: bits of each.
        instructions: in order of their text.
        labels: the number of the instruction that each stands before.
        tables: the labels that a branch by number may go to.
        starts: numbers of instructions that a thread may come to from elsewhere than the one before.
    """

    parameters: dict[str, int]
    parameter_bytes: int
    shared: dict[str, int]
    shared_bytes: int
    variables: dict[str, int]
    registers: dict[str, int]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    tables: dict[str, list[str]]
    starts: frozenset[int]


def kernels(text: str) -> dict[str, Callable[[], Program]]:
    """Of all modules in a text the kernels by name; each is taken apart when it is called for."""
    found = {}
    for module in text.split(".version")[1:]:
        top, *entries = module.split(".entry")
        variables = _VARIABLE.findall(top)
        for entry in entries:
            head, _, body = entry.partition("\n{\n")
            name, _, parameters = head.partition("(")
            found[name.strip()] = functools.cache(functools.partial(_program, variables, parameters, body.rpartition("\n}")[0]))
    return found


def _program(variables: list[tuple[str, ...]], head: str, body: str) -> Program:
    body = re.sub(r"//[^\n]*|/\*.*?\*/", "", body, flags=re.DOTALL)
    parameters, parameter_bytes = _laid_out(_PARAMETER.findall(head + "\n"))
    used = [v for v in variables if v[4] in body]
    # What is declared elsewhere is as long as a launch says.
    shared, shared_bytes = _laid_out([(*v[2:5], "0" if v[0] else v[5]) for v in used if v[1] == "shared"])
    in_memory = {name: int(bits) // 8 * int(count or 1) for _, kind, _, bits, name, count in used if kind == "global"}
    tables = {name: [label.strip() for label in found.split(",")] for name, found in _TABLE.findall(body)}
    registers = {}
    for kind, names in _DECLARED.findall(body):
        bits = 1 if kind == "pred" else int(kind[1:])
        for name, _, count in (declared.strip(" >").partition("<") for declared in names.split(",")):
            registers |= {f"{name}{k}": bits for k in range(int(count))} if count else {name: bits}
    instructions, labels = [], {}
    for line in _TABLE.sub("", body).splitlines():
        # No statement begins with an operand: what opens or closes here is a scope of inline assembly.
        for statement in filter(None, (part.strip().lstrip("{} ") for part in line.split(";"))):
            if label := _LABEL.match(statement):
                labels[label[1]] = len(instructions)
            elif not statement.startswith("."):
                instructions.append(_instruction(statement))
    # Threads part at branches and meet again at labels; at a barrier a block's wait for each other, at ``.sync`` a warp's.
    behind = {k + 1 for k, i in enumerate(instructions) if i.name in CONTROL or i.collective}
    before = {k for k, i in enumerate(instructions) if i.collective}
    starts = frozenset(behind | before | set(labels.values()))
    return Program(
        parameters, parameter_bytes, shared, shared_bytes, in_memory, registers, tuple(instructions), labels, tables, starts
    )


def _laid_out(declared: list[tuple[str, ...]]) -> tuple[dict[str, int], int]:
    """Where variables of (alignment, bits, name, length) begin, one behind the other, and what they take."""
    begins, end = {}, 0
    for align, bits, name, count in declared:
        size = int(bits) // 8
        end = -(-end // int(align or size)) * int(align or size)
        begins[name] = end
        end += size * int(count or 1)
    return begins, end


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
