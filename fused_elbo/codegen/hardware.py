"""The GPUs that machine code is judged for: what their memory delivers, and how many instructions they issue meanwhile."""

from __future__ import annotations

from typing import NamedTuple

LANES_PER_WARP = 32
# Of each multiprocessor of compute capability 8.0, 9.0 and 10.0, a warp's instruction a clock each (CUDA C++ Programming Guide,
# "Compute Capabilities").
SCHEDULERS = 4
# What a copy reaches of the peak: an assumption, at which the GPUs' makers and users arrive for large copies.
COPY_SHARE = 0.9


class Gpu(NamedTuple):
    """``bandwidth``: of the memory at its peak, in bytes a second; ``clock``: with boost, in Hz."""

    name: str
    bandwidth: float
    multiprocessors: int
    clock: float

    @property
    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written together, that a kernel bound by memory can hope for."""
        return COPY_SHARE * self.bandwidth

    def floor(self, bytes_per_element: float) -> float:
        """Instructions of a thread, an element, that are issued in the time that the element's bytes take."""
        issued = self.multiprocessors * SCHEDULERS * LANES_PER_WARP * self.clock
        return bytes_per_element / self.copy_bandwidth * issued


# By compute capability. Multiprocessors and clocks give the data sheets' float32 rates: multiprocessors x lanes x 2 x clock is
# 19.5 (64 lanes), 67 and 75 (128) TFLOPS.
GPUS = {
    # "NVIDIA A100 80GB" data sheet, SXM; multiprocessors and clock as deviceQuery prints them.
    80: Gpu("A100", 2.039e12, 108, 1.41e9),
    # "NVIDIA H200" data sheet, SXM; "NVIDIA H100 Tensor Core GPU Architecture", whose processor it has.
    90: Gpu("H200", 4.8e12, 132, 1.98e9),
    # "NVIDIA HGX B200" data sheet; multiprocessors from public listings of the device's properties.
    100: Gpu("B200", 8e12, 148, 1.98e9),
}
