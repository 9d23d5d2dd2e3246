"""Read machine code: registers, memory, and what a turn of each loop over the tensors costs.

A turn is counted along one way round the loop: the one that moves the most bytes in 16-byte accesses, for that is what a dense
tensor takes, and of several such ways the one with the fewest instructions. An inner loop on that way counts once. So a loop
with a slow path beside the fast one, a loop with branches for tensors that may be absent, and a loop without a branch are
counted alike. What a called subroutine takes is left out.
"""

from __future__ import annotations

import collections
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

WIDEST = 128
WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": WIDEST}
LOCAL = re.compile(r"\b(?:LDL|STL)\b")
ACCESS = re.compile(r"\b(LDG|STG)\.(\S+)")
# What a loop reads that other blocks wrote, it reads with the scope of the GPU: partial sums, no tensors.
SHARED_BETWEEN_BLOCKS = "STRONG"


class Turn(NamedTuple):
    """One way round a loop: ``wide`` bytes in 16-byte accesses of a thread, and ``instructions``."""

    wide: int
    instructions: int

    def __add__(self, other: Turn) -> Turn:
        return Turn(self.wide + other.wide, self.instructions + other.instructions)

    @property
    def merit(self) -> tuple[int, int]:
        return self.wide, -self.instructions


class Loop(NamedTuple):
    """A loop over tensors: ``turn`` along its main way, and the ``widths`` in bits of all global accesses on that way."""

    turn: Turn
    widths: tuple[int, ...]


class Function(NamedTuple):
    """A kernel's machine code: instructions in order, and where the labels stand among them."""

    name: str
    registers: int
    local_bytes: int
    instructions: list[str]
    labels: dict[str, int]

    @property
    def spilled(self) -> int:
        """Instructions that access local memory."""
        return sum(LOCAL.search(text) is not None for text in self.instructions)

    @property
    def loops(self) -> list[Loop]:
        """The loops over tensors, in the order of the code; of nested ones the outermost with 16-byte accesses of its own."""
        return [loop for _, loop in sorted(Graph(self).streaming())]


class Block(NamedTuple):
    """Instructions without a branch into or out of them, and the blocks that may follow."""

    turn: Turn
    widths: tuple[int, ...]
    followers: tuple[int, ...]


class Graph:
    """How blocks follow one another in a function; blocks are named by their first instruction."""

    def __init__(self, function: Function) -> None:
        self.blocks = dict(_blocks(function))

    @cached_property
    def order(self) -> list[int]:
        """Blocks that can be reached, each before those that only it leads to."""
        seen, finished = {0}, []
        stack = [(0, iter(self.blocks[0].followers))]
        while stack:
            block, followers = stack[-1]
            follower = next((f for f in followers if f not in seen), None)
            if follower is None:
                finished.append(block)
                stack.pop()
            else:
                seen.add(follower)
                stack.append((follower, iter(self.blocks[follower].followers)))
        return finished[::-1]

    @cached_property
    def before(self) -> dict[int, list[int]]:
        found = collections.defaultdict(list)
        for block in self.order:
            for follower in self.blocks[block].followers:
                found[follower].append(block)
        return found

    @cached_property
    def dominator(self) -> dict[int, int]:
        """The block through which every way to a block comes last (Cooper, Harvey and Kennedy 2001)."""
        place = {block: i for i, block in enumerate(self.order)}
        found = {0: 0}

        def common(a: int, b: int) -> int:
            while a != b:
                a, b = (found[a], b) if place[a] > place[b] else (a, found[b])
            return a

        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                known = [b for b in self.before[block] if b in found]
                best = known[0]
                for other in known[1:]:
                    best = common(best, other)
                changed |= found.get(block) != best
                found[block] = best
        return found

    @cached_property
    def bodies(self) -> dict[int, set[int]]:
        """The natural loops' blocks, by the loop's header."""
        found: dict[int, set[int]] = collections.defaultdict(set)
        for header in self.order:
            latches = [b for b in self.before[header] if self._dominates(header, b)]
            if latches:
                body = found[header]
                body.add(header)
                while latches:
                    block = latches.pop()
                    if block not in body:
                        body.add(block)
                        latches += self.before[block]
        return found

    def _dominates(self, header: int, block: int) -> bool:
        while block > 0 and block != header:
            block = self.dominator[block]
        return block == header

    def streaming(self) -> Iterator[tuple[int, Loop]]:
        """See ``Function.loops``; each with its first instruction."""
        taken: set[int] = set()
        for header in sorted(self.bodies, key=lambda h: (-len(self.bodies[h]), h)):
            if header not in taken and any(self.blocks[b].turn.wide for b in self._own(header)):
                taken |= self.bodies[header]
                yield header, self._main_way(header)

    def _inner(self, header: int) -> list[int]:
        """Headers of the loops directly within a loop."""
        body = self.bodies[header]
        within = [h for h in self.bodies if h != header and h in body]
        return [h for h in within if not any(h in self.bodies[other] for other in within if other != h)]

    def _own(self, header: int) -> set[int]:
        """Blocks of a loop and of no loop within it."""
        return self.bodies[header].difference(*(self.bodies[h] for h in self._inner(header)))

    def _main_way(self, header: int) -> Loop:
        body, own = self.bodies[header], self._own(header)
        inner = {block: h for h in self._inner(header) for block in self.bodies[h]}
        loops = {h: self._main_way(h) for h in set(inner.values())}
        # Best way from the header to a block, the block included; a loop within is one block.
        best: dict[int, tuple[Turn, tuple[int, ...]]] = {}
        ends = []
        for block in self.order:
            if block not in body or (block in inner and inner[block] != block):
                continue
            stop = loops[block] if block in inner else Loop(self.blocks[block].turn, self.blocks[block].widths)
            members = self.bodies[block] if block in inner else {block}
            came = [
                best[inner.get(b, b)]
                for member in members
                for b in self.before[member]
                if b in body and b not in members and inner.get(b, b) in best and member != header
            ]
            if block != header and not came:
                continue
            turn, widths = max(came, key=lambda way: way[0].merit, default=(Turn(0, 0), ()))
            best[block] = turn + stop.turn, widths + stop.widths
            if any(header in self.blocks[m].followers for m in members if m in own or m in inner):
                ends.append(best[block])
        return Loop(*max(ends, key=lambda way: way[0].merit))


def _blocks(function: Function) -> Iterator[tuple[int, Block]]:
    code, labels = function.instructions, function.labels
    follow: dict[int, tuple[int, ...]] = {}
    reconverge: dict[str, int] = {}
    for i, text in enumerate(code):
        opcode = re.search(r"\b(BSSY|BSYNC|BRA|BRX|JMP|CALL|EXIT|RET)\b(.*)", text)
        if opcode is None:
            continue
        kind, operands = opcode.groups()
        targets = tuple(labels[name] for name in re.findall(r"\.L_\w+", operands))
        if kind == "CALL" and not targets:
            # Of a subroutine, which comes back. What a label of the same function is called by does not: that is a far jump.
            continue
        barrier = re.search(r"\bB\d+\b", operands)
        if kind == "BRX" and not targets:
            raise ValueError(f"{function.name}: got an indirect branch without its targets, takes code read with switches=True")
        if kind == "BSSY":
            reconverge[barrier[0]] = targets[0]
            continue
        if kind == "BSYNC":
            targets = (reconverge[barrier[0]],) if barrier and barrier[0] in reconverge else (i + 1,)
        conditional = text.startswith("@") or (kind == "BRA" and not re.match(r"\S*\s+`\(", operands))
        follow[i] = targets + ((i + 1,) if conditional else ())
    starts = sorted({0, *labels.values(), *(i + 1 for i in follow), *(t for targets in follow.values() for t in targets)})
    starts = [s for s in starts if s < len(code)]
    for start, end in zip(starts, [*starts[1:], len(code)], strict=True):
        followers = follow.get(end - 1, (end,))
        widths = tuple(_widths(code[start:end]))
        turn = Turn(sum(w // 8 for w in widths if w == WIDEST), end - start)
        yield start, Block(turn, widths, tuple(f for f in followers if f < len(code)))


def _widths(code: Iterable[str]) -> Iterator[int]:
    for text in code:
        access = ACCESS.search(text)
        if access and SHARED_BETWEEN_BLOCKS not in access[2]:
            yield next((WIDTHS[part] for part in access[2].split(".") if part in WIDTHS), 32)


class Unreadable(Exception):
    """One line: why machine code cannot be read here, and what would change that."""


class Tools:
    """The programs that read machine code: of Triton's wheel, or CUDA's own.

    Raises:
        Unreadable: they are not here.
    """

    PROGRAMS = ("cuobjdump", "nvdisasm")

    def __init__(self) -> None:
        # Triton is found without its import, which would read whether it is to interpret.
        triton = importlib.util.find_spec("triton")
        carried = [] if triton is None else [Path(triton.origin).parent / "backends/nvidia/bin"]
        installed = [Path(found).parent for found in map(shutil.which, self.PROGRAMS) if found]
        for folder in (*carried, *installed):
            if all((folder / program).exists() for program in self.PROGRAMS):
                self.folder = folder
                return
        raise Unreadable(f"no {' and '.join(self.PROGRAMS)} here: install triton, or the CUDA toolkit")

    def usage(self, cubin: Path) -> dict[str, tuple[int, int]]:
        """Registers and bytes of local memory of a thread, by kernel: known without taking the code apart."""
        found = {}
        for name, printed in re.findall(r"Function (\S+):\n(.*)", self._run("cuobjdump", "--dump-resource-usage", cubin)):
            numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
            found[name] = numbers["REG"], numbers["STACK"] + numbers["LOCAL"]
        return found

    def functions(self, cubin: Path, *, switches: bool) -> Iterator[Function]:
        """The kernels of one file for one GPU.

        Args:
            cubin: the file.
            switches: whether they may have indirect branches. To find where those lead takes the disassembler an analysis.
        """
        usage = self.usage(cubin)
        name, labels, code = "", {}, []
        analysis = () if switches else ("--no-dataflow",)
        for line in [*self._run("nvdisasm", "--print-code", *analysis, cubin).splitlines(), "\t.section\t.text.,"]:
            if line.startswith("        /*"):
                code.append(line[line.index("*/") + 2 : line.rindex(";")].strip())
            elif line.startswith(".L_"):
                labels[line.rstrip(":")] = len(code)
            elif line.startswith("\t.section\t.text."):
                if code:
                    yield Function(name, *usage[name], code, labels)
                name, labels, code = line.split("\t")[2].removeprefix(".text.").partition(",")[0], {}, []

    def functions_of(self, library: Path) -> Iterator[tuple[int, Function]]:
        """The kernels of a shared library, with the architecture of each (sm_90: 90)."""
        with tempfile.TemporaryDirectory() as folder:
            self._run("cuobjdump", "--extract-elf", "all", library.absolute(), cwd=folder)
            for cubin in sorted(Path(folder).glob("*.cubin")):
                for function in self.functions(cubin, switches=True):
                    yield int(re.search(r"\.sm_(\d+)", cubin.name)[1]), function

    def ptx(self, library: Path) -> str:
        """The PTX that a shared library carries, of all its modules."""
        return self._run("cuobjdump", "-ptx", library)

    def _run(self, program: str, *arguments: str | Path, cwd: str | None = None) -> str:
        command = [str(self.folder / program), *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout
