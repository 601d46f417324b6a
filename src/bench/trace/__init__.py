"""The training step on fake tensors, and the replay of the CUDA caching allocator.

`bench.trace.run.trace(setup)` runs bench.step.TrainStep, the same that `finefit train` runs, on tensors that have
shapes and storages but no data: no GPU, no weights. How:

    fakes      the model, built on the meta device, with every tensor replaced by an empty fake one
    tracker    every storage that an operator makes is recorded until the last tensor lets go of it
    cuda       what CUDA would do where the CPU does something else: attention kernels, dropout, autocast
    kernels    fused Triton kernels, as stand-ins that allocate and save what they do
    scans      kernels of linear attention and state spaces, likewise (and mamba)
    stacks     what older library versions do otherwise
    recording  what was alive when, by category, module and phase (no torch)
    depth      peaks of a deep model from two shallow ones
    stitch     every allocation of a deep model from two shallow ones (no torch)
    allocator  CUDA's caching allocator by its rules (allocator_rules), replay what it reserves for a recording (no torch)
    coefficients   of an architecture without formulas, from a few traces
"""
