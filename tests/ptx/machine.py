"""Threads that execute a program, as many at a time as are at the same place of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fused_elbo.codegen.hardware import LANES_PER_WARP as WARP

from . import units
from .memory import Fault, Global, Region, Shared
from .program import CONTROL, Address, Instruction, Operand, Program
from .units import SIGNED, TYPES, UNSIGNED, Error, Values

# Types of numbers that registers hold as words, or in pairs.
SHORT = {"bf16": "b16", "bf16x2": "b32", "f16x2": "b32", "s16x2": "b32", "u16x2": "b32", "f32x2": "b64"}

# Roundings that none of these instructions has asked for.
UNKNOWN = frozenset(("rz", "rp", "rni", "rmi", "rpi", "relu"))

Threads = Values | slice


class Machine:
    """Runs blocks ``blocks`` of a grid, of ``threads`` threads each."""

    def __init__(
        self, program: Program, blocks: Values, grid: Sequence[int], threads: int, arguments: bytes, memory: Global,
        variables: dict[str, Region], shared: int, error: Error,
    ) -> None:  # fmt: skip
        self.program, self.memory, self.error = program, memory, error
        count = len(blocks) * threads
        self.place = np.zeros(count, dtype="i8")
        self.waiting, self.held, self.done = (np.zeros(count, dtype=bool) for _ in range(3))
        self.block = np.repeat(np.arange(len(blocks)), threads)
        self.number = np.repeat(blocks, threads)
        self.warp = np.arange(count) // WARP
        # Which blocks have passed an atomic operation, and then a fence.
        self.arrived, self.synchronised = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
        self.shared = Shared(len(blocks), program.shared_bytes + shared)
        self.arguments = np.frombuffer(arguments, dtype="u1")
        self.names = program.parameters | program.shared | {name: region.start for name, region in variables.items()}
        # A register that is read before it is written must not look like a number.
        self.registers = {
            name: np.zeros(count, dtype=bool) if bits == 1 else np.full(count, 0xDEADBEEF_DEADBEEF, "u8").astype(UNSIGNED[bits])
            for name, bits in program.registers.items()
        }
        self.special = {
            "%tid.x": np.tile(np.arange(threads), len(blocks)), "%ctaid.x": self.number % grid[0],
            "%ctaid.y": self.number // grid[0] % grid[1], "%ctaid.z": self.number // (grid[0] * grid[1]),
            "%nctaid.x": np.full(count, grid[0]), "%nctaid.y": np.full(count, grid[1]),
            "%nctaid.z": np.full(count, grid[2]), "%ntid.x": np.full(count, threads),
        }  # fmt: skip

    def run(self) -> None:
        """Until all threads have returned."""
        with np.errstate(all="ignore"):
            while not self.done.all():
                ready = ~(self.waiting | self.held | self.done)
                if not ready.any():
                    self._release()
                    continue
                # Those that are furthest behind go first, so that threads which parted mostly meet again.
                first = self.place[ready].min()
                here = ~(self.waiting | self.done) & (self.place == first)
                if self.program.instructions[first].collective:
                    here = self._whole_warps(here)
                self._stretch(int(first), slice(None) if here.all() else np.flatnonzero(here))

    def _release(self) -> None:
        """Opens the barriers: all live threads of every block are there, since no thread is ready."""
        if self.held.any():
            instruction = self.program.instructions[self.place[self.held][0]]
            raise Fault(f"a part of a warp waits for the rest: {instruction.text}")
        self.waiting[:] = False
        for block in np.unique(self.block[~self.done]):
            self.shared.synchronise(int(block))
            # A barrier orders all of a block behind an atomic operation of one of its threads.
            chosen = self.block == block
            self.arrived[chosen], self.synchronised[chosen] = self.arrived[chosen].any(), self.synchronised[chosen].any()

    def _whole_warps(self, here: Values) -> Values:
        """Of threads at an instruction of whole warps those whose warp is there; the others are held until it is."""
        whole = np.repeat(here.reshape(-1, WARP).all(axis=1), WARP)
        self.held[here] = ~whole[here]
        return whole

    def _stretch(self, first: int, threads: Threads) -> None:
        """Instructions from one on, up to a place where threads part, meet or wait."""
        program, k = self.program, first
        while isinstance(threads, slice) or len(threads):
            instruction = program.instructions[k]
            k += 1
            if instruction.name in CONTROL:
                self._control(instruction, k, threads)
                return
            chosen = self._guarded(instruction, threads)
            if isinstance(chosen, slice) or len(chosen):
                try:
                    self._execute(instruction, chosen)
                except Fault as fault:
                    raise Fault(f"{fault}: {instruction.text}") from None
                except (LookupError, TypeError, ValueError, AttributeError) as error:
                    raise NotImplementedError(instruction.text) from error
            if k in program.starts:
                self.place[threads] = k
                return

    def _control(self, instruction: Instruction, following: int, threads: Threads) -> None:
        self.place[threads] = following
        chosen = self._guarded(instruction, threads)
        if instruction.name == "bra":
            self.place[chosen] = self.program.labels[instruction.operands[0]]
        elif instruction.name == "brx":
            by, table = instruction.operands
            targets = np.array([self.program.labels[label] for label in self.program.tables[table]])
            self.place[chosen] = targets[self._read(by, TYPES["u32"], chosen)]
        elif instruction.name == "ret":
            self.done[chosen] = True
        else:
            self.waiting[chosen] = True

    def _guarded(self, instruction: Instruction, threads: Threads) -> Threads:
        if instruction.predicate is None:
            return threads
        name, wanted = instruction.predicate
        holds = self.registers[name][threads] == wanted
        return np.flatnonzero(holds) if isinstance(threads, slice) else threads[holds]

    def _execute(self, instruction: Instruction, threads: Threads) -> None:
        if UNKNOWN.intersection(instruction.modifiers):
            raise NotImplementedError(instruction.text)
        special = getattr(self, f"_{instruction.name}", None)
        if special is None:
            self._compute(instruction.name, instruction.modifiers, instruction.operands, threads)
        else:
            special(instruction.modifiers, instruction.operands, threads)

    def _compute(self, name: str, modifiers: tuple[str, ...], operands: tuple[Operand, ...], threads: Threads) -> None:
        """A function of values of one type."""
        kind = modifiers[-1]
        if kind in ("bf16", "f16") and "f32" in modifiers[:-1]:
            # All but the last operand are narrow: what is added to, and the result, are not.
            *narrow, last = operands[1:]
            kind = "f32"
            values = [self._numbers(o, modifiers[-1], threads) for o in narrow]
            values = [[v.astype("f4") for v in one] for one in values] + [self._numbers(last, kind, threads)]
        else:
            values = [self._numbers(o, kind, threads) for o in operands[1:]]
        if "ftz" in modifiers:
            values = [[units.flushed(v) for v in one] for one in values]
        if name in units.APPROXIMATE and "approx" in modifiers:
            found = [units.approximate(name, values[0][0], self.error)]
        else:
            compute = (units.NAN if "NaN" in modifiers else units.DOWN if "rm" in modifiers else units.COMPUTED)[name]
            found = [compute(*each) for each in zip(*values, strict=True)]
        if "sat" in modifiers:
            found = [units.saturated(v) for v in found]
        self._write(operands[0], units.joined(found, kind) if kind in SHORT else found[0], threads)

    # Operands.

    def _read(self, operand: Operand, kind: np.dtype, threads: Threads) -> Values:
        """A register's value in a type that may be narrower, an immediate, or a special register."""
        if isinstance(operand, tuple):
            return self._packed(operand, kind, threads)
        if operand in self.registers:
            raw = self.registers[operand][threads]
            if kind.kind == "b":
                return raw
            return raw.astype(UNSIGNED[8 * kind.itemsize], copy=False).view(kind)
        count = len(self.place) if isinstance(threads, slice) else len(threads)
        if operand in self.special:
            return self.special[operand][threads].astype(kind)
        if operand in self.names:
            return np.full(count, self.names[operand], dtype=kind)
        if operand[:2] in ("0f", "0d"):
            word = np.array(int(operand[2:], 16), dtype="u4" if operand[1] == "f" else "u8")
            number = word.view("f4" if operand[1] == "f" else "f8").astype(kind) if kind.kind == "f" else word.astype(kind)
            return np.full(count, number)
        number = int(operand.rstrip("U"), 0)
        if kind.kind == "b":
            return np.full(count, bool(number))
        word = number & (2 ** (8 * kind.itemsize) - 1)
        return np.full(count, word, dtype=UNSIGNED[8 * kind.itemsize]).view(kind)

    def _numbers(self, operand: Operand, kind: str, threads: Threads) -> list[Values]:
        """One number a thread, or, of a type that holds several short ones, each."""
        if kind not in SHORT:
            return [self._read(operand, TYPES[kind], threads)]
        return units.parts(self._read(operand, TYPES[SHORT[kind]], threads), kind)

    def _packed(self, parts: tuple[str, ...], kind: np.dtype, threads: Threads) -> Values:
        width = 8 * kind.itemsize // len(parts)
        words = [self._read(p, UNSIGNED[width], threads) for p in parts]
        return np.ascontiguousarray(np.stack(words, axis=1)).view(kind)[:, 0]

    def _write(self, operand: Operand, values: Values, threads: Threads) -> None:
        if isinstance(operand, tuple):
            words = np.ascontiguousarray(values).view(UNSIGNED[8 * values.itemsize // len(operand)])
            for part, column in zip(operand, words.reshape(-1, len(operand)).T, strict=True):
                self._write(part, column, threads)
        elif operand != "_":
            register = self.registers[operand]
            if values.dtype.kind == "i" and values.itemsize < register.itemsize:
                values = values.astype(SIGNED[8 * register.itemsize])
            register[threads] = units.bits_of(values).astype(register.dtype, copy=False)

    def _address(self, address: Address, threads: Threads) -> Values:
        return self._read(address.base, TYPES["u64"], threads) + np.uint64(address.offset % 2**64)

    # Instructions that are not a function of values of one type.

    def _mov(self, modifiers: tuple[str, ...], operands: tuple[Operand, ...], threads: Threads) -> None:
        self._write(operands[0], self._read(operands[1], TYPES[modifiers[-1]], threads), threads)

    def _wide(self, kind: np.dtype, operands: Sequence[Operand], threads: Threads) -> Values:
        twice = np.dtype(f"{kind.kind}{2 * kind.itemsize}")
        a, b = (self._read(o, kind, threads).astype(twice) for o in operands)
        return a * b

    def _mul(self, modifiers: tuple[str, ...], operands: tuple[Operand, ...], threads: Threads) -> None:
        if not {"wide", "hi"}.intersection(modifiers):
            self._compute("mul", modifiers, operands, threads)
            return
        kind = TYPES[modifiers[-1]]
        product = self._wide(kind, operands[1:], threads)
        self._write(operands[0], product if "wide" in modifiers else (product >> 8 * kind.itemsize).astype(kind), threads)

    def _mad(self, modifiers: tuple[str, ...], operands: tuple[Operand, ...], threads: Threads) -> None:
        kind = TYPES[modifiers[-1]]
        if "wide" in modifiers:
            product = self._wide(kind, operands[1:3], threads)
        else:
            product = np.multiply(*(self._read(o, kind, threads) for o in operands[1:3]))
        self._write(operands[0], product + self._read(operands[3], product.dtype, threads), threads)

    def _shl(self, modifiers: tuple[str, ...], operands: tuple[Operand, ...], threads: Threads, name: str = "shl") -> None:
        a, by = self._read(operands[1], TYPES[modifiers[-1]], threads), self._read(operands[2], TYPES["u32"], threads)
        self._write(operands[0], units.shift(name, a, by), threads)

    def _shr(self, modifiers: tuple[str, ...], operands: tuple[Operand, ...], threads: Threads) -> None:
        self._shl(modifiers, operands, threads, "shr")

    def _bfe(self, modifiers: tuple[str, ...], operands: tuple[Operand, ...], threads: Threads) -> None:
        start, length = (self._read(o, TYPES["u32"], threads) for o in operands[2:])
        self._write(operands[0], units.field(self._read(operands[1], TYPES[modifiers[-1]], threads), start, length), threads)

    def _prmt(self, modifiers: tuple[str, ...], operands: tuple[Operand, ...], threads: Threads) -> None:
        self._write(operands[0], units.permuted(*(self._read(o, TYPES["u32"], threads) for o in operands[1:])), threads)

    def _selp(self, modifiers: tuple[str, ...], operands: tuple[Operand, ...], threads: Threads) -> None:
        a, b = (self._read(o, TYPES[modifiers[-1]], threads) for o in operands[1:3])
        self._write(operands[0], np.where(self._read(operands[3], TYPES["pred"], threads), a, b), threads)

    def _setp(self, modifiers: tuple[str, ...], operands: tuple[Operand, ...], threads: Threads) -> None:
        registers = operands[0] if isinstance(operands[0], tuple) else (operands[0],)
        pairs = zip(*(self._numbers(o, modifiers[-1], threads) for o in operands[1:]), strict=True)
        for register, pair in zip(registers, pairs, strict=True):
            self._write(register, units.compared(modifiers[0], *pair), threads)

    def _cvt(self, modifiers: tuple[str, ...], operands: tuple[Operand, ...], threads: Threads) -> None:
        to, source = modifiers[-2:]
        if len(operands) == 3:
            high, low = (self._read(o, TYPES["f32"], threads) for o in operands[1:])
            found = units.joined([low, high], to)
        else:
            (number,) = self._numbers(operands[1], source, threads)
            number = units.saturated(number) if "sat" in modifiers else number
            found = units.joined([number], to) if to in SHORT else number.astype(TYPES[to])
        self._write(operands[0], found, threads)

    def _ld(self, modifiers: tuple[str, ...], operands: tuple[Operand, ...], threads: Threads) -> None:
        kind, (to, address) = TYPES[modifiers[-1]], operands
        registers = to if isinstance(to, tuple) else (to,)
        places, bits = self._address(address, threads), 8 * kind.itemsize
        if modifiers[0] == "param":
            found = self._argument(places, kind, len(registers))
        elif modifiers[0] == "shared":
            found = self.shared.load(places, bits, len(registers), self.block[threads], self.warp[threads])
        else:
            found = self.memory.load(
                places, bits, len(registers), self.number[threads], self.warp[threads], self.synchronised[threads],
                cached="cg" not in modifiers,
            )  # fmt: skip
        for register, column in zip(registers, found.T, strict=True):
            self._write(register, np.ascontiguousarray(column).view(kind), threads)

    def _argument(self, places: Values, kind: np.dtype, count: int) -> Values:
        same = (places == places[0]).all()
        wanted = (places[:1] if same else places)[:, None] + np.arange(count * kind.itemsize, dtype="u8")
        found = self.arguments[wanted].view(UNSIGNED[8 * kind.itemsize])
        return np.repeat(found, len(places), axis=0) if same else found

    def _st(self, modifiers: tuple[str, ...], operands: tuple[Operand, ...], threads: Threads) -> None:
        address, given = operands
        registers = given if isinstance(given, tuple) else (given,)
        kind = UNSIGNED[8 * TYPES[modifiers[-1]].itemsize]
        numbers = np.stack([self._read(r, kind, threads) for r in registers], axis=1)
        places = self._address(address, threads)
        if modifiers[0] == "shared":
            self.shared.store(places, numbers, self.block[threads], self.warp[threads])
        else:
            self.memory.store(places, numbers, self.number[threads], self.warp[threads], self.synchronised[threads])

    def _atom(self, modifiers: tuple[str, ...], operands: tuple[Operand, ...], threads: Threads) -> None:
        kind, (to, address, given), how = TYPES[modifiers[-1]], operands, modifiers[-2]
        ordered = "acq_rel" in modifiers
        if how not in ("add", "inc") or "relaxed" in modifiers:
            raise NotImplementedError(".".join(modifiers))
        threads = np.arange(len(self.place))[threads]
        places, values = self._address(address, threads), self._read(given, kind, threads)
        everybody = np.full(1, True)
        for k in range(len(threads)):
            # Whoever comes sees what all before have released.
            one, place = threads[k : k + 1], places[k : k + 1]
            who = self.number[one], self.warp[one]
            old = self.memory.load(place, 8 * kind.itemsize, 1, *who, everybody, cached=False)
            new = old + values[k] if how == "add" else np.where(old >= values[k], 0, old + 1).astype(old.dtype)
            self.memory.store(place, new, *who, everybody)
            self._write(to, old[:, 0], one)
        (self.synchronised if ordered else self.arrived)[threads] = True

    def _membar(self, modifiers: tuple[str, ...], operands: tuple[Operand, ...], threads: Threads) -> None:
        self.synchronised[threads] |= self.arrived[threads]

    def _shfl(self, modifiers: tuple[str, ...], operands: tuple[Operand, ...], threads: Threads) -> None:
        to, given, by, clamp, members = operands
        # Whether the other lane is there is known.
        to = to[0] if isinstance(to, tuple) else to
        chosen = np.arange(len(self.place))[threads]
        lane = chosen % WARP
        members, clamp = (self._read(o, TYPES["u32"], threads) for o in (members, clamp))
        if (members != 2**32 - 1).any() or (clamp != WARP - 1).any():
            raise NotImplementedError("a shuffle of a part of a warp")
        amount = self._read(by, TYPES["u32"], threads).astype("i8")
        source = lane ^ amount if modifiers[1] == "bfly" else amount % WARP
        values = self._read(given, TYPES["b32"], threads)
        self._write(to, values[np.arange(len(chosen)) - lane + source], threads)

    def _redux(self, modifiers: tuple[str, ...], operands: tuple[Operand, ...], threads: Threads) -> None:
        if modifiers[1] != "or":
            raise NotImplementedError(".".join(modifiers))
        found = np.bitwise_or.reduce(self._read(operands[1], TYPES["b32"], threads).reshape(-1, WARP), axis=1)
        self._write(operands[0], np.repeat(found, WARP), threads)

    def _popc(self, modifiers: tuple[str, ...], operands: tuple[Operand, ...], threads: Threads) -> None:
        words = np.ascontiguousarray(self._read(operands[1], TYPES[modifiers[-1]], threads))
        bits = np.unpackbits(words.view("u1").reshape(len(words), -1), axis=1)
        self._write(operands[0], bits.sum(axis=1, dtype="u4"), threads)

    def _cvta(self, modifiers: tuple[str, ...], operands: tuple[Operand, ...], threads: Threads) -> None:
        self._mov(modifiers, operands, threads)

    def _ldmatrix(self, modifiers: tuple[str, ...], operands: tuple[Operand, ...], threads: Threads) -> None:
        to, address = operands
        lanes = self._lanes_of_rows(to, threads)
        rows = self.shared.load(self._address(address, lanes), 32, 4, self.block[lanes], self.warp[lanes])
        # Thread t gets word t % 4 of row t // 4 of each.
        matrices = _matrices(rows, modifiers).reshape(-1, len(to), WARP)
        for k, register in enumerate(to):
            self._write(register, np.ascontiguousarray(matrices[:, k]).reshape(-1), threads)

    def _stmatrix(self, modifiers: tuple[str, ...], operands: tuple[Operand, ...], threads: Threads) -> None:
        address, given = operands
        lanes = self._lanes_of_rows(given, threads)
        words = np.stack([self._read(r, TYPES["b32"], threads).reshape(-1, WARP) for r in given], axis=1)
        rows = _matrices(words, modifiers).reshape(-1, 4)
        self.shared.store(self._address(address, lanes), rows, self.block[lanes], self.warp[lanes])

    def _lanes_of_rows(self, matrices: Operand, threads: Threads) -> Values:
        """Of one, two or four matrices of 8 rows of 16 bytes: lane 8 m + r has the address of row r of matrix m."""
        chosen = np.arange(len(self.place))[threads]
        return chosen[chosen % WARP < 8 * len(matrices)]


def _matrices(words: Values, modifiers: tuple[str, ...]) -> Values:
    """8 x 8 numbers of 16 bits each, as words of two, and transposed where that is asked for."""
    found = np.ascontiguousarray(words).view("u2").reshape(-1, 8, 8)
    found = found.swapaxes(1, 2) if "trans" in modifiers else found
    return np.ascontiguousarray(found).view("u4")
