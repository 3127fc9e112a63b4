"""Generation: KV cache, prefill and decode loop on explicit state. Holds nothing yet."""
