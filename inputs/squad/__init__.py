"""SQuAD v1.1: files → questions and contexts → windows → examples."""
