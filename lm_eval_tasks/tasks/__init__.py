"""The tasks: one folder each group, with its YAML files, documents and scoring."""
