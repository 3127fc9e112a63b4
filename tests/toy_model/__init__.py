"""An architecture outside the library: what a folder below `models` holds, in small."""
