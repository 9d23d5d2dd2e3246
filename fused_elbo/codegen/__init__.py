"""What the compilers make of the kernels, held against budgets, and what a step costs in bytes and launches. No GPU is needed.

``python -m fused_elbo.codegen`` compiles the Triton kernels, reads them and the built CUDA library, and prints a table;
``python -m fused_elbo.codegen.cost`` prints the tables of ``docs/cost.md``.
"""

# Exit codes. Python's own for an exception is 1 too: a kernel that does not compile is no better than one over its budget.
OVER_BUDGET = 1
UNREADABLE = 3
