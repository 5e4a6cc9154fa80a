"""One node on several processes: rank 0's side of the others, and theirs."""
