"""GiVE: a text instruction steers a frozen image encoder (arXiv 2410.20109)."""
