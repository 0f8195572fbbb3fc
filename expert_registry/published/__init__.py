"""Rankings that others have published: which there are, how they are fetched, and the authors' own files."""
