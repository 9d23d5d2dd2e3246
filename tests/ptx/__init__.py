"""The kernels as they are compiled for a GPU, run without one: a machine that executes their PTX, in NumPy.

Triton's interpreter runs what the kernels say in Python; this runs what the compilers made of them, Triton and nvcc. Layouts,
vector accesses, masks, shuffles, barriers, tickets and inline assembly are the GPU's own; addresses are those of tensors on the
CPU, and each access is checked. ``triton`` and ``native`` are the two ways to a launch: Triton's own, and the CUDA library's,
whose host code runs as it is. Its instructions are those that the kernels need, as the PTX ISA (NVIDIA, version 8.7) has them.

What it cannot show: how fast anything is, what the assembler makes of the PTX, how a memory orders what nobody ordered, and
what the special-function unit's results are. These are taken as exact, or off by their documented error (``units.Error``).
"""
