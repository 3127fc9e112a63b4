"""Generation: KV cache, prefill and decode loop on explicit state (not implemented yet)."""
