"""Speed of the library beside its peers, checked first: ``python -m fused_elbo bench``.

The record that ``--json`` writes, after each item and whole or not at all, is one object:

``schema``
    2; a record of another number cannot be resumed.
``environment``
    ``date``, ``command``, ``fused_elbo``, ``commit`` and ``uncommitted_changes`` (None outside a checkout), ``device`` ("cpu",
    "cuda"), ``gpu``, ``cpu``, ``cpus``, ``threads``, ``system``, ``python``, ``torch``, ``triton``, ``torch_capability``,
    ``native_capability`` (instruction sets on the CPU), ``backends`` ("timed", or the reason of one that was not),
    ``one_by_one`` (peers were not timed in turns),
    ``transparent_hugepages``, ``variables`` (of the environment), ``clock`` (of the device: on a GPU its properties, and what
    nvidia-smi says of driver and limits; on a CPU the largest cache and the processors that were allowed), ``compile_modes``
    (torch.compile's arguments by mode).
``conditions``
    A list of what the device said of its clocks (and power and temperature) before the first item and after the last one of
    each run.
``copy``
    The bandwidth of a copy in this process: ``bytes`` of the tensor, ``gb_per_s`` (what is read and what is written, median),
    ``quartiles``, ``how`` it was timed.
``items``
    A list of objects, in the order of measurement:

    ``name``, ``model``, ``stage``, ``dtype``, ``data``, ``latents`` (shapes), ``packed``, ``sweep``, ``targets``
        as in ``items.Item``;
    ``passes``, ``ideal_bytes``
        how often the latents and the data must be read or written, and the bytes of that; None for a training step;
    ``state``
        the state of the caches that is reported first: on a GPU "cold", on a CPU "hot";
    ``left_out``
        peers that the item does without, with the reason;
    ``skipped``
        why nothing of it was measured; then ``peers`` and ``rows`` are empty;
    ``seconds``
        that the whole item took;
    ``peers``
        by name, and with ", hot" or ", cold" in the other state. Each has its ``kind`` ("ours", "eager", "distributions",
        "compiled", "copy"), ``backend``, ``upstream`` gradient of the mean, ``state``, ``first_call_seconds`` (compilation
        included); then either ``refused`` (it failed, or its numbers are wrong), or ``left_out``, or the measurement:
        ``median_ms`` and ``quartiles_ms`` of a call over ``rounds`` of ``calls`` each, ``how`` it was timed, over how many
        ``sets`` of inputs, ``peak_bytes`` (the most a call allocates at once, results included), ``host_us`` (on a GPU, until
        the call returns) and ``others`` (the share of the machine's CPU time that other processes took);
    ``rows``
        one for each backend, state and upstream gradient: ``item``, ``dtype``, ``backend`` (the peer's name), ``upstream``,
        ``state``, ``ms`` (of ours and of the best "eager", "distributions", "compiled", "copy"), ``ratios`` (how many times as
        long as ours the best eager and compiled take; of stage "bandwidth" the percentage of ``copy_gb_per_s``, the rate of a
        copy of such a tensor), ``ratio_to`` (the same for each peer), ``gb_per_s`` (ideal bytes a second),
        ``percent_of_copy``, ``targets`` of the ratios and whether they are ``met``.

Times are in milliseconds, a GB is 1e9 bytes.
"""
