"""The GPU tier: embeddings on a device, gathered from wherever their n-grams are.

    plan.py        where rows lie in a bundle and in the output, worked out once per selection
    tier.py        `GpuTier`: one step, from windows to embeddings on the device
    find.py        an address for every n-gram of a step, staging what is nowhere else
    launches.py    what launches hold until they have ended
    hbm.py         n-grams kept on the device; which ones, the host knows
    reach.py       host memory that the device can read in place, and staging for misses
    _sources.py    compiled: the searches, and the gather's twin on the host
    gather.py      one launch from addresses to embeddings, and its twin on the host
    _kernel.py     that launch, made ready for a plan and a row format
    _triton.py     the kernel it launches
    dequantize.py  rows of any format to floats, wherever their bytes are

Every n-gram of a step gets one address, whether its bundle is on the device, in the arena, or in
staging, so one kernel reads them all, decodes them, and keeps on the device what was admitted
there. The host decides everything from token ids; the device never tells it anything.

Needs torch; only `engram.nn` imports it.
"""
