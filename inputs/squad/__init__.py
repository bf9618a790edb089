"""SQuAD: files become questions, questions become windows, windows become batches."""
