"""One folder per architecture; `registry` lists them."""
