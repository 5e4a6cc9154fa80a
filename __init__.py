"""pdserve: large language model serving with prefill and decode on different nodes."""
