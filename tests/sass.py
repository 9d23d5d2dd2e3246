"""Reads what the compiler made of the CUDA kernels of a library: registers, memory, and the instructions of the main loop."""

from __future__ import annotations

import collections
import heapq
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

# Elements that a thread takes in one turn of the main loop (RUN in csrc/cuda/launch.cuh).
RUN = 16

WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}


class Kernel(NamedTuple):
    """``loads`` and ``stores`` are the widths of global accesses in bits; ``per_element`` counts the instructions of the main
    loop's shortest way round."""

    architecture: str
    name: str
    registers: int
    local_bytes: int
    loads: frozenset[int]
    stores: frozenset[int]
    per_element: float


def cuobjdump() -> str | None:
    """The program of that name: CUDA's own, or the one that Triton's wheel carries."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        carried = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        found = str(carried) if carried.exists() else None
    return found


def kernels(library: Path, program: str) -> list[Kernel]:
    """All kernels of all architectures in ``library``."""
    usage, architecture, name = {}, "", ""
    for line in _lines(program, "-res-usage", library):
        if match := re.search(r"arch = (\w+)", line):
            architecture = match[1]
        if match := re.search(r"Function (\S+):", line):
            name = match[1]
        if match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            usage[architecture, name] = int(match[1]), int(match[2]) + int(match[3])
    codes: dict[tuple[str, str], list[tuple[int, str]]] = collections.defaultdict(list)
    for line in _lines(program, "-sass", library):
        if match := re.search(r"arch = (\w+)", line):
            architecture = match[1]
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
        if match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            codes[architecture, name].append((int(match[1], 16), match[2]))
    return [_kernel(*key, *usage[key], code) for key, code in codes.items()]


def _kernel(architecture: str, name: str, registers: int, local_bytes: int, code: list[tuple[int, str]]) -> Kernel:
    opcodes = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".") for _, text in code]

    def widths(kind: str) -> frozenset[int]:
        return frozenset(next((WIDTHS[p] for p in parts if p in WIDTHS), 32) for parts in opcodes if parts[0] == kind)

    return Kernel(architecture, name, registers, local_bytes, widths("LDG"), widths("STG"), _main_loop(code) / RUN)


def _main_loop(code: list[tuple[int, str]]) -> int:
    """Instructions on the shortest way round through the largest stretch without a branch."""
    sizes, followers = _blocks(code)
    heart = max(sizes, key=lambda start: sizes[start])
    queue, seen = [(sizes[s], s) for s in followers[heart] if s in sizes], set()
    heapq.heapify(queue)
    while queue:
        cost, block = heapq.heappop(queue)
        if block == heart:
            return cost
        if block not in seen:
            seen.add(block)
            for follower in followers[block] & sizes.keys():
                heapq.heappush(queue, (cost + sizes[follower], follower))
    return 0


def _blocks(code: list[tuple[int, str]]) -> tuple[dict[int, int], dict[int, set[int]]]:
    """Stretches without a branch, by their first address: how long each is, and which may follow it."""
    after = dict(zip((a for a, _ in code), (a for a, _ in code[1:]), strict=False))
    jumps, leaders = {}, {code[0][0]}
    for address, text in code:
        if match := re.search(r"\b(BRA|BRX|JMP|CALL|EXIT|RET|BREAK)\b", text):
            target = re.search(r"0x([0-9a-f]+)\s*$", text) if match[1] == "BRA" else None
            conditional = text.startswith(("@", "BRA.DIV")) or re.match(r"BRA\S*\s+(!?U?P\d|~?UR)", text)
            jumps[address] = target and int(target[1], 16), bool(conditional) or match[1] == "CALL"
            leaders |= {jumps[address][0]} - {None} | ({after[address]} if address in after else set())
    sizes, followers, start = collections.Counter(), collections.defaultdict(set), 0
    for address, _ in code:
        start = address if address in leaders else start
        sizes[start] += 1
        target, falls_through = jumps.get(address, (None, True))
        if target is not None:
            followers[start].add(target)
        if falls_through and after.get(address) in leaders:
            followers[start].add(after[address])
    return sizes, followers


def _lines(*command: str | Path) -> list[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout.splitlines()
