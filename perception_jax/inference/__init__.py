"""A model over many images: batches of one shape on a mesh, and folders of image files."""
