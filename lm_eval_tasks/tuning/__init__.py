"""Choose the numbers of experts: search on one half of the documents, judge on the other."""
