"""dse: which parallel plan, batch, precision, GPUs and pools to serve a large language model on, and at what cost."""
