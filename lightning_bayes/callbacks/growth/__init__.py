"""Parts of `BatchSizeScheduler`: the decays of a schedule, the batches for them, and how they are carried out."""
